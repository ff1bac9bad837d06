"""Records of every format and shape; templates; tokens and their places in the text."""

import csv
import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import byte_tokenizer, toy_records, write_jsonl

from rapidin_vdb.corpus import Record, encode, load_template, read_corpus, read_records, sample_from
from rapidin_vdb.corpus.files import paths_of, read_lines
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.records import Encoded, Message

RECORDS = toy_records(5)


def sample(**fields):
    return sample_from(Record(location="here, line 1", fields=fields))


def as_dataset(folder):
    from datasets import Dataset

    Dataset.from_list(RECORDS).save_to_disk(str(folder))
    return folder


def as_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]))
        writer.writeheader()
        writer.writerows(RECORDS)
    return path


def as_gzip(path):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def as_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


def as_array(path):
    path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), "utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: write_jsonl(path, RECORDS)),
        ("a.jsonl.gz", as_gzip),
        ("a.json", as_array),
        ("lines.json", lambda path: write_jsonl(path, RECORDS)),
        ("a.csv", as_csv),
        ("a.parquet", as_parquet),
        ("saved", as_dataset),
    ],
)
def test_every_format_gives_the_same_samples(tmp_path, name, write):
    found = list(read_corpus([write(tmp_path / name)]))
    assert [(s.sample_id, s.prompt, s.response, s.split, s.source, s.metadata) for s in found] == [
        (r["id"], r["instruction"], r["output"], "train", r["source"], {"stars": r["stars"]}) for r in RECORDS
    ]


@pytest.mark.parametrize(
    ("fields", "prompt", "response", "metadata"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 2", "3", {}),
        ({"instruction": "Add", "input": "", "output": "3"}, "Add", "3", {}),
        ({"instruction": "Add", "input": None, "output": "3"}, "Add", "3", {}),
        ({"prompt": "P", "response": "R", "n": 1}, "P", "R", {"n": 1}),
        ({"prompt": "P", "completion": "R", "ok": True}, "P", "R", {"ok": True}),
        ({"text": "all of it", "score": 1.5}, None, "all of it", {"record_score": 1.5}),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "a.b": "c"},
            "hi",
            "ho",
            {"a_b": "c"},
        ),
        ({"text": "x", "": 1, "a`b": 2, "  ": None, 'q"': 3}, None, "x", {"unnamed": 1, "a_b": 2, "q_": 3}),
        ({"prompt": "P", "response": "R", "tags": ["a"], "extra": {"a": 1}, "nan": float("nan")}, "P", "R", {}),
    ],
)
def test_the_shapes(fields, prompt, response, metadata):
    found = sample(**fields)
    assert (found.prompt, found.response, dict(found.metadata)) == (prompt, response, metadata)


SHAREGPT = [("system", "s"), ("human", "u"), ("gpt", "a"), ("observation", "t"), ("gpt", "b"), ("human", "v")]


@pytest.mark.parametrize("which", ["last", "all"])
def test_conversations_of_other_tools_are_those_of_messages(which):
    """ShareGPT's form, and TRL's, in which prompt and completion are lists of turns."""

    def of(**fields):
        found = sample_from(Record(location="here", fields=fields | {"n": 1}), turns=which)
        return found.messages, found.turns, found.response, found.prompt, dict(found.metadata)

    names = {"human": "user", "gpt": "assistant", "observation": "tool"}
    turns = [{"role": names.get(role, role), "content": content} for role, content in SHAREGPT]
    said = [{"from": role, "value": content} for role, content in SHAREGPT]
    wanted = of(messages=turns)
    assert wanted[2] == {"last": "b", "all": "a\n\ntool: t\n\nassistant: b"}[which] and wanted[4] == {"n": 1}
    assert of(conversations=said) == of(conversations=turns) == wanted
    assert of(conversations=said[1:], system="s") == of(messages=said) == of(conversations=said, system=None) == wanted
    # One that is not asked for is a field like any other.
    assert of(conversations=said, system="x") == (*wanted[:4], {"n": 1, "system": "x"})
    assert of(messages=json.dumps(turns)) == of(conversations=json.dumps(said)) == wanted
    assert of(messages=[turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]) == wanted
    # What stands in the prompt has no loss, also where all turns have one.
    assert of(prompt=turns[:2], completion=turns[2:]) == wanted
    late = of(prompt=turns[:4], completion=turns[4:])
    assert late[1:3] == ((), "b") and late[0] == of(messages=turns)[0] + wanted[1][:2]
    assert of(prompt=turns[:2], completion="b")[:3] == (of(messages=turns[:3])[0], (), "b")
    assert of(prompt="u", completion=turns[2:3]) == of(prompt="u", completion="a")
    # Where there is a text, or a pair of them, it counts as before.
    assert of(instruction="x", output="y", conversations=said)[2] == "y"
    assert of(text="x", conversations=said)[2:4] == ("x", None)
    for nothing in ("", " ", None):
        assert of(text="x", messages=nothing)[2] == of(text="x", conversations=nothing)[2] == "x"
        assert of(conversations=said, messages=nothing)[:4] == wanted[:4]


