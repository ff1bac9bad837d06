"""Conversations as a model is fine-tuned on them: what `apply_chat_template` makes of all of one, answer included."""

import datetime
import hashlib
import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, save_chat_model, save_model, toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.cli.ingest import ingested
from rapidin_vdb.corpus import Record, encode, load_template, sample_from
from rapidin_vdb.errors import CorpusError, FingerprintError, ModelError, SpecError
from rapidin_vdb.gradient import generation

LOOP = "{% for m in messages %}"
PLAIN = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "as it is": PLAIN + ASKING,
    "trimmed": PLAIN.replace("m.content", "m.content | trim") + ASKING,
    "its own beginning": "<s>" + PLAIN + ASKING,
    "a line before the beginning": "\n<s>" + PLAIN + ASKING,
    "another end": PLAIN.replace("<|im_end|>", "</s>") + ASKING,
    "spaces around": LOOP + "{% if m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}",
    "an empty thought": LOOP
    + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASKING,
    "a system prompt": "<|im_start|>system\nHelp.<|im_end|>\n" + PLAIN + ASKING,
    "an end that is no end": PLAIN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}",
}  # fmt: skip
ANSWERS = (
    "Snow is white.",
    "  two\n lines \n",
    "é黄🏳️‍🌈",
    "assistant",
    "user\nHelp.",
    "<|im_end|> is the end",
    "think",
    "[/INST]",
)


def tokenizer_with(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def talk(answer: str, **more):
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "What is snow?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": [*messages, {"role": "assistant", "content": answer, **more}]}


def encoded(fields, tokenizer, text=None):
    sample = sample_from(Record(location="here", fields=fields))
    template = load_template("chat", tokenizer=tokenizer, text=text)
    (result,) = encode([sample], tokenizer=tokenizer, template=template, max_tokens=999)
    if isinstance(result, CorpusError):
        raise result
    return result


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_tokens_are_those_of_fine_tuning(name, answer):
    tokenizer, fields = tokenizer_with(TEMPLATES[name]), talk(answer)
    found = encoded(fields, tokenizer)
    wanted = list(tokenizer.apply_chat_template(fields["messages"], tokenize=True, return_dict=False))
    # What stands behind the end of an answer has no part in it.
    assert list(found.input_ids) == wanted[: len(found.input_ids)]
    left = tokenizer.decode(wanted[len(found.input_ids) :])
    assert left.strip() in ("", "</s>") and found.input_ids[-1] in tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "</s>"]
    )
    # Every token with a loss stands where it says in the answer; what ends it stands nowhere.
    spans = [span for span in found.offsets if span[0] < len(answer)]
    ids = found.input_ids[len(found.input_ids) - len(found.offsets) :]
    said = answer.strip() if "trim" in TEMPLATES[name] else answer
    for (start, end), token in zip(spans, ids, strict=False):
        text = tokenizer.convert_ids_to_tokens(token)
        shown = tokenizer.decode([token])
        assert shown == answer[start:end] or "\ufffd" in shown or text in ("<|im_end|>",), (text, answer[start:end])
    assert tokenizer.decode(ids[: len(spans)]) == said and spans[0][0] == answer.index(said[0])
    assert set(found.offsets[len(spans) :]) == {(len(answer), len(answer))}
    assert spans[-1][1] == answer.index(said[0]) + len(said)


def test_an_answer_that_the_template_rewrites_follows_what_the_model_goes_on_from():
    tokenizer = tokenizer_with(PLAIN.replace("m.content", "m.content.split('</think>')[-1]") + ASKING)
    found = encoded(talk("<think>no</think>yes"), tokenizer)
    assert tokenizer.decode(found.input_ids).endswith("assistant\n<think>no</think>yes<|im_end|>")
    assert found.offsets[0] == (0, 1) and found.offsets[-2:] == ((19, 20), (20, 20))


def test_a_template_without_an_end_has_the_end_of_sequence():
    tokenizer = tokenizer_with(LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}")
    found = encoded(talk("yes"), tokenizer)
    assert tokenizer.decode(found.input_ids).endswith("assistant: yes</s>")


