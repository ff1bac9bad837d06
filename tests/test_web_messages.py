"""Several turns before a generation: in the API, and those of a sample."""

import pytest
from conftest import byte_tokenizer, save_adapter, save_model, write_jsonl
from test_chat import TEMPLATES

import rapidin_vdb
from rapidin_vdb.errors import CorpusError, SpecError, TableError

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from fastapi.testclient import TestClient

from rapidin_vdb.web import make_app


def said(*turns: str) -> list[dict[str, str]]:
    """Return turns by what they say, as `user: Hi`."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


LONG = said("system: Be kind.", "user: Hi", "assistant: Hello, é黄!", "user: And snow?", "assistant: Ice.")
RECORDS = [
    {"id": "long", "messages": LONG, "source": "talks"},
    # Its list is not kept, so that the record cannot be proved: its turns are those that the text shows.
    {"id": "listed", "messages": said("user: A", "assistant: B\n\nuser: C", "user: D", "assistant: E"), "more": [1]},
    {"id": "one", "messages": said("system: Be kind.", "user: Name a fruit.", "assistant: A pear.")},
    {"id": "plain", "messages": said("user: Name a fruit.", "assistant: A fig.")},
    {"id": "pair", "prompt": "user: Hi\n\nassistant: Ho\n\nuser: Hu", "response": "Hello."},
    {"id": "text", "text": "Once upon a time."},
    {"id": "tool", "messages": said("user: Sum?", "assistant: sum(1)", "tool: 1", "assistant: One.")},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A database of conversations, whose answers all have a loss."""
    folder = tmp_path_factory.mktemp("messages")
    model, tokenizer = save_model(folder / "model", "llama"), byte_tokenizer()
    tokenizer.chat_template = TEMPLATES["as it is"].replace("<|im_end|>", "<pad>").replace("<|im_start|>", "<s>")
    tokenizer.save_pretrained(model)
    adapter = save_adapter(folder / "adapter", "llama")
    made = rapidin_vdb.init(
        folder / "db", model=str(model), adapter=str(adapter), width=64, template="chat", turns="all"
    )
    made.ingest(write_jsonl(folder / "talks.jsonl", RECORDS))
    made.load()
    made.query("Hi", "Hello", tokens=True, matrix=True)  # what is compiled at the first time
    return made


@pytest.fixture(scope="module")
def client(made):
    with TestClient(make_app(made), base_url="http://127.0.0.1:8000") as client:
        yield client


def alpaca(tmp_path, made):
    """Return a database whose template takes one prompt only."""
    stored = made.fingerprint
    other = rapidin_vdb.init(tmp_path / "db", model=stored.model, adapter=stored.adapter, width=64)
    other.ingest(write_jsonl(tmp_path / "one.jsonl", [{"id": "a", "instruction": "Say 1", "output": "red"}]))
    other.load()
    return other


# The API, and Python.


def test_the_model_answers_after_several_turns(made, client):
    before = said("system: Be kind.", "user: Hi", "assistant: Ho", "user: And snow?")

    def answer(**body):
        return client.post("/api/generate", json=body | {"max_tokens": 12})

    found = answer(messages=before).json()
    assert found.keys() == {"messages", "generation", "max_tokens", "temperature", "seed"}
    assert found["messages"] == before and found["generation"] == made.generate(messages=before, max_tokens=12)
    # It is what follows all of them, written in the template: one turn of the user is a prompt.
    text = made._engine.loaded.tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    raw = rapidin_vdb.gradient.generate_one(
        made._engine.loaded, text, max_tokens=12, temperature=0.0, seed=0, special=False, end="<pad>"
    )
    assert found["generation"] == raw != made.generate("And snow?", max_tokens=12)
    single = answer(messages=said("user: And snow?")).json()
    assert single["generation"] == answer(prompt="And snow?").json()["generation"]
    assert answer(prompt="And snow?").json().keys() == {"prompt", "generation", "max_tokens", "temperature", "seed"}


def test_a_prompt_or_turns_and_not_both(made, client):
    for body in ({}, {"messages": []}, {"prompt": "Hi", "messages": said("user: Hi")}):
        answer = client.post("/api/generate", json=body)
        assert answer.status_code == 400
        assert answer.json()["detail"] == "the model answers a prompt, or messages; give one of both"
    for turn in ({"role": "user"}, {"role": "", "content": "x"}, {"role": "user", "content": 1}, "user: Hi"):
        assert client.post("/api/generate", json={"messages": [turn]}).status_code == 422
    assert client.post("/api/generate", json={"prompt": ""}).status_code == 422
    with pytest.raises(SpecError, match="a prompt, or messages; give one of both"):
        made.generate("Hi", messages=said("user: Hi"))
    with pytest.raises(CorpusError, match="messages must be a list of objects with texts role and content"):
        made.generate(messages=[{"role": "user"}])


def test_a_template_of_one_prompt_says_so(tmp_path, made):
    with TestClient(make_app(alpaca(tmp_path, made)), base_url="http://127.0.0.1") as client:
        for path, more in (("/api/generate", {}), ("/api/query", {"generation": "red"})):
            answer = client.post(path, json={"messages": said("system: Be kind.", "user: Hi")} | more)
            assert (
                answer.status_code == 400 and "of 2 turns before the response does not fit" in answer.json()["detail"]
            )
            assert client.post(path, json={"messages": said("user: Hi")} | more).status_code == 200


def test_the_turns_of_a_sample_are_handed_out_with_its_pieces(made, client):
    def turns(name: str):
        return client.get("/api/sample", params={"sample_id": name, "pieces": True}).json()["messages"]

    records = {record["id"]: record for record in RECORDS}
    for name in ("long", "listed", "one", "plain", "tool"):
        assert turns(name) == records[name]["messages"], name
    # A prompt that looks like a conversation is none where the record can be proved.
    assert turns("pair") is None and turns("text") is None
    plain = client.get("/api/sample", params={"sample_id": "long"}).json()
    assert "messages" not in plain and plain == made.show("long").to_dict() | {
        "token_offsets": [list(span) for span in made.show("long").token_offsets]
    }
    assert client.get("/api/sample", params={"sample_id": "nobody", "pieces": True}).status_code == 404
    with pytest.raises(TableError, match="no sample"):
        made.show_turns("\ud800")