def test_calls_from_function_call():
    called = [
        ("human", "u"),
        ("function_call", '{"name": "f", "arguments": {"a": 1}}'),
        ("observation", "t"),
        ("gpt", "b"),
    ]
    found = sample(conversations=[{"from": role, "value": value} for role, value in called])
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert found.messages[1] == Message(role="assistant", content="", more={"tool_calls": calls})
    assert found.messages[1].more == {"tool_calls": calls}
    for value in (f"[{called[1][1]}]", json.dumps({"type": "function", "function": json.loads(called[1][1])})):
        found = sample(conversations=[{"from": "Human", "value": "u"}, {"from": "function_call", "value": value}])
        assert found.turns[0].more == {"tool_calls": calls} and found.messages[0].role == "user"
    # As a text, as CSV and some data have it.
    found = sample(
        messages=[{"role": "Human", "content": "u"}, {"role": "gpt", "content": None, "tool_calls": json.dumps(calls)}]
    )
    assert found.turns[0] == Message(role="assistant", content="", more={"tool_calls": calls})
    assert found.turns[0].more == {"tool_calls": calls} and found.messages[0].role == "user"


def test_messages_end_at_the_last_answer():
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"), ("user", "w")]
    found = sample(messages=[{"role": role, "content": content} for role, content in turns])
    assert found.messages == tuple(Message(role=role, content=content) for role, content in turns[:4])
    assert found.response == "b"
    assert found.prompt == "system: s\n\nuser: u\n\nassistant: a\n\nuser: v"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "x", "answer": "y"}, r"fields question, answer; wanted instruction/input/output.* or text$"),
        (
            {"Instruction": "x", "input": "", "ouput": "y"},
            r"or text; is Instruction meant to be instruction.; is ouput me",
        ),
        (
            {"instruction": "x", "output": None, "inputs": 1},
            r"instruction, output \(null\), inputs; .* inputs meant to be",
        ),
        ({"instruction": "x", "output": "  "}, "here, line 1: the response is empty"),
        ({"instruction": 5, "output": "x"}, "instruction is 5; wanted a text"),
        ({"instruction": "x", "output": ["y"]}, r'output must be a text, or a list of .*; output\[0\] is "y"'),
        ({"instruction": "x", "output": {"y": 1}}, 'output is {"y": 1}; wanted a text'),
        ({"messages": [{"role": "user", "content": "x"}]}, "no turn of the role assistant"),
        ({"messages": [{"role": "user"}]}, "list of objects with texts role and content"),
        ({"messages": "no JSON"}, "messages is a text that is no JSON: "),
        ({"messages": '{"role": "user"}'}, 'from and value; messages is {"role": "user"}'),
        ({"messages": [{"from": "human", "value": "x"}]}, "no turn of the role assistant.*found the roles user$"),
        ({"conversations": [{"from": "human"}]}, r"from and value; conversations\[0\] is"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no turn of the role assistant.*found the roles user"),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            r'conversations\[0\] is from .*, with "f\(\)"',
        ),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "wanted JSON with name and arguments"),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f"}'}]},
            "wanted JSON with name and arguments",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": "f()"}]},
            r"tool_calls of messages\[0\] is a te",
        ),
        (
            {"instruction": [{"role": "user", "content": "a"}], "input": "b", "output": "c"},
            "instruction is a list of turns, and input a text; wanted one of both",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            r"messages\[0\] has a content of the parts text, image_url; wanted a text",
        ),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": []}, "completion has no turn of the role"),
        (
            {"conversation": [], "source": "x"},
            "conversation, source; wanted .* is conversation meant to be conversations",
        ),
        ({"id": True, "text": "x"}, "id is true; wanted a text or a whole number"),
        ({"text": "x", "Lang": "a", "lang": "b"}, "two fields would both be the column 'lang'"),
        ({"text": "\ud800"}, "not valid Unicode"),
    ],
)
def test_records_that_cannot_be_samples(fields, message):
    with pytest.raises(CorpusError, match=message):
        sample(**fields)