def test_one_without_a_prompt_is_a_text_as_ever():
    found = encoded({"text": "yes"}, tokenizer_with(TEMPLATES["as it is"]))
    assert found.input_ids == (*byte_tokenizer()("yes")["input_ids"], 2)


def test_days_do_not_count():
    forms = "%d %b %Y, %B %-d, %Y-%m-%d"
    tokenizer = tokenizer_with("{% set day = strftime_now('" + forms + "') %}{{ day }}\n" + PLAIN + ASKING)
    text = tokenizer.decode(encoded(talk("yes"), tokenizer).input_ids)
    assert text.startswith(datetime.datetime(2024, 7, 26).strftime(forms) + "\n<|im_start|>system\nBe kind.")


def test_calls_of_tools_are_handed_to_the_template():
    tokenizer = tokenizer_with(
        "{{ tools | tojson }}" + LOOP + "<|im_start|>{{ m.role }}{{ m.name }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "{% endif %}: {{ m.content }}<|im_end|>\n{% endfor %}" + ASKING
    )  # fmt: skip
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "1 + 1?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    found = encoded({"messages": messages, "tools": tools}, tokenizer)
    text = tokenizer.decode(found.input_ids)
    assert text == json.dumps(tools) + (
        "<|im_start|>userAnn: 1 + 1?<|im_end|>\n<|im_start|>assistantadd: <|im_end|>\n<|im_start|>tool: 2<|im_end|>\n"
        "<|im_start|>assistant: two<|im_end|>"
    )


def test_turns_that_the_template_leaves_out_are_told(tmp_path, capsys):
    model, tokenizer = save_chat_model(tmp_path / "model", begin="<s>")
    tokenizer.chat_template = (
        LOOP
        + "{% if m.role in ('user', 'assistant') %}"
        + PLAIN.removeprefix(LOOP).replace("{% endfor %}", "{% endif %}{% endfor %}")
        + ASKING
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content.split('</think>')[-1]")
    tokenizer.save_pretrained(model)
    for turns in ("last", "all"):
        database = rapidin_vdb.init(
            tmp_path / turns, model=str(model), width=64, template="chat", turns=turns, parameters="norm"
        )
        said = [("user", "a"), ("asistant", "b"), ("user", "c"), ("assistant", "d")]
        whole = [{"role": role.replace("asis", "assis"), "content": content} for role, content in said]
        records = [
            {"id": "whole", "messages": whole},
            {"id": "misspelt", "messages": [{"role": role, "content": content + "!?"} for role, content in said]},
            {"id": "again", "messages": [{"role": "tool", "content": "of no use"}, *whole]},
            {"id": "thought", "messages": [{"role": "user", "content": "<think>why</think>a"}, *whole[1:]]},
        ]
        path = write_jsonl(tmp_path / "a.jsonl", records)
        expected, report = database.ingest(path, dry_run=True), database.ingest(path)
        where = f"{path}, line 2: messages[1] (role asistant)"
        assert (
            (expected.unwritten, expected.first_unwritten) == (report.unwritten, report.first_unwritten) == (2, where)
        )
        ingested(report)
        assert (
            f"2 of them have a turn that the template does not write as it is, so that it has no part in their gradients: {where}"
            in capsys.readouterr().err
        )
        assert database.ingest(path).unwritten == 0


def test_a_file_may_write_a_prompt_in_parts(tmp_path):
    (tmp_path / "a.jinja").write_text("{{ instruction }}: {{ input }}!")
    fields = {"instruction": "Add", "input": "1 2", "output": "3"}
    sample = sample_from(Record(location="here", fields=fields))
    template = load_template(str(tmp_path / "a.jinja"))
    (found,) = encode([sample], tokenizer=byte_tokenizer(), template=template, max_tokens=99)
    assert sample.prompt == "Add\n1 2" and found.unwritten == ""


def test_tools_of_a_record_of_texts_are_a_field_like_any_other():
    """Its turns are ours: what its field `tools` holds need be no tools, nor `conversations` its turns."""
    tokenizer = tokenizer_with("{{ tools | tojson if tools }}" + TEMPLATES["as it is"])
    text, more = {"prompt": "a", "response": "b"}, {"tools": "hammer", "conversations": [{"from": "gpt", "value": "c"}]}
    assert encoded(text | more, tokenizer).input_ids == encoded(text, tokenizer).input_ids


@pytest.mark.parametrize("name", ["tool_calls", "reasoning_content"])
def test_what_an_answer_says_beside_its_content_is_not_lost(name):
    with pytest.raises(
        CorpusError, match=f"here: the response has {name}, which would be lost: this template does not write"
    ):
        encoded(talk("yes", **{name: [{"name": "x"}]}), tokenizer_with(TEMPLATES["as it is"]))


@pytest.mark.parametrize("what", ["messages[9].content", "1 // 0", "messages + 1", "raise_exception('no')"])
def test_a_template_that_fails_is_told(what):
    with pytest.raises(CorpusError, match="here: the chat template refuses this conversation: "):
        encoded(talk("yes"), tokenizer_with("{% set x = " + what + " %}" + TEMPLATES["as it is"]))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"text": "<s>a b</s>"}, "<s>a b</s>"),
        ({"prompt": "<s>a", "response": " b"}, "<s>a b</s>"),
        ({"prompt": "a", "response": " b</s>"}, "<s>a b</s>"),
        ({"prompt": "a", "response": "</s> b"}, "<s>a</s> b</s>"),
    ],
)
def test_nothing_begins_or_ends_twice(fields, wanted):
    tokenizer = byte_tokenizer()
    (found,) = encode(
        [sample_from(Record(location="here", fields=fields))], tokenizer=tokenizer, template=load_template("text"),
        max_tokens=99,
    )  # fmt: skip
    assert tokenizer.decode(found.input_ids) == wanted


