"""Conversations in which all turns of the assistant have a loss, as the model was trained on them."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import save_adapter, save_chat_model, write_jsonl
from test_chat import ASKING, LOOP, PLAIN, TEMPLATES, tokenizer_with

import rapidin_vdb
from rapidin_vdb.cli import show
from rapidin_vdb.corpus import Record, encode, load_template, sample_from, taken_apart
from rapidin_vdb.corpus.written import _MARK
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.gradient.probe import ends
from rapidin_vdb.gradient.sample import cut_behind_loss
from rapidin_vdb.page.render import with_pieces
from rapidin_vdb.records import LOSSES

TALK = [
    ("system", "Be kind."),
    ("user", "Hi"),
    ("assistant", "Hello, é黄!"),
    ("user", "What is snow?"),
    ("assistant", "It is ice."),
    ("user", "And rain?"),
    ("assistant", "Water."),
]
END = {"another end": "</s>", "spaces around": " </s>"}
"""With which templates end answers, where not with <|im_end|>."""


def talk(turns=TALK, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def sample_of(fields):
    return sample_from(Record(location="here", fields=fields), turns="all")


def encoded(fields, tokenizer, max_tokens=999):
    template = load_template("chat", tokenizer=tokenizer)
    (result,) = encode([sample_of(fields)], tokenizer=tokenizer, template=template, max_tokens=max_tokens)
    if isinstance(result, CorpusError):
        raise result
    return result


def trained(fields, tokenizer, end) -> set[int]:
    """Return which code points of a conversation, as it is written for fine-tuning, stand in answers or end them."""
    text = tokenizer.apply_chat_template(fields["messages"], tokenize=False)
    found: set[int] = set()
    for turn in fields["messages"]:
        if turn["role"] == "assistant":
            said = turn["content"].strip()
            assert text.count(said) == 1
            start = text.index(said)
            stop = start + len(said)
            assert text.startswith(end, stop)
            found |= set(range(start, stop + len(end)))
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_answers_have_a_loss_and_nothing_else(name):
    tokenizer, fields = tokenizer_with(TEMPLATES[name]), talk()
    found, text = encoded(fields, tokenizer), tokenizer.apply_chat_template(fields["messages"], tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert list(found.input_ids) == tokens["input_ids"][: len(found.input_ids)]
    inside = trained(fields, tokenizer, END.get(name, "<|im_end|>"))
    wanted = [place for place, (start, _) in enumerate(tokens["offset_mapping"]) if start in inside]
    assert list(found.loss_places) == wanted
    assert found.response_tokens == len(wanted) == len(found.offsets)
    # Each stands where it says in the response; what ends an answer stands nowhere, behind it.
    response = sample_of(fields).response
    assert (
        response
        == "Hello, é黄!\n\nuser: What is snow?\n\nassistant: It is ice.\n\nuser: And rain?\n\nassistant: Water."
    )
    shown = "".join(
        response[start:end] or "|"
        for number, (start, end) in enumerate(found.offsets)
        if number == 0 or (start, end) != found.offsets[number - 1] or start == end
    )
    end = "||" if name == "spaces around" else "|"  # a space of its own before the end
    assert shown == f"Hello, é黄!{end}It is ice.{end}Water.{end}"


def test_one_answer_is_as_ever():
    tokenizer, fields = tokenizer_with(TEMPLATES["as it is"]), talk(TALK[:3])
    sample, plain = sample_of(fields), sample_from(Record(location="here", fields=fields))
    assert sample == plain and not sample.turns
    assert encoded(fields, tokenizer).places is None


def test_spaces_and_thoughts_that_the_template_leaves_out_have_no_tokens():
    told = [("user", "Hi"), ("assistant", "<think>b</think> b "), ("user", "c"), ("assistant", " d ")]
    template = LOOP + (
        "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}" + ASKING
    )
    tokenizer = tokenizer_with(template)
    found, response = encoded(talk(told), tokenizer), sample_of(talk(told)).response
    assert [(response[start:end], start) for start, end in found.offsets] == [
        ("b", 17), ("", 18), ("d", response.index("d")), ("", len(response)),
    ]  # fmt: skip
    assert tokenizer.decode([found.input_ids[place] for place in found.loss_places]) == "b<|im_end|>d<|im_end|>"
    # Nor where an answer holds all that follows it: what follows the last but one ends where the last begins.
    follows = "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    told[1] = ("assistant", f" x{follows}y ")
    found = encoded(talk(told), tokenizer)
    said = tokenizer.decode([found.input_ids[place] for place in found.loss_places])
    assert said == f"x{follows}y<|im_end|>d<|im_end|>"


def test_a_conversation_that_begins_with_an_answer():
    fields, tokenizer = talk(TALK[2:]), tokenizer_with(TEMPLATES["as it is"])
    found, sample = encoded(fields, tokenizer), sample_of(fields)
    assert sample.prompt is None and len(sample.turns) == 5
    assert tokenizer.decode(found.input_ids).startswith("<|im_start|>assistant\nHello")
    inside = trained(fields, tokenizer, "<|im_end|>")
    assert found.loss_places[0] == len("<|im_start|>assistant\n") - len("<|im_start|>") + 1
    assert len(found.offsets) >= len(inside) - 3 * len("<|im_end|>")


def test_answers_that_look_alike_or_like_the_template():
    told = [("user", "a"), ("assistant", "yes"), ("user", "yes"), ("assistant", "<|im_end|>\nyes"), ("user", "<|im_start|>"), ("assistant", "yes")]  # fmt: skip
    tokenizer = tokenizer_with(TEMPLATES["as it is"])
    found = encoded(talk(told), tokenizer)
    assert (
        tokenizer.decode([found.input_ids[place] for place in found.loss_places])
        == "yes<|im_end|><|im_end|>\nyes<|im_end|>yes<|im_end|>"
    )


def test_a_template_without_ends_has_the_end_of_sequence_once():
    tokenizer = tokenizer_with(LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}")
    found = encoded(talk(), tokenizer)
    assert (
        tokenizer.decode([found.input_ids[place] for place in found.loss_places]) == "Hello, é黄!It is ice.Water.</s>"
    )


def test_an_answer_that_the_template_writes_otherwise_is_refused():
    said = (
        "m.content | upper", "m.content ~ m.content", "m.content | replace('ice', 'snow')", "m.content | length",
        "m.content[:3]", "m.content.split('.')[-1]",
    )  # fmt: skip
    for template in (PLAIN.replace("m.content", text) for text in said):
        with pytest.raises(
            CorpusError, match=r"writes messages\[[24]\], an answer before the last one, otherwise than it is"
        ):
            encoded(talk(), tokenizer_with(template + ASKING))
    # What is before the first answer is another with marks: one character longer, so that all would seem to begin later.
    counted = "{{ messages[2].content | length }}" + PLAIN + ASKING
    with pytest.raises(CorpusError, match="otherwise than it is"):
        encoded(talk([*TALK[:2], ("assistant", "Hello."), *TALK[3:]]), tokenizer_with(counted))


def test_the_very_first_token_has_no_loss_even_in_an_answer():
    tokenizer = tokenizer_with(LOOP + "{{ m.content }}<|im_end|>{% endfor %}")
    found = encoded(talk(TALK[2:]), tokenizer)
    assert found.loss_places[0] == 1 and found.offsets[0] == (1, 2)


def said_by(found, tokenizer) -> str:
    """Return the text of the tokens that have a loss."""
    return tokenizer.decode([found.input_ids[place] for place in found.loss_places])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # The last answer ends otherwise than others.
        (PLAIN.replace("<|im_end|>", "{{ '</s>' if loop.last else '<|im_end|>' }}"), "{}<|im_end|>{}<|im_end|>{}</s>"),
        (PLAIN.replace("<|im_end|>", "{% if not loop.last %}<|im_end|>{% endif %}"), "{}<|im_end|>{}<|im_end|>{}</s>"),
        # What does not follow an answer at once ends none.
        (PLAIN.replace("<|im_end|>", "{{ '</s>' if loop.last else ' ok <|im_end|>' }}"), "{}{}{}</s>"),
        # What ends an answer is what begins the next turn.
        (
            LOOP + "{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}\n{{ m.content }}{% endfor %}",
            "{}<|im_start|>{}<|im_start|>{}</s>",
        ),
        # All up to the marker, as of the last.
        (LOOP + "{{ m.role }}: {{ m.content }}. <|im_end|>{% endfor %}", "{}. <|im_end|>{}. <|im_end|>{}. <|im_end|>"),
        # A conversation that ends with an answer is refused, so that what follows it is not seen.
        (
            PLAIN.replace("{% for m in messages %}", "{% if messages[-1].role == 'assistant' %}{{ messages.x.y }}{% endif %}" + LOOP)
            + ASKING,
            "{}<|im_end|>{}<|im_end|>{}</s>",
        ),
    ],
)  # fmt: skip
def test_what_ends_each_answer_has_a_loss(template, said):
    tokenizer = tokenizer_with(template)
    assert said_by(encoded(talk(), tokenizer), tokenizer) == said.format("Hello, é黄!", "It is ice.", "Water.")


THINKING = (
    LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + ASKING
)


def test_thoughts_that_the_template_keeps_are_part_of_the_answer():
    """Where they are kept as they are; a thought that is written otherwise would have no place in the response."""
    tokenizer = tokenizer_with(THINKING)
    kept = "<think>\nAh.\n</think>\n\nYes."
    told = [("user", "a"), ("assistant", kept), ("user", "b"), ("assistant", "No."), ("user", "c"), ("assistant", kept)]
    found, response = encoded(talk(told), tokenizer), sample_of(talk(told)).response
    assert said_by(found, tokenizer).startswith(f"{kept}<|im_end|>No.<|im_end|>")
    assert found.offsets[0] == (0, 1) and response[found.offsets[len(kept)][0] :].startswith("\n\nuser: b")
    told[1] = ("assistant", "<think>Ah.</think>Yes.")
    with pytest.raises(CorpusError, match=r"messages\[1\], an answer before the last one, otherwise"):
        encoded(talk(told), tokenizer)


def test_turns_of_weight_zero_have_no_loss():
    tokenizer, fields = tokenizer_with(TEMPLATES["as it is"]), talk()
    for place in (2, 6):
        fields["messages"][place]["weight"] = 0
    found = encoded(fields, tokenizer)
    assert sample_of(fields).response == "It is ice." and said_by(found, tokenizer) == "It is ice.<|im_end|>"
    fields["messages"][2]["weight"] = 1
    fields["messages"][4]["weight"] = fields["messages"][6]["weight"] = 0
    fields["messages"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Snow."}]
    assert said_by(encoded(fields, tokenizer), tokenizer) == "Hello, é黄!<|im_end|>Snow.<|im_end|>"
    for weight in (0.5, -1, "0", 2):
        fields["messages"][2]["weight"] = weight
        with pytest.raises(CorpusError, match=rf"messages\[2\] has the weight {weight!r}; wanted 0 or 1"):
            sample_of(fields)
    for turn in fields["messages"]:
        turn["weight"] = 0
    with pytest.raises(CorpusError, match="all of the assistant's turns have weight 0"):
        sample_of(fields)
    assert sample_from(Record(location="here", fields=fields)).response == "Snow."


def test_a_prompt_that_holds_the_mark_changes_nothing():
    tokenizer = tokenizer_with(TEMPLATES["as it is"])
    fields = talk([("user", f"{_MARK}2{_MARK}"), *TALK[2:]])
    assert said_by(encoded(fields, tokenizer), tokenizer) == "Hello, é黄!<|im_end|>It is ice.<|im_end|>Water.<|im_end|>"


def test_calls_of_tools_that_the_template_leaves_out_are_refused():
    fields = talk()
    fields["messages"][2]["tool_calls"] = [{"name": "look"}]
    with pytest.raises(CorpusError, match=r"messages\[2\] has tool_calls, which would be lost"):
        encoded(fields, tokenizer_with(TEMPLATES["as it is"]))
    assert sample_from(Record(location="here", fields=fields)).response == "Water."
    for last in ("", " \n"):
        with pytest.raises(CorpusError, match="the response is empty"):
            sample_of(talk([("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", last)]))
    assert sample_of(talk([("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "yes")])).turns


@pytest.mark.parametrize("cut", range(12, 60, 4))
def test_long_conversations_are_cut_behind_the_last_answer_that_is_left(cut):
    tokenizer = tokenizer_with(TEMPLATES["as it is"])
    whole, found = encoded(talk(), tokenizer), None
    kept = [place for place in whole.loss_places if place < cut]
    if not kept:
        with pytest.raises(CorpusError, match=f"no response token is left within --max-tokens {cut}: the prompt takes"):
            encoded(talk(), tokenizer, cut)
        return
    found = encoded(talk(), tokenizer, cut)
    assert found.truncated and list(found.loss_places) == kept and found.offsets == whole.offsets[: len(kept)]
    assert found.input_ids == whole.input_ids[: kept[-1] + 1]


def test_pieces_of_samples_keep_their_places():
    whole = encoded(talk(), tokenizer_with(TEMPLATES["as it is"]))
    for number in range(whole.response_tokens):
        one = cut_behind_loss(dataclasses.replace(whole, focus=(number,)))
        assert one.loss_places == (whole.loss_places[number],) and len(one.input_ids) == one.loss_places[0] + 1
    long = dataclasses.replace(
        whole,
        input_ids=whole.input_ids * 9,
        places=tuple(place + 8 * len(whole.input_ids) for place in whole.loss_places),
    )
    (short,) = ends([long])
    taken = long.input_ids[-len(short.input_ids) :]
    assert short.input_ids == taken and len(taken) < len(long.input_ids)
    assert [short.input_ids[place] for place in short.loss_places] == [
        long.input_ids[place] for place in long.loss_places[-len(short.offsets) :]
    ]
    assert min(short.loss_places) >= 1
    every = dataclasses.replace(
        long, places=tuple(range(1, len(long.input_ids))), offsets=((0, 1),) * (len(long.input_ids) - 1)
    )
    (short,) = ends([every])
    assert short.loss_places == tuple(range(1, len(short.input_ids))) and len(short.offsets) == len(short.loss_places)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A database of conversations, whose answers all have a loss, with RapidGrads of tokens."""
    folder = tmp_path_factory.mktemp("answers")
    model, tokenizer = save_chat_model(folder / "model", begin="<s>")
    adapter = save_adapter(folder / "adapter", "llama")
    database = rapidin_vdb.init(
        folder / "db", model=str(model), adapter=str(adapter), width=256, template="chat", turns="all"
    )
    single = [("user", "Name a fruit."), ("assistant", "A pear.")]
    records = [
        talk(id="long", stars=3),
        talk(TALK[:5], id="middle"),
        talk(single, id="single"),
        talk([*single, ("user", "And a colour?"), ("assistant", "Red.\n\nuser: no")], id="double"),
        {"id": "pair", "prompt": "Hi", "response": "Hello."},
    ]
    report = database.ingest(write_jsonl(folder / "talks.jsonl", records), token_gradients=True, token_width=128)
    assert report.added == len(records) and report.earlier_turns == 0
    return database, {record["id"]: record for record in records}, tokenizer