def test_ids_come_from_the_record_or_its_content():
    assert sample(id=7, text="x").sample_id == sample(id=7.0, text="x").sample_id == "7"
    assert sample_from(Record(location="", fields={"uid": "u", "text": "x"}), id_field="uid").sample_id == "u"
    assert sample(text="x").sample_id == sample(text="x").sample_id
    assert sample(text="x").sample_id != sample(text="y").sample_id
    with pytest.raises(CorpusError, match="no field 'uid', which --id-field names; found text"):
        sample_from(Record(location="", fields={"text": "x"}), id_field="uid")


def test_split_and_source_of_the_command_win():
    record = Record(location="", fields={"text": "x", "split": "test", "source": "dolly"})
    assert (sample_from(record).split, sample_from(record).source) == ("test", "dolly")
    told = sample_from(record, split="train", source="web")
    assert (told.split, told.source) == ("train", "web")
    assert told.content_hash != sample_from(record).content_hash


def test_malformed_lines_are_named_and_the_rest_still_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "bad"\n\n[1]\n{"text": "\xff"}\n{"text": "fine"}\n')
    found = [entry if isinstance(entry, CorpusError) else entry.response for entry in read_corpus([path])]
    assert [str(entry) if isinstance(entry, CorpusError) else entry for entry in found] == [
        "good",
        f"{path}, line 2: not JSON: Expecting ',' delimiter at column 15",
        f"{path}, line 4: found a list; wanted an object with named fields",
        f"{path}, line 5: holds text that is not valid Unicode: surrogates not allowed",
        "fine",
    ]


def test_csv_values_have_the_narrowest_type_of_their_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,n,x,code\n"two\nlines",1,1.5,007\nb,,2,1\nc,3\n', "utf-8")
    first, second, third = read_corpus([path])
    assert (first.response, dict(first.metadata)) == ("two\nlines", {"n": 1, "x": 1.5, "code": "007"})
    assert dict(second.metadata) == {"x": 2.0, "code": "1"}
    assert str(third) == f"{path}, line 5: 2 values; wanted 4 (text, n, x, code)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "no.jsonl", "no such file"),
        (lambda folder: write_jsonl(folder / "a.txt", RECORDS), r"\.txt is no known format; wanted \.jsonl"),
        (lambda folder: folder, "a folder without state.json"),
        (lambda folder: write_jsonl(folder / "a.parquet", RECORDS), "not readable as Parquet"),
        (lambda folder: write_jsonl(folder / "a.jsonl.gz", RECORDS), "cannot be read: Not a gzipped file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, make, message):
    with pytest.raises(CorpusError, match=message):
        list(read_corpus([make(tmp_path)]))


def test_a_dataset_of_several_splits_says_how_to_ingest_one(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(RECORDS), "test": Dataset.from_list(RECORDS)}).save_to_disk(
        str(tmp_path / "d")
    )
    with pytest.raises(
        CorpusError, match="holds the splits test, train; ingest one at a time, as in: .*test --split test"
    ):
        list(read_corpus([tmp_path / "d"]))


# Templates


def test_alpaca_is_the_well_known_one():
    assert load_template("alpaca").render(sample(instruction="Add", input="1 2", output="3")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd\n1 2\n\n### Response:\n"
    )
    assert load_template("alpaca").render(sample(text="x")) == ""


def test_braces_in_an_instruction_stay_as_they_are():
    assert "\n{{ prompt }} {% if %}\n" in load_template("alpaca").render(
        sample(prompt="{{ prompt }} {% if %}", output="x")
    )