def test_databases_of_before_go_on_as_they_were(tmp_path, monkeypatch):
    """Their fingerprint has the template alone: prompt, response, end-of-sequence token."""
    folder, tokenizer = save_chat_model(tmp_path / "model")
    old = load_template("chat", tokenizer=tokenizer, text=tokenizer.chat_template)
    new = load_template("chat", tokenizer=tokenizer)
    assert old.text == tokenizer.chat_template != new.text and new.text.startswith(old.text)
    assert load_template("chat", tokenizer=tokenizer, text=new.text).text == new.text
    for name, template in (("old", old), ("new", new)):
        monkeypatch.setattr("rapidin_vdb.creation.load_template", lambda *_, template=template, **__: template)
        made = rapidin_vdb.init(tmp_path / name, model=str(folder), parameters="norm", width=16, template="chat")
        monkeypatch.undo()
        made.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(2)))
        opened = rapidin_vdb.open(tmp_path / name)
        assert opened.fingerprint.template_text == template.text
        assert opened.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(1, first=5))).added == 1
        found = opened._table.snapshot().encoded(["toy-001"])["toy-001"]
        text = tokenizer.decode(found.input_ids)
        assert text.endswith("\nblue 7</s>" if name == "old" else "\nblue 7<pad>")
        assert text.startswith("<s>") == (name == "old")
        assert opened.query("Say 1", "blue 7")[0].results[0].sample_id == "toy-001"
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(folder)
    for name in ("old", "new"):
        with pytest.raises(FingerprintError, match="template_text is"):
            rapidin_vdb.open(tmp_path / name).query("Say 1", "blue 7")


def test_earlier_turns_without_a_gradient_are_told(tmp_path, capsys):
    folder, _ = save_chat_model(tmp_path / "model")
    database = rapidin_vdb.init(tmp_path / "db", model=str(folder), parameters="norm", width=16, template="chat")
    once = {"messages": talk("Snow is grey.")["messages"][3:]}
    path = write_jsonl(tmp_path / "talks.jsonl", [talk("Snow is white."), once, talk("Snow is blue.")])
    expected, report = database.ingest(path, dry_run=True), database.ingest(path)
    assert expected.earlier_turns == report.earlier_turns == 2
    ingested(report)
    assert "2 of them have earlier turns of the assistant, which have no gradient" in capsys.readouterr().err
    assert database.ingest(path).earlier_turns == 0