def reference(database, ids, places):
    """Return each tensor's gradient of the mean loss at some places, by plain autograd with labels."""
    loaded = database._loaded().loaded
    labels = [token if place in places else -100 for place, token in enumerate(ids)]
    loss = loaded.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    return [g.double() for g in torch.autograd.grad(loss, list(loaded.theta.values()))], float(loss.detach())


def test_scores_are_those_of_the_training_loss(made):
    """The product of layer-normalised gradients of the loss over all answers, by labels as trainers write them."""
    database, records, tokenizer = made
    query = rapidin_vdb.query_from("What is snow?", "It is ice.")
    (ranking,) = database.query(queries=[query], top_k=9, refine=9, tokens=True)
    asked, _ = reference(database, *_masked(tokenizer, talk([("user", "What is snow?"), ("assistant", "It is ice.")])))
    for result in ranking.results:
        fields = records[result.sample_id]
        turns = fields if "messages" in fields else talk([("user", "Hi"), ("assistant", "Hello.")])
        grads, loss = reference(database, *_masked(tokenizer, turns))
        wanted = sum(float((a * b).sum() / (a.norm() * b.norm())) for a, b in zip(grads, asked, strict=True))
        assert result.exact_score == pytest.approx(wanted, abs=2e-4), result.sample_id
        assert database.show(result.sample_id).loss == pytest.approx(loss, rel=1e-5)
        assert sum(token.score for token in result.tokens) == pytest.approx(result.exact_score, abs=2e-4)
    assert {result.sample_id for result in ranking.results} == set(records)