def test_chat_speaks_through_the_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    template = load_template("chat", tokenizer=tokenizer)
    talk = sample(
        messages=[
            {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        ]
    )
    assert template.render(talk) == "<user>a<assistant>b<user>c<assistant>"
    assert template.render(sample(prompt="hi", response="x")) == "<user>hi<assistant>"
    with pytest.raises(
        CorpusError, match="a conversation of 3 turns .* does not fit the template alpaca; .*--template chat"
    ):
        load_template("alpaca").render(talk)
    with pytest.raises(SpecError, match="this model's tokenizer has no chat template"):
        load_template("chat", tokenizer=byte_tokenizer())


def test_a_jinja_file_sees_the_record(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("Q({{ topic }}): {{ instruction }}\nA: ", "utf-8")
    template = load_template(str(path))
    assert template.render(sample(instruction="i", output="o", topic="maths")) == "Q(maths): i\nA: "
    assert (
        load_template("jinja", text=template.text).render(sample(instruction="i", output="o", topic="x"))
        == "Q(x): i\nA: "
    )
    with pytest.raises(CorpusError, match="here, line 1: the template cannot render this record: 'topic' is undefined"):
        template.render(sample(prompt="i", output="o"))
    path.write_text("{% if %}", "utf-8")
    with pytest.raises(SpecError, match="line 1: Expected an expression"):
        load_template(str(path))
    with pytest.raises(SpecError, match="no such file; give alpaca, chat, text or a Jinja file"):
        load_template("nowhere.jinja")


def test_a_template_cannot_reach_python():
    with pytest.raises(CorpusError, match="unsafe"):
        load_template("jinja", text="{{ ''.__class__.__mro__ }}").render(sample(prompt="p", output="o"))


# Tokens


def encoded(one, *, tokenizer=None, template="text", max_tokens=512) -> Encoded:
    (result,) = encode(
        [one], tokenizer=tokenizer or byte_tokenizer(), template=load_template(template), max_tokens=max_tokens
    )
    if isinstance(result, CorpusError):
        raise result
    return result


def test_the_prompt_is_masked_and_the_end_belongs_to_the_response():
    found = encoded(sample(prompt="ab", response="cd", id="s"))
    tokenizer = byte_tokenizer()
    assert found == Encoded(
        sample_id="s",
        input_ids=(1, *tokenizer.convert_tokens_to_ids(list("abcd")), 2),
        offsets=((0, 1), (1, 2), (2, 2)),
        truncated=False,
    )


@pytest.mark.parametrize("response", ["é", "a😀b", "日本 e\u0301", "\n\n x", " lead"])
def test_offsets_of_split_characters_cover_the_character(response):
    found = encoded(sample(prompt="Ü", response=response))
    assert [response[start:end] for start, end in found.offsets] == [
        character for character in response for _ in character.encode("utf-8")
    ] + [""]


def test_text_is_all_response_but_the_first_token_needs_a_predecessor():
    assert encoded(sample(text="abc")).offsets == ((0, 1), (1, 2), (2, 3), (3, 3))
    from tokenizers import processors

    without_start = byte_tokenizer()
    without_start.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert encoded(sample(text="abc"), tokenizer=without_start).offsets == ((1, 2), (2, 3), (3, 3))


def test_long_samples_are_cut_from_the_right():
    found = encoded(sample(prompt="abcd", response="efgh"), max_tokens=7)
    assert (len(found.input_ids), found.offsets, found.truncated) == (7, ((0, 1), (1, 2)), True)
    assert encoded(sample(prompt="abcd", response="efgh"), max_tokens=10).truncated is False
    with pytest.raises(CorpusError, match="no response token is left within --max-tokens 5: the prompt takes 5"):
        encoded(sample(prompt="abcd", response="efgh"), max_tokens=5)


def test_a_template_that_writes_the_first_token_gets_no_second():
    plain, written = (encode(
        [sample(prompt=prompt, response="x")], tokenizer=byte_tokenizer(), template=load_template("text"), max_tokens=9
    )[0] for prompt in ("ab", "<s>ab"))  # fmt: skip
    assert plain.input_ids == written.input_ids
    assert plain.offsets == written.offsets


def test_byte_fallback_of_a_real_tokenizer(shared):
    from rapidin_vdb.gradient import load_tokenizer

    tokenizer = load_tokenizer(str(shared / "models" / "tinystories-260k"))
    response = "a ☃ and 日本, é 😀!"
    found = encoded(sample(prompt="Say it", response=response), tokenizer=tokenizer, template="alpaca")
    covered = [response[start:end] for start, end in found.offsets]
    assert covered.count("☃") == 3 and covered.count("😀") == 4 and covered.count("日") == 3
    seen = sorted({place for start, end in found.offsets for place in range(start, end)})
    assert seen == list(range(len(response)))
    assert tokenizer.decode(found.input_ids[-found.response_tokens : -1]) == response


def test_whole_numbers_in_csv_keep_their_digits(tmp_path):
    path = tmp_path / "a.csv"
    long = "9" * 5000
    path.write_text(
        f"prompt,response,uid,many,real\na,b,12345678901234567890,1,1\nc,d,12345678901234567891,{long},2.5\n"
    )
    first, second = read_corpus([path], id_field="uid")
    assert (first.sample_id, second.sample_id) == ("12345678901234567890", "12345678901234567891")
    assert (first.metadata["many"], second.metadata["many"], second.metadata["real"]) == ("1", long, 2.5)


def test_a_jinja_file_sees_the_input_of_a_record(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ instruction }}|{{ input }}|")
    template = load_template(str(tmp_path / "t.jinja"))
    assert template.render(sample(prompt="P", input="ctx", response="r")) == "P|ctx|"
    assert template.render(sample(prompt="P", response="r")) == "P||"


def test_a_query_without_a_query_id_keeps_its_id(tmp_path):
    from rapidin_vdb.query import read_queries

    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"query_id": null, "id": "mine", "prompt": "a", "generation": "b"}\n{"prompt": "a", "generation": "b"}\n'
    )
    assert [query.sample_id for query in read_queries(path)] == ["mine", "2"]


