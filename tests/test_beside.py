"""What a record says beside its conversation, in `system` and `history`: turns where a template writes them."""

import hashlib
import json
import logging

import pyarrow.parquet
import pytest
from conftest import byte_tokenizer, save_chat_model, write_jsonl
from test_answers import said_by
from test_chat import ASKING, PLAIN, tokenizer_with

import rapidin_vdb
from rapidin_vdb.cli import show
from rapidin_vdb.corpus import Record, as_written, encode, load_template, read_corpus, sample_from
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.query import read_queries

SYSTEM = "Be kind."
PAIRS = [["Hi", "Hello, é黄!"], ["And snow?", "Ice."]]


def turns(*said: str) -> list[dict]:
    """Return turns by what they say, as `user: Hi`."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in said]


ASKED = turns("user: Add\n1 2", "assistant: 3")
EARLIER = turns("user: Hi", "assistant: Hello, é黄!", "user: And snow?", "assistant: Ice.")
FIRST = turns(f"system: {SYSTEM}")
ADD = {"instruction": "Add", "input": "1 2", "output": "3"}
SAY = {"prompt": "Add\n1 2", "response": "3"}
FORMS = [
    ({"messages": ASKED, "system": SYSTEM}, FIRST + ASKED),
    ({"messages": json.dumps(EARLIER + ASKED), "system": SYSTEM}, FIRST + EARLIER + ASKED),
    ({"prompt": ASKED[:1], "completion": ASKED[1:], "system": SYSTEM}, FIRST + ASKED),
    (ADD | {"system": SYSTEM, "history": PAIRS}, FIRST + EARLIER + ASKED),
    (ADD | {"system": SYSTEM, "history": []}, FIRST + ASKED),
    (ADD | {"system": "", "history": PAIRS}, EARLIER + ASKED),
    (SAY | {"system": SYSTEM}, FIRST + ASKED),
    (SAY | {"history": json.dumps(PAIRS), "system": None}, EARLIER + ASKED),
    # Nothing to add, or nothing that is known.
    (SAY | {"system": " \n", "history": "[]"}, ASKED),
    (SAY | {"system": 3, "history": [["Hi"]]}, ASKED),
    (SAY | {"history": [["Hi", None]]}, ASKED),
    (SAY | {"history": '[["Hi", "\\ud800"]]'}, ASKED),
    (SAY | {"history": "[of Rome"}, ASKED),
    # A turn of its own stays the only one.
    ({"messages": FIRST + ASKED, "system": "Be quick."}, FIRST + ASKED),
    ({"messages": turns("developer: Be kind.") + ASKED, "system": "Be quick."}, turns("developer: Be kind.") + ASKED),
    ({"prompt": FIRST + ASKED[:1], "completion": "3", "system": "Be quick."}, FIRST + ASKED),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": SYSTEM},
     FIRST + turns("user: Hi", "assistant: Ho")),
    # History is what was said before a text, not before other turns.
    ({"messages": ASKED, "history": PAIRS}, ASKED),
]  # fmt: skip


def sample_of(fields, **options):
    return sample_from(Record(location="here", fields=fields), **options)


def encoded(sample, template):
    tokenizer = template.tokenizer or byte_tokenizer()
    (found,) = encode([sample], tokenizer=tokenizer, template=template, max_tokens=9999)
    if isinstance(found, CorpusError):
        raise found
    return found


def chat(template=PLAIN + ASKING):
    return load_template("chat", tokenizer=tokenizer_with(template))


@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize(("fields", "messages"), FORMS, ids=lambda value: json.dumps(value)[:60])
def test_the_text_is_that_of_all_turns(fields, messages, which):
    template, sample = chat(), sample_of(fields, turns=which)
    found = encoded(sample, template)
    wanted = template.tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert template.tokenizer.decode(found.input_ids) == wanted
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if which == "last" or "completion" in fields:
        answers = answers[-1:]
    assert said_by(found, template.tokenizer) == "".join(f"{answer}<|im_end|>" for answer in answers)
    # It is stored as a record that has them among its messages.
    written, plain = as_written(sample, found), sample_of({"messages": messages}, turns=which)
    if "completion" not in fields:
        assert (written.prompt, written.response) == (plain.prompt, plain.response)
        assert (written.messages, written.turns) == (plain.messages, plain.turns)
    assert written.prompt.startswith("system: Be kind.\n\nuser: ") == (messages[0]["role"] == "system")
    unsaid = {name: value for name, value in fields.items() if name in ("system", "history") and "Be kind." != value}
    unsaid = {
        name: value for name, value in unsaid.items() if isinstance(value, str | int) and value != json.dumps(PAIRS)
    }
    assert dict(written.metadata) == unsaid, "what is written is no column"


def test_ids_are_those_of_the_record_and_contents_say_what_was_written():
    template = chat()

    def of(fields):
        sample = sample_of(fields)
        text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
        identity = json.dumps([text, "train", None], ensure_ascii=False)
        digests = [hashlib.sha256(value.encode()).hexdigest()[:32] for value in (text, identity)]
        plain, whole = (as_written(sample, encoded(sample, one)) for one in (load_template("alpaca"), template))
        assert sample.sample_id == plain.sample_id == whole.sample_id == digests[0]
        assert plain.content_hash == digests[1], "where they have no part in it, all is as it was before"
        return whole.content_hash == digests[1]

    assert of(SAY) and of(ADD) and of(SAY | {"system": "", "history": []}) and of({"messages": ASKED})
    assert of(SAY | {"history": [["Hi"]]})
    assert not of(SAY | {"system": SYSTEM}) and not of(ADD | {"history": PAIRS})
    assert not of({"messages": ASKED, "system": SYSTEM})
    both = [sample_of(SAY | {"system": SYSTEM, "history": json.dumps(value)}).content_hash for value in ([], PAIRS)]
    assert len(set(both)) == 2
    # A field that names samples says nothing.
    assert sample_of(SAY | {"system": "s1"}, id_field="system").messages == sample_of(SAY).messages


@pytest.mark.parametrize("name", ["alpaca", "text", "jinja", "before"])
def test_a_template_of_one_prompt_leaves_them_out(tmp_path, name):
    (tmp_path / "t.jinja").write_text("{{ prompt }}{% for turn in messages %}-{{ turn.content }}{% endfor %}: ")
    template = load_template(str(tmp_path / "t.jinja") if name == "jinja" else name) if name != "before" else None
    if name == "before":
        tokenizer = tokenizer_with(PLAIN + ASKING)
        template = load_template("chat", tokenizer=tokenizer, text=tokenizer.chat_template)
    for fields in (SAY | {"system": SYSTEM, "history": json.dumps(PAIRS)}, {"messages": ASKED, "system": SYSTEM}):
        sample, bare = sample_of(fields), sample_of({"messages": ASKED})
        assert len(sample.messages) > 1
        found, wanted = encoded(sample, template), encoded(bare, template)
        assert found.input_ids == wanted.input_ids and found.response is None
        assert template.render(sample) == template.render(bare) and template.end(sample) == ""
        written = as_written(sample, found)
        assert (written.prompt, written.messages) == (bare.prompt, bare.messages)
        assert dict(written.metadata) == {key: fields[key] for key in ("system", "history") if key in fields}
    with pytest.raises(CorpusError, match="two fields would both be the column 'system'"):
        sample_of(SAY | {"System": "x", "system": SYSTEM})


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN + ASKING
CALLING = PLAIN.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}"
)


@pytest.mark.parametrize("which", ["last", "all"])
def test_a_template_that_refuses_them_leaves_them_out(which):
    template = chat(REFUSING)
    for fields, bare in (
        (SAY | {"system": SYSTEM, "history": PAIRS}, {"messages": ASKED}),
        ({"messages": EARLIER + ASKED, "system": SYSTEM}, {"messages": EARLIER + ASKED}),
    ):
        sample, plain = sample_of(fields, turns=which), sample_of(bare, turns=which)
        found, wanted = encoded(sample, template), encoded(plain, template)
        assert (found.input_ids, found.loss_places) == (wanted.input_ids, wanted.loss_places)
        written = as_written(sample, found)
        assert (written.prompt, written.response, written.turns) == (plain.prompt, plain.response, plain.turns)
        if which == "last":  # as of a query
            assert template.end(sample) == "<|im_end|>"
    # One that is among the turns is refused, as ever.
    with pytest.raises(CorpusError, match="no system role"):
        encoded(sample_of({"messages": FIRST + ASKED}), template)


def test_answers_that_call_tools_have_them_too():
    template = chat(CALLING + ASKING)
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    sample = sample_of({"messages": [*ASKED[:1], call], "system": SYSTEM})
    found = encoded(sample, template)
    assert template.tokenizer.decode(found.input_ids).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    written = as_written(sample, found)
    assert (written.prompt, written.response) == ("system: Be kind.\n\nuser: Add\n1 2", "<add>")
    with pytest.raises(CorpusError, match="no system role"):
        encoded(sample, chat(REFUSING))


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    folder, _ = save_chat_model(tmp_path_factory.mktemp("beside") / "model", begin="<s>")
    return folder


def made(tmp_path, model, template, **options):
    return rapidin_vdb.init(
        tmp_path / "db", model=str(model), parameters="norm", width=64, template=template, **options
    )


RECORDS = [
    {"id": "pair"} | ADD | {"system": SYSTEM, "history": PAIRS},
    {"id": "said"} | {"messages": ASKED, "system": "Be quick."},
    {"id": "plain"} | ADD | {"system": "", "history": []},
    {"id": "twice", "text": "Be kind. Always.", "system": SYSTEM},
]


def told(caplog):
    return [message for message in caplog.messages if "has no part in their text" in message]


@pytest.mark.parametrize("template", ["alpaca", "text", "t.jinja"])
def test_what_has_no_part_is_told_before_the_first_gradient(tmp_path, models_of, caplog, monkeypatch, template):
    (tmp_path / "t.jinja").write_text("{{ prompt }}: ")
    database = made(tmp_path, models_of, str(tmp_path / template) if template.endswith("jinja") else template)
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    when = []
    monkeypatch.setattr(
        "rapidin_vdb.engine.Engine.make",
        lambda self, batch, **_: when.append(len(told(caplog))) or self._make(batch, None),
    )
    for dry_run in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="rapidin_vdb"):
            database.ingest(path, dry_run=dry_run)
        (message,) = told(caplog)
        assert message == (
            "2 of the samples to write have a field whose content has no part in their text, nor in their gradients, "
            f"the first in {path}, line 1: system and history. If the model was trained with it, make the database with "
            "--template chat, or with a Jinja file that writes the field"
        )
    assert when and set(when) == {1}, "before any of it was sketched"
    assert database.show("pair").metadata == {"system": SYSTEM} and database.show("pair").prompt == "Add\n1 2"
    caplog.clear()
    assert database.ingest(path).unchanged == 4
    assert not told(caplog), "of what is to be written alone"


def test_a_jinja_file_that_reads_a_field_loses_nothing(tmp_path, models_of, caplog):
    (tmp_path / "t.jinja").write_text(
        "{% if system is defined %}[{{ system | upper }}]{% endif %}"
        "{% for asked, said in history or [] %}{{ asked }}>{{ said }};{% endfor %}{{ prompt }}: "
    )
    database = made(tmp_path, models_of, str(tmp_path / "t.jinja"))
    path = write_jsonl(tmp_path / "a.jsonl", [RECORDS[0]])
    database.ingest(path)
    assert not told(caplog)
    (row,) = database._table.snapshot().encoded(["pair"]).values()
    assert byte_tokenizer().decode(row.input_ids) == "<s>[BE KIND.]Hi>Hello, é黄!;And snow?>Ice.;Add\n1 2: 3</s>"


@pytest.mark.parametrize("which", ["last", "all"])
def test_a_chat_template_tells_nothing_but_what_it_cannot_say(tmp_path, models_of, caplog, which):
    database = made(tmp_path, models_of, "chat", turns=which)
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            *RECORDS[:3],
            {"id": "own", "messages": FIRST + ASKED, "system": f" {SYSTEM}"},
            {"id": "another", "messages": FIRST + ASKED, "system": "Be quick."},
            {"id": "odd", "history": [{"role": "user", "content": "Hi"}]} | SAY,
        ],
    )
    report = database.ingest(path)
    (message,) = told(caplog)
    assert message.startswith("2 of the samples to write") and f"the first in {path}, line 5: system." in message
    assert message.endswith("If the model was trained with it, give all that it read as turns (messages)")
    assert report.earlier_turns == (1 if which == "last" else 0)
    stored, said = database.show_turns("pair")
    assert [{"role": turn.role, "content": turn.content} for turn in said] == FIRST + EARLIER + ASKED
    assert stored.metadata == {}
    if which == "last":
        assert stored.prompt == "system: Be kind.\n\n" + "\n\n".join(
            f"{turn['role']}: {turn['content']}" for turn in EARLIER + ASKED[:1]
        )


def test_a_query_of_the_same_record_is_the_same_text(tmp_path, models_of):
    database = made(tmp_path, models_of, "chat")
    database.ingest(write_jsonl(tmp_path / "a.jsonl", RECORDS[:3]))
    lines = [
        {"prompt": "Add\n1 2", "generation": "3", "system": SYSTEM, "history": PAIRS},
        {"messages": ASKED[:1], "generation": "3", "system": "Be quick."},
        {"prompt": "Add\n1 2", "generation": "3"},
    ]
    path = write_jsonl(tmp_path / "queries.jsonl", lines)
    wanted = [FIRST + EARLIER + ASKED, turns("system: Be quick.") + ASKED, ASKED]
    hand = write_jsonl(tmp_path / "by hand.jsonl", [{"messages": messages} for messages in wanted])
    found, same = (database.query(file=file, top_k=3) for file in (path, hand))
    assert [query.prompt for query in read_queries(path)] == [query.prompt for query in read_queries(hand)]
    for one, other, name in zip(found, same, ("pair", "said", "plain"), strict=True):
        scores = {result.sample_id: result.score for result in one.results}
        assert scores == {result.sample_id: result.score for result in other.results}
        # Gradients scaled by layer: of one text, the score is the largest that there can be.
        stored = database._table.snapshot().vector_of(name).astype("float32")
        assert scores[name] == pytest.approx(float(stored @ stored), rel=1e-3) == max(scores.values())
    assert len({one.results[0].score for one in found}) == 3, "they are three texts"


def test_what_was_ingested_without_them_is_other_content(tmp_path, models_of, monkeypatch, capsys):
    database = made(tmp_path, models_of, "chat")
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS[:3])
    with monkeypatch.context() as before:
        before.setattr("rapidin_vdb.corpus.shapes.turns_beside", lambda *_: ())
        assert database.ingest(path).added == 3
    assert database.show("pair").prompt == "Add\n1 2" and database.show("pair").metadata == {"system": SYSTEM}
    with pytest.raises(CorpusError, match=r"sample pair is in the database with other content \(in prompt, system\)"):
        database.ingest(path)
    assert database.ingest(path, on_duplicate="skip").kept == 2
    report = database.ingest(path, on_duplicate="replace")
    assert (report.replaced, report.unchanged) == (2, 1)
    assert database.show("said").prompt == "system: Be quick.\n\nuser: Add\n1 2"
    assert database.ingest(path).unchanged == 3
    show.sample(database.show("said"), as_json=False)
    assert "system: Be quick." in capsys.readouterr().out


def test_parquet_and_clean_know_the_records(tmp_path, models_of):
    database = made(tmp_path, models_of, "chat")
    records = [{name: value for name, value in record.items() if name != "id"} for record in (RECORDS[0], RECORDS[2])]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert database.ingest(path).added == 2
    assert database.count("prompt LIKE 'system: Be kind.%user: Hi%assistant: Ice.%user: Add%'") == 1
    for sample in read_corpus([path]):
        assert database.show(sample.sample_id).response == "3"
    report = database.clean(path, out=tmp_path / "b.jsonl", where="prompt LIKE 'system: %'")
    assert (report.written, report.left_out) == (1, 1)
    (line,) = (tmp_path / "b.jsonl").read_text().splitlines()
    assert json.loads(line) == records[1]