def test_turns_before_a_generation_are_asked_as_they_were_learned(tmp_path):
    """The nearest of a sample is itself; its prompt written as one text is another."""
    folder, _ = save_chat_model(tmp_path / "model")
    database = rapidin_vdb.init(tmp_path / "db", model=str(folder), parameters="norm", width=64, template="chat")
    turns = talk("Snow is white.")["messages"]
    database.ingest(write_jsonl(tmp_path / "talks.jsonl", [{"id": "talk", "messages": turns}]))
    query = rapidin_vdb.query_from(None, turns[-1]["content"], messages=turns[:-1])
    (asked,) = database.query(queries=[query], refine=1)
    tensors = len(database.fingerprint.theta)
    assert asked.results[0].exact_score == pytest.approx(tensors, rel=1e-4), (
        "a gradient with itself, each tensor of norm 1"
    )
    assert query.prompt == database.show("talk").prompt
    (flat,) = database.query(query.prompt, turns[-1]["content"], refine=1)
    assert flat.results[0].exact_score < 0.999 * tensors
    with pytest.raises(SpecError, match="give one of both"):
        rapidin_vdb.query_from("Hi", "Hello.", messages=turns[:1])
    with pytest.raises(CorpusError, match="role and content"):
        rapidin_vdb.query_from(None, "Hello.", messages=[{"role": "user"}])


def test_generation_ends_where_an_answer_does(monkeypatch):
    """With the token that the template writes behind an answer, and without a second beginning."""
    tokenizer = tokenizer_with(TEMPLATES["its own beginning"])
    asked = {}

    class Model:
        config, device = None, torch.device("cpu")

        def generate(self, input_ids, eos_token_id, **options):
            asked.update(ids=input_ids[0].tolist(), ends=eos_token_id)
            end = tokenizer.convert_tokens_to_ids("<|im_end|>")
            return torch.cat([input_ids, torch.tensor([[40, 41, end, 0]])], 1)

    template = load_template("chat", tokenizer=tokenizer)
    sample = sample_from(Record(location="here", fields={"prompt": "Hi", "generation": "?"}))
    assert template.end(sample) == "<|im_end|>"
    ids = generation._prompt_ids(tokenizer, template.render(sample), special=not template.whole)
    (said,) = generation._continued(
        Model(), tokenizer, [ids], max_tokens=9, temperature=0.0, seed=0, end=template.end(sample)
    )
    assert asked["ids"] == list(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
        )
    )
    assert asked["ends"] == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert (said.text, said.cut) == (tokenizer.decode([40, 41]), False)


def test_another_template_than_the_tokenizer_s_is_told(tmp_path, models, caplog):
    """Whoever forgets it gets gradients of texts that the model was not tuned on."""
    folder, _ = save_chat_model(tmp_path / "model")
    (tmp_path / "t.jinja").write_text("{{ prompt }}")
    for number, (model, template, told) in enumerate(
        [
            (folder, "alpaca", True), (folder, "text", True), (folder, "chat", False),
            (folder, str(tmp_path / "t.jinja"), False), (models["llama"], "alpaca", False),
        ]
    ):  # fmt: skip
        caplog.clear()
        rapidin_vdb.init(
            tmp_path / f"db{number}", model=str(model), width=64, template=template, parameters="norm", device="cpu"
        )
        said = [record.getMessage() for record in caplog.records if "has a chat template" in record.getMessage()]
        assert (len(said) == 1 and f"written by the template {template}," in said[0]) if told else said == []


def test_a_space_before_a_response_is_the_prompts(tmp_path):
    """Tokenizers that leave it out of a token's place, as RoBERTa's, would count its token to the response."""
    from tokenizers import processors

    from rapidin_vdb.gradient import load_tokenizer

    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), backend.post_processor])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer("a b")["input_ids"] == loaded("a b")["input_ids"]
    sample = sample_from(Record(location="here", fields={"prompt": "a ", "response": "b c"}))
    (found,) = encode([sample], tokenizer=loaded, template=load_template("text"), max_tokens=99)
    assert found.offsets == ((0, 1), (1, 2), (2, 3), (3, 3))
    (trimmed,) = encode([sample], tokenizer=tokenizer, template=load_template("text"), max_tokens=99)
    assert trimmed.offsets != found.offsets, "the toy is of that kind"