@pytest.mark.parametrize(
    ("name", "meant"), [("focsu", "focus"), ("Focus", "focus"), ("queryid", "query_id"), ("tool", "tools")]
)
def test_an_option_of_a_query_that_is_misspelt_is_told(tmp_path, name, meant):
    from rapidin_vdb.query import read_queries

    asked = {"prompt": "a", "generation": "b"}
    with pytest.raises(CorpusError, match=f"line 2: is {name} meant to be {meant}. Rename it"):
        read_queries(write_jsonl(tmp_path / "q.jsonl", [asked, asked | {name: "b"}]))
    # Not where that is there too, nor a name that is merely near.
    both = [asked | {name: "b", meant: "b"}] if name.islower() else []
    fine = [*both, asked | {"focal": 1, "query": "x", "identity": 3}]
    assert len(read_queries(write_jsonl(tmp_path / "r.jsonl", fine))) == len(fine)


@pytest.mark.parametrize("name", ["where", "top_k", "refine", "group_by", "as_of"])
def test_an_option_of_all_queries_is_not_one_of_a_query(tmp_path, name):
    """Over HTTP it is: whoever writes a file as a request's body would have it ignored."""
    from rapidin_vdb.query import read_queries

    asked = {"prompt": "a", "generation": "b"}
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(
        CorpusError, match=f"line 2: {name} is an option of all queries, not of one: leave it out, and give {option}"
    ):
        read_queries(write_jsonl(tmp_path / "q.jsonl", [asked, asked | {name: 3}]))
    fine = asked | {"harmful": True, "level": 2, "index": 1, name: None}
    assert len(read_queries(write_jsonl(tmp_path / "r.jsonl", [fine]))) == 1


def test_what_is_given_for_queries_is_told(tmp_path):
    import inspect

    from rapidin_vdb import query as module
    from rapidin_vdb.query import query_from

    queries_of = inspect.unwrap(module.queries_of)  # types are checked in tests only
    query = query_from("a", "b")
    assert queries_of(None, None, file=None, queries=(one for one in [query, query])) == [query, query]
    with pytest.raises(SpecError, match="one of the queries is of type dict; make it with rapidin_vdb.query_from"):
        queries_of(None, None, file=None, queries=[query, {"prompt": "a", "generation": "b"}])
    for prompt, generation, file in (("a", None, None), (None, "b", tmp_path), ("a", None, tmp_path)):
        with pytest.raises(SpecError, match="give one of: --prompt and --generation, or --file"):
            queries_of(prompt, generation, file=file, queries=None)