def _masked(tokenizer, fields):
    """Return a conversation's tokens, and the places of those of answers and their ends."""
    ids, places = [], set()
    for turn in fields["messages"]:
        before = tokenizer(f"<s>{turn['role']}\n", add_special_tokens=False)["input_ids"]
        said = tokenizer(f"{turn['content']}<pad>", add_special_tokens=False)["input_ids"]
        if turn["role"] == "assistant":
            places |= set(range(len(ids) + len(before), len(ids) + len(before) + len(said)))
        ids += before + said + tokenizer("\n", add_special_tokens=False)["input_ids"]
    return ids[: max(places) + 1], places


def test_what_is_stored_is_what_was_encoded(made):
    database, records, tokenizer = made
    stored = database._table.snapshot().encoded(list(records))
    for name in ("long", "middle", "double"):
        found = encoded(records[name], tokenizer)
        assert stored[name] == dataclasses.replace(found, sample_id=name) and found.places is not None
        shown = database.show(name)
        assert shown.tokens == len(shown.token_offsets) == found.response_tokens
    assert stored["single"].places is stored["pair"].places is None
    assert database.verify().findings == ()
    assert rapidin_vdb.open(database.path).query("What is snow?", "It is ice.", top_k=1)[0].searched == 5
    assert not any("_loss_places" in column for column in database._table.snapshot().columns)
    assert "_loss_places" not in database.show("long").metadata
    assert database.info().made_with["turns"] == "all"