def test_what_is_left_of_a_training_changes_no_fingerprint(tmp_path, monkeypatch):
    """Nor does it in databases of before, whose hash took it in."""
    folder = save_model(tmp_path / "model", "llama")
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(2))
    options = {"model": str(folder), "parameters": "norm", "width": 16}
    rapidin_vdb.init(tmp_path / "clean", **options).ingest(corpus)
    clean = (folder / "tokenizer.json").read_text()
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(folder)
    assert '"truncation": {' in (folder / "tokenizer.json").read_text()
    with monkeypatch.context() as patch:
        made_with = []

        def of_before(tokenizer, *, known):
            text = [tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.bos_token_id]
            made_with.append(hashlib.sha256(json.dumps(text).encode()).hexdigest())
            return made_with[0]

        patch.setattr("rapidin_vdb.gradient.fingerprint.hash_of_tokenizer", of_before)
        rapidin_vdb.init(tmp_path / "before", **options).ingest(corpus)
    rapidin_vdb.init(tmp_path / "left", **options).ingest(corpus)
    hashes = {}
    for name in ("clean", "before", "left"):
        database = rapidin_vdb.open(tmp_path / name)
        assert database.query("Say 1", "blue 7")[0].results[0].sample_id == "toy-001"
        hashes[name] = database.fingerprint.tokenizer_hash
    assert hashes["clean"] == hashes["left"] != hashes["before"]
    # That of a tokenizer as it is has always been this.
    raw = byte_tokenizer()
    text = json.dumps([raw.backend_tokenizer.to_str(), raw.eos_token_id, raw.bos_token_id])
    assert hashes["clean"] == hashlib.sha256(text.encode()).hexdigest()
    (folder / "tokenizer.json").write_text(clean)
    assert rapidin_vdb.open(tmp_path / "left").query("Say 1", "blue 7")[0].results