def test_a_generation_follows_the_turns_of_a_query(tmp_path):
    from rapidin_vdb.query import query_from, read_queries

    path = tmp_path / "q.jsonl"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    turns = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"id": "7", "messages": turns, "generation": "d", "prompt": None}), "utf-8")
    (query,) = read_queries(path)
    wanted = query_from(None, "d", messages=turns, query_id="7")
    assert (query.messages, query.response, query.prompt) == (wanted.messages, "d", wanted.prompt)
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    path.write_text(json.dumps({"conversations": said, "generation": "d"}), "utf-8")
    (query,) = read_queries(path)
    assert (query.messages, query.response) == (wanted.messages, "d")
    path.write_text(json.dumps({"conversations": said, "generation": "d", "prompt": "e"}), "utf-8")
    assert (read_queries(path)[0].prompt, read_queries(path)[0].response) == ("e", "d")
    path.write_text(json.dumps({"conversations": said, "response": "d"}), "utf-8")
    with pytest.raises(CorpusError, match="line 1: a query has response beside conversations; give the turns as conv"):
        read_queries(path)
    for more in ({"generation": "d", "prompt": "c"}, {"response": "d"}, {"generation": "d", "output": "d"}):
        path.write_text(json.dumps({"messages": turns} | more), "utf-8")
        with pytest.raises(
            CorpusError, match="line 1: a query has .* beside messages; give the turns as messages, and"
        ):
            read_queries(path)
    path.write_text(json.dumps({"messages": turns[:2], "text": "is metadata"}), "utf-8")
    assert read_queries(path)[0].response == "b"


def test_a_generation_is_not_among_the_turns_before_it(tmp_path):
    from rapidin_vdb.query import query_from, read_queries

    turns = [
        {"role": role, "content": content} for role, content in (("user", "b"), ("assistant", "b "), ("user", "b"))
    ]
    path = tmp_path / "q.jsonl"
    asked = {"messages": turns[:2], "generation": "b"}
    for ask in (
        lambda: query_from(None, "b", messages=turns[:2]),
        lambda: read_queries(write_jsonl(path, [asked | {"generation": "c"}, asked])),
    ):
        with pytest.raises(CorpusError, match="the last of the messages is the generation itself"):
            ask()
    # Calls of tools may follow one another, all without a content.
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a", "arguments": {}}}]}
    (query,) = read_queries(write_jsonl(path, [{"prompt": [turns[0], call], "generation": [call]}]))
    assert (query.messages[-1].content, query.response) == ("", "")
    # Others may say the same, and so may earlier turns; what stands twice in a file's turns is the file's.
    assert query_from(None, "b", messages=turns).response == query_from(None, "b", messages=turns[:1]).response == "b"
    (query,) = read_queries(write_jsonl(path, [{"messages": [*turns[:2], turns[1]]}]))
    assert [turn.content for turn in query.messages] == ["b", "b "] and query.response == "b "


def test_a_query_of_no_known_shape_is_told_which_name_was_meant(tmp_path):
    from rapidin_vdb.query import read_queries

    path = tmp_path / "q.jsonl"
    for fields, said in (
        (
            {"promt": "a", "generation": "b"},
            "promt, generation; wanted prompt and generation, .*; is promt meant to be pr",
        ),
        (
            {"prompt": "a", "generatoin": "b"},
            "generatoin; wanted prompt and .*; is generatoin meant to be generation.$",
        ),
        ({"id": "7", "prompt": "a", "generation": None}, r"id, prompt, generation \(null\); wanted .* text\)$"),
    ):
        path.write_text(json.dumps(fields), "utf-8")
        with pytest.raises(CorpusError, match=f"q.jsonl, line 1: found the fields .*{said}"):
            read_queries(path)