def test_a_damaged_place_is_found(made):
    """The checksum of a row covers the places, too."""
    snapshot = made[0]._table.snapshot()
    for row, vector, wanted in snapshot.whole_rows():
        assert row["checksum"] == wanted
        if row["sample_id"] == "long":
            row["_loss_places"][3] += 1
            assert snapshot._checksum(row, vector) != wanted
            row["_loss_places"] = None
            assert snapshot._checksum(row, vector) != wanted


def test_turns_behind_the_last_token_are_read_by_their_roles():
    """Of a conversation that was cut, whose last turn is an answer."""
    text = "Hi.\n\nuser: A\n\nnote: b\n\nassistant: B\n\nuser: c"
    turns = [(turn.role, turn.content) for turn in taken_apart(text, [(0, 3), (3, 3)])]
    assert turns == [("assistant", "Hi."), ("user", "A\n\nnote: b"), ("assistant", "B\n\nuser: c")]
    assert len(taken_apart(text, [(0, 3), (3, len(text) - 1)])) == len(taken_apart("Hi.", [(0, 3)])) == 1


def test_what_was_lost_of_a_record_changes_no_loss(made, tmp_path):
    """A record with a list cannot be restored, but what is made of it has the same loss, by the places of tokens."""
    database, _, _ = made
    one, looks = ("user", "Hi"), "Red.\n\nuser: no\n\nassistant: yes"
    records = [
        talk(TALK[2:], id="begins"),
        {"id": "a pair", "prompt": "Hi", "response": looks},
        talk([one, ("assistant", looks)], id="quoted at the end"),
        talk([one, ("assistant", looks), one, ("assistant", "Bye.")], id="quoted before"),
        talk([one, ("assistant", "Looking."), ("ipython", "secret: 42"), ("assistant", "42.")], id="another role"),
        talk([one, ("assistant", "Looking."), ("assistant", "Still."), one, ("assistant", "42.")], id="two in a row"),
        {"id": "text", "text": looks},
    ]
    for number, record in enumerate(records):
        record |= {"tags": ["a"], "number": number}
    database.ingest(write_jsonl(tmp_path / "listed.jsonl", records))
    written = [record for _, record, exact in database.each_record(where="number IS NOT NULL") if not exact]
    assert len(written) == len(records)
    before = database._table.snapshot().encoded([record["id"] for record in records])
    database.delete(where="number IS NOT NULL")
    database.ingest(write_jsonl(tmp_path / "again.jsonl", written))
    after = database._table.snapshot().encoded([record["id"] for record in records])
    for name, found in after.items():
        assert found == before[name], name
    database.delete(where="number IS NOT NULL")