def test_a_thought_that_is_begun_is_not_begun_twice():
    """R1's kind leaves out the thoughts of answers, and ends what asks for one with their beginning."""
    tokenizer = tokenizer_with(
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    texts = [
        tokenizer.decode(encoded(talk(answer), tokenizer).input_ids)
        for answer in ("<think>\nno</think>yes", "no</think>yes")
    ]
    assert texts[0] == texts[1] and texts[0].endswith("<|im_start|>assistant\n<think>\nno</think>yes<|im_end|>")


@pytest.mark.parametrize("kept", ["m.content | upper", "m.content[:3]", "m.content ~ m.content", "m.content | tojson"])
def test_answers_that_are_rewritten_end_with_the_end_of_sequence_at_least(kept):
    tokenizer = tokenizer_with(PLAIN.replace("m.content", kept) + ASKING)
    text = tokenizer.decode(encoded(talk("Snow is white.\nYes."), tokenizer).input_ids)
    assert text.endswith(("assistant\nSnow is white.\nYes.</s>", "assistant\nSnow is white.\nYes.<|im_end|>"))


def test_a_template_that_refuses_to_end_with_an_answer():
    refusal = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = tokenizer_with(refusal + PLAIN + ASKING)
    assert tokenizer.decode(encoded(talk("yes"), tokenizer).input_ids).endswith("assistant\nyes</s>")
    sample = sample_from(Record(location="here", fields=talk("yes")))
    assert load_template("chat", tokenizer=tokenizer).end(sample) == ""


def test_a_prompt_that_holds_the_mark_changes_nothing():
    from rapidin_vdb.corpus.written import _MARK

    tokenizer = tokenizer_with(TEMPLATES["as it is"])
    found = encoded({"prompt": f"{_MARK} {_MARK}{_MARK}", "response": "yes"}, tokenizer)
    assert tokenizer.decode(found.input_ids).endswith("assistant\nyes<|im_end|>")


@pytest.mark.parametrize("tools", [None, "", [], '[{"a": 1}]', [{"a": 1}]])
def test_tools_may_be_a_text(tools):
    tokenizer = tokenizer_with("{{ tools | tojson }}" + PLAIN + ASKING)
    text = tokenizer.decode(encoded(talk("yes") | {"tools": tools}, tokenizer).input_ids)
    assert text.startswith('[{"a": 1}]<|' if tools else "null<|")
    plain = tokenizer_with(TEMPLATES["as it is"])
    assert encoded(talk("yes") | {"tools": "nonsense"}, plain).input_ids == encoded(talk("yes"), plain).input_ids
    with pytest.raises(CorpusError, match="here: tools is a text that is no JSON: "):
        encoded(talk("yes") | {"tools": "nonsense"}, tokenizer)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_with_a_chat_template_of_its_own_is_told(tmp_path, adapters, place, caplog):
    folder, adapter = save_model(tmp_path / "model", "llama"), tmp_path / "adapter"
    shutil.copytree(adapters["llama"], adapter)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES["as it is"]
    tokenizer.save_pretrained(folder)
    options = {"model": str(folder), "adapter": str(adapter), "width": 64, "template": "chat"}

    def save(template):
        text = template if place.endswith("jinja") else json.dumps({"chat_template": template})
        (adapter / place).write_bytes(text.encode())

    save(TEMPLATES["trimmed"])
    with pytest.raises(ModelError, match="holds a chat template other than that of the model's tokenizer"):
        rapidin_vdb.init(tmp_path / "db", **options)
    assert not (tmp_path / "db").exists()
    byte_tokenizer().save_pretrained(folder)  # which has none
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="holds a chat template and the model's tokenizer has none"):
        rapidin_vdb.init(tmp_path / "db", **options)
    rapidin_vdb.init(tmp_path / "alpaca", **(options | {"template": "alpaca"}))
    assert "and the adapter's folder has a chat template: if the fine-tuning used that" in caplog.text
    tokenizer.save_pretrained(folder)
    # The same, as others write it.
    for same in (TEMPLATES["as it is"], TEMPLATES["as it is"].replace("\n", "\r\n")):
        save(same)
        rapidin_vdb.init(tmp_path / str(len(same)), **options)
    if place.endswith("json"):
        save([{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATES["as it is"]}])
        rapidin_vdb.init(tmp_path / "db", **options)


def test_what_an_adapter_says_of_its_model_and_end_of_sequence_is_told(tmp_path, models, adapters, caplog):
    adapter = shutil.copytree(adapters["llama"], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def told(end, base, template="alpaca"):
        (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        caplog.clear()
        rapidin_vdb.init(
            tmp_path / "dbs" / str(len(made)), model=str(models["llama"]), adapter=str(adapter), width=64,
            template=template,
        )  # fmt: skip
        made.append(base)
        return caplog.text

    made = []
    for end in ("<pad>", {"content": "<pad>"}):
        assert "names <pad> as the end of a sequence, and the model's tokenizer, which" in told(end, None)
    for same in ("someone/Llama", "someone/llama-bnb-4bit", "./", "out/checkpoint-20", "", None, str(models["llama"])):
        assert told("</s>", same) == ""
    for other in ("someone/llama-instruct", str(models["gpt2"]), "/x/models--org--other/snapshots/" + 40 * "0"):
        assert f"the adapter names {other} as the model that it was trained on, and is put on {models['llama']}" in told("</s>", other)  # fmt: skip


def test_a_conversation_as_plain_text_has_a_loss_at_all_of_it():
    """What docs/data.md says of trainers that take the loss of all tokens; against the tokenizer itself."""
    tokenizer = tokenizer_with(TEMPLATES["as it is"])
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = (*tokenizer(text).input_ids, tokenizer.eos_token_id)
    for name in ("chat", "alpaca", "text"):
        sample = sample_from(Record(location="here", fields={"text": text}))
        template = load_template(name, tokenizer=tokenizer)
        (one,) = encode([sample], tokenizer=tokenizer, template=template, max_tokens=512)
        assert one.input_ids == ids and len(one.offsets) == len(ids) - 1 and one.offsets[0][0] == 0
    assert len(encoded({"messages": turns}, tokenizer).offsets) < len(ids) - 1