def test_a_row_of_another_length_says_nothing_of_columns(tmp_path):
    """A comma too many shifts values into other columns: whole numbers elsewhere would become texts, with other ids."""
    rows = "instruction,output,stars\nq1,a,1\nq2,b,2\n"
    for name, bad in (("a.csv", ""), ("b.csv", "q3, a comma, a3,4\n"), ("c.csv", "short\n")):
        (tmp_path / name).write_text(rows + bad)
    good = [one for one in read_records(tmp_path / "a.csv")]
    assert [record.fields["stars"] for record in good] == [1, 2]
    for name in ("b.csv", "c.csv"):
        found = list(read_records(tmp_path / name))
        assert [record.fields for record in found[:2]] == [record.fields for record in good]
        assert isinstance(found[2], CorpusError)


def test_a_csv_that_breaks_off_says_where(tmp_path):
    (tmp_path / "a.csv").write_text('output\nfine\n"two\nlines"\n"stray" x\nfine\n')
    with pytest.raises(CorpusError, match="a.csv, in the row that begins in line 5: not CSV"):
        list(read_records(tmp_path / "a.csv"))


def test_a_name_that_cannot_be_looked_for_is_told(tmp_path):
    for name in ("x" * 300 + ".jsonl", "a\0.jsonl"):
        with pytest.raises(CorpusError, match="cannot be read: "):
            read_records(tmp_path / name)
    with pytest.raises(CorpusError, match="no such file"):
        read_records(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]) / "b.jsonl")


ADDRESS = ": this is an address, and records are read from files of this machine; copy it here, or mount what holds it"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("s3://bucket/train/x.parquet", "s3://bucket/train/x.parquet"),
        ("hf://datasets/a/b/train.jsonl", "hf://datasets/a/b/train.jsonl"),
        ("https://host:80/a//b.jsonl?x=://", "https://host:80/a//b.jsonl?x=://"),
        ("file:///data/x.csv", "file:///data/x.csv"),
        # As the command line has them, and whoever makes paths of them.
        (Path("s3://bucket/train/x.parquet"), "s3://bucket/train/x.parquet"),
        (Path("gs+x.1://bucket/two\nlines.jsonl"), "gs+x.1://bucket/two\nlines.jsonl"),
        (Path("file:///data/x.csv"), "file:///data/x.csv"),
    ],
)
def test_an_address_stays_as_it_was_given(given, told):
    with pytest.raises(CorpusError) as raised:
        paths_of(["a.jsonl", given])
    assert str(raised.value).startswith(told + ADDRESS)
    if isinstance(given, Path):
        for read in (read_records, read_lines):
            with pytest.raises(CorpusError) as raised:
                read(given)
            assert str(raised.value).startswith(told + ADDRESS)


def test_what_looks_like_an_address_may_be_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data:"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": "a"}])
    for name in ("data:/a.jsonl", "data://a.jsonl"):
        (path,) = paths_of([name])
        assert [record.fields for record in read_records(path)] == [{"text": "a"}]
    for name in ("C:/none.jsonl", "a:b/none.jsonl", "9:/none.jsonl"):
        with pytest.raises(CorpusError, match="no such file"):
            read_records(*paths_of([name]))


@pytest.mark.parametrize("state", ["[]", '{"_data_files": null}', '{"_data_files": [3]}', "{"])
def test_a_saved_dataset_whose_state_is_none_is_told(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(CorpusError, match="not readable as a saved dataset"):
        list(read_records(tmp_path))


def test_all_files_are_looked_for_before_the_first_is_read(tmp_path):
    there = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    samples = read_corpus([there, tmp_path / "typo.jsonl"])
    with pytest.raises(CorpusError, match=r"typo.jsonl: no such file"):
        next(samples)


def test_long_texts_are_tokenised_in_parts(monkeypatch):
    tokenizer, sizes = byte_tokenizer(), []

    class Watched:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            sizes.append(sum(map(len, texts)))
            return tokenizer(texts, **options)

    samples = [sample(text="word " * n) for n in (3, 90, 1, 1, 40, 300, 2)]
    whole = encode(samples, tokenizer=tokenizer, template=load_template("text"), max_tokens=64)
    monkeypatch.setattr(sys.modules["rapidin_vdb.corpus.encode"], "_CHARACTERS", 500)
    parts = encode(samples, tokenizer=Watched(), template=load_template("text"), max_tokens=64)
    assert parts == whole and sizes == [475, 200, 1500, 10]