def test_records_come_back(made):
    """Also one whose answer looks like a turn."""
    database, records, _ = made
    found = {name: (record, exact) for name, record, exact in database.each_record()}
    assert found == {name: (record, True) for name, record in records.items()}


def test_rapidgrads_of_tokens_sum_to_the_samples(made):
    database, records, _ = made
    tokens = database._table.tokens.snapshot()
    sums = {name: np.zeros(128) for name in records}
    counts = dict.fromkeys(records, 0)
    for row, vector, _ in tokens.whole_rows():
        sums[row["sample_id"]] += vector.astype(float)
        counts[row["sample_id"]] += 1
    for name in records:
        whole = database._table.snapshot().vector_of(name).astype(float).reshape(128, 2).sum(1)
        assert np.linalg.norm(sums[name] - whole) < 5e-3 * np.linalg.norm(whole), name
        assert counts[name] == database.show(name).tokens
    (ranking,) = database.query("What is snow?", "It is ice.", level="token", top_k=5)
    assert all(result.text in database.show(result.sample_id).response for result in ranking.results)


def test_a_batch_gives_what_each_sample_gives_alone(made):
    database, records, _ = made
    maker = database._loaded().maker
    batch = list(database._table.snapshot().encoded(sorted(records)).values())
    for sample, (vector, loss) in zip(batch, maker.make_batch(batch), strict=True):
        alone, its_loss = maker.make(sample)
        assert loss == pytest.approx(its_loss, rel=1e-5)
        assert np.linalg.norm(vector - alone) < 1e-4 * np.linalg.norm(alone)


def test_answers_without_a_loss_are_not_told_as_turns_of_another_database(made, tmp_path):
    database, _, _ = made
    fields = talk(id="weighed")
    fields["messages"][2]["weight"] = 0
    path = write_jsonl(tmp_path / "weighed.jsonl", [fields])
    assert database.ingest(path, dry_run=True).earlier_turns == 0


def test_all_turns_need_the_chat_template(tmp_path, models, monkeypatch):
    """Which is said before the model is loaded, as a template that is not there is."""
    monkeypatch.setattr("rapidin_vdb.creation.load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(SpecError, match="--template nowhere.jinja: no such file"):
        rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), template="nowhere.jinja", width=16)
    for template in ("alpaca", "text"):
        with pytest.raises(SpecError, match=f"--turns all goes with --template chat.*it is {template}"):
            rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), template=template, turns="all", width=16)
    assert not (tmp_path / "db").exists()


def test_databases_of_the_last_turn_are_as_before(tmp_path, models):
    database = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), parameters="norm", width=16)
    assert "_loss_places" not in database._table.snapshot().schema.names
    assert database.fingerprint.loss == LOSSES["last"] == "mean cross-entropy over the response tokens"


def test_the_page_and_the_terminal_show_all_answers(made, capsys):
    """Every token's text stands in the pieces that are coloured, and turns between answers belong to no token."""
    database, _, _ = made
    (ranking,) = database.query("What is snow?", "It is ice.", where="sample_id = 'long'", tokens=True)
    (shown,) = with_pieces(ranking)["results"]
    (result,) = ranking.results
    assert "".join(text for text, _ in shown["pieces"]) == result.response
    plain = [text for text, tokens in shown["pieces"] if not tokens]
    assert plain == ["\n\nuser: What is snow?\n\nassistant: ", "\n\nuser: And rain?\n\nassistant: "]
    # What ends an answer stands where it ends, that of the last one at the end of the text.
    ends = [place for place, (text, _) in enumerate(shown["pieces"]) if not text]
    assert [shown["pieces"][place + 1][0] for place in ends] == plain
    assert shown["ends"] == [len(result.tokens) - 1]
    spans = [[token.start, token.end] for token in result.tokens]
    for place in ends:
        (number,) = shown["pieces"][place][1]
        before = sum(len(text) for text, _ in shown["pieces"][:place])
        assert spans[number] == [before, before]
    show.sample(database.show("long"), as_json=False)
    assert "assistant: It is ice." in capsys.readouterr().out
