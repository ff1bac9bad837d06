"""Several turns before a generation: in the API, on the page, in its links, and of a sample of several answers."""

import json
from urllib.parse import quote, unquote

import pytest
import test_web_page as whole
from conftest import save_adapter, save_chat_model, write_jsonl
from test_web_page import cards, settled, tab_to

import rapidin_vdb
from rapidin_vdb.errors import CorpusError, SpecError, TableError

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from fastapi.testclient import TestClient

from rapidin_vdb.web import make_app

driver, visit = whole.driver, whole.visit


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
    model, _ = save_chat_model(folder / "model", begin="<s>")
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
    ).text
    assert found["generation"] == raw != made.generate("And snow?", max_tokens=12)
    single = answer(messages=said("user: And snow?")).json()
    assert single["generation"] == answer(prompt="And snow?").json()["generation"]
    assert answer(prompt="And snow?").json().keys() == {"prompt", "generation", "max_tokens", "temperature", "seed"}


def test_a_prompt_or_turns_and_not_both(made, client):
    for body in ({}, {"messages": []}, {"prompt": "Hi", "messages": said("user: Hi")}):
        answer = client.post("/api/generate", json=body)
        assert answer.status_code == 400
        assert answer.json()["detail"] == "the model answers a prompt, or messages; give one of both"
    assert client.post("/api/generate", json={"messages": [{"role": "user"}]}).status_code == 400
    for turn in ({"role": "", "content": "x"}, {"role": "user", "content": 1}, "user: Hi"):
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


# The page.


@pytest.fixture(scope="module")
def address(made):
    if whole.CHROMIUM is None:
        pytest.skip("no chromium here")
    pytest.importorskip("playwright.sync_api")
    with whole.serving(made) as address:
        yield address


@pytest.fixture
def opened(visit):
    """Return a function that opens the page of the conversations."""

    def open_page(**options):
        page = visit(**{"samples": len(RECORDS)} | options)
        page.bodies = []
        page.on("request", lambda request: request.method == "POST" and page.bodies.append(request.post_data_json))
        return page

    return open_page


def add(page, *turns: str) -> None:
    for turn in said(*turns):
        page.get_by_role("button", name="Add a turn before the prompt").click()
        row = page.locator(".turn").last
        row.locator("select").select_option(turn["role"])
        row.locator("textarea").fill(turn["content"])


def written(page) -> list[dict[str, str]]:
    return page.locator(".turn").evaluate_all(
        "all => all.map((one) => ({ role: one.querySelector('select').value, content: one.querySelector('textarea').value }))"
    )


def question(page) -> dict:
    """Return what was asked last, in whichever of its steps: which words drive which follows where that is quick."""
    return {name: value for name, value in page.bodies[-1].items() if name not in ("tokens", "matrix")}


def go(page) -> None:
    page.click("#go")
    settled(page)


BEFORE = ("system: Be kind.", "user: Hi", "assistant: Ho")


def test_an_answer_in_a_conversation(opened, made):
    page = opened()
    add(page, *BEFORE)
    page.fill("#prompt", "And snow?")
    page.fill("#generated", "Ice.")
    go(page)
    turns = said(*BEFORE, "user: And snow?")
    (wanted,) = made.query(queries=[rapidin_vdb.query_from(None, "Ice.", messages=turns)])
    (alone,) = made.query("And snow?", "Ice.")
    assert cards(page) == [result.sample_id for result in wanted.results]
    assert [result.score for result in wanted.results] != [result.score for result in alone.results]
    shown = page.locator("article .number:text('score')").all_text_contents()
    assert [float(text.split()[1]) for text in shown] == pytest.approx([r.score for r in wanted.results], abs=1e-3)
    assert all(body["messages"] == turns and "prompt" not in body for body in page.bodies)
    # They stand above the generation, folded, and stay as they are when all is drawn anew.
    page.locator("main summary", has_text="3 earlier turns").click()
    page.locator("#generation .choice").first.click()
    settled(page)
    assert page.locator(".sticky .earlier .text").all_text_contents() == ["Be kind.", "Hi", "Ho"]
    assert page.locator(".sticky .earlier .label").all_text_contents() == ["system", "user", "assistant"]
    assert page.locator(".sticky .earlier").get_attribute("open") is not None and page.complaints == []
    # Without a prompt, the last of them is what stands before the generation.
    page.fill("#prompt", "")
    go(page)
    assert page.bodies[-1]["messages"] == said(*BEFORE)


def test_links_and_history_keep_them(opened, address):
    page = opened()
    add(page, *BEFORE)
    page.fill("#prompt", "And snow?")
    page.fill("#generated", "Ice.")
    go(page)
    found, link = cards(page), page.url.removeprefix(address)
    assert json.loads(unquote(link.split("#ask=")[1]))["turns"] == said(*BEFORE)
    other = opened(link=link)
    other.locator("article").first.wait_for()
    assert written(other) == said(*BEFORE) and cards(other) == found and other.input_value("#prompt") == "And snow?"
    # What is asked without them is another question, and is kept as it was before there were any.
    for _ in BEFORE:
        page.locator(".turn .remove").first.click()
    assert page.locator("#before").is_hidden()
    go(page)
    assert "turns" not in json.loads(unquote(page.url.split("#ask=")[1]))
    assert page.bodies[-1]["prompt"] == "And snow?" and "messages" not in page.bodies[-1]
    page.click('[data-view="history"]')
    past = page.locator("article")
    assert past.locator("summary").all_text_contents() == ["3 earlier turns"] and past.count() == 2
    past.nth(1).get_by_role("button", name="Ask again").click()
    page.locator("main .earlier").wait_for()
    settled(page)
    assert written(page) == said(*BEFORE) and page.bodies[-1]["messages"] == said(*BEFORE, "user: And snow?")
    # The way back to the question leads to its answer.
    page.click('[data-view="browse"]')
    settled(page)
    page.click('[data-view="ask"]')
    page.locator("main .earlier").wait_for()
    assert cards(page) == found


def test_what_was_kept_before_there_were_turns_is_asked_again(opened):
    page = opened()
    identity = page.evaluate("fetch('api/info').then((found) => found.json())")["identity"]
    old = {"prompt": "Hi", "generated": "Ho", "where": "", "top_k": "10", "ends": "helpful", "group_by": "",
           "tokens": True, "focus": []}  # fmt: skip
    page.evaluate(
        "([name, text]) => localStorage.setItem(name, text)",
        [f"rapidin.{identity}.history", json.dumps([{"view": "ask", "value": old, "at": "2026-01-01"}])],
    )
    page.click('[data-view="history"]')
    page.get_by_role("button", name="Ask again").click()
    page.locator("#generation").wait_for()
    settled(page)
    assert page.bodies[0]["prompt"] == "Hi" and written(page) == []
    page.click('[data-view="history"]')
    assert page.locator("article").count() == 1, "it is the same question"


def test_two_answers_in_a_conversation_side_by_side(opened, address):
    page = opened()
    add(page, *BEFORE)
    page.fill("#prompt", "And snow?")
    page.fill("#generated", "Ice.")
    go(page)
    page.click("#compare")
    page.locator(".turn textarea").nth(2).fill("Hello")
    go(page)
    sides = [page.locator(f"[data-side='{number}']") for number in (0, 1)]
    sides[1].locator("article").first.wait_for()
    link, last = page.url.removeprefix(address), ("Ho", "Hello")
    for here in (page, opened(link=link)):
        here.locator("[data-side='1'] article").first.wait_for()
        found = [here.locator(f"[data-side='{n}'] .earlier .text").last.text_content() for n in (0, 1)]
        assert tuple(found) == last
    assert written(page) == said(*BEFORE[:2], "assistant: Hello")


@pytest.mark.parametrize(
    "turns", ["x", {"role": "user", "content": "x"}, [None], ["user"], [{"role": "user"}], [{"role": 1, "content": ""}], None]
)  # fmt: skip
def test_damaged_turns_are_said(opened, turns):
    page = opened(link="#ask=" + quote(json.dumps({"generated": "x", "turns": turns})))
    page.locator("#status.error", has_text="This link is damaged.").wait_for()
    assert page.bodies == [] and page.complaints == []


def test_what_the_server_says_of_turns_is_said(opened, tmp_path, made):
    with whole.serving(alpaca(tmp_path, made)) as there:
        page = opened(to=there, samples=None)
        page.get_by_text("db: 1 samples").wait_for()
        add(page, "user: Hi", "assistant: Ho")
        page.fill("#prompt", "And snow?")
        page.fill("#generated", "Ice.")
        go(page)
        said = page.locator("#status.error").text_content()
        assert "a conversation of 3 turns before the response does not fit the template alpaca" in said
        page.click("#sampling summary")
        page.click("#generate")
        page.locator("#status.error", has_text="messages: a conversation of 3 turns").wait_for()
        role = "x" * 101
        page.goto(there + "#ask=" + quote(json.dumps({"generated": "x", "turns": [{"role": role, "content": "y"}]})))
        page.locator("#status.error", has_text="messages.0.role: String should have at most 100 characters").wait_for()


def test_the_model_answers_in_a_conversation(opened, made):
    page = opened()
    add(page, *BEFORE)
    page.fill("#prompt", "And snow?")
    page.click("#sampling summary")
    page.fill("#max_tokens", "9")
    page.click("#generate")
    page.locator("#sampled", has_text="at most 9 tokens").wait_for()
    assert page.bodies[-1]["messages"] == said(*BEFORE, "user: And snow?")
    wanted = made.generate(messages=said(*BEFORE, "user: And snow?"), max_tokens=9)
    assert page.input_value("#generated") == wanted.replace("\r\n", "\n").replace("\r", "\n")
    page.locator(".turn select").first.select_option("user")
    assert page.locator("#sampled").text_content() == "", "it was not said after these any more"


def test_turns_without_a_mouse(opened):
    page = opened()
    here = "document.activeElement.getAttribute('aria-label')"
    page.focus("#go")
    tab_to(page, "#add-turn")
    page.keyboard.press("Enter")
    assert page.evaluate(here) == "what turn 1 says"
    page.keyboard.type("Hi")
    tab_to(page, "#add-turn")
    page.keyboard.press("Enter")
    page.keyboard.type("Ho")
    assert written(page) == said("user: Hi", "assistant: Ho"), "those who speak take turns"
    tab_to(page, "#add-turn")
    page.keyboard.press("Enter")
    page.keyboard.type("Be kind.")
    page.get_by_role("combobox", name="Turn 3 by").select_option("system")
    for place in (3, 2):  # it stays with the turn, up to the top
        page.get_by_role("button", name=f"Move turn {place} up").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(here) == ("Move turn 2 up" if place == 3 else "what turn 1 says")
    assert written(page) == said("system: Be kind.", "user: Hi", "assistant: Ho")
    assert page.locator(".turn .up").first.is_disabled()
    page.get_by_role("button", name="Remove turn 3").focus()
    page.keyboard.press("Enter")
    assert page.evaluate(here) == "what turn 2 says"
    for place in (2, 1):
        page.get_by_role("button", name=f"Remove turn {place}").focus()
        page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "add-turn" and page.locator("#before").is_hidden()
    # What says nothing is not asked.
    page.keyboard.press("Enter")
    page.fill("#generated", "Ice.")
    page.keyboard.press("Control+Enter")
    page.locator("#status.error", has_text="Turn 1 says nothing: write what was said, or remove it.").wait_for()
    assert page.evaluate(here) == "what turn 1 says" and page.bodies == []
    page.keyboard.type("Hi")
    page.keyboard.press("Control+Enter")
    page.locator("article").first.wait_for()
    assert page.bodies[0]["messages"] == said("user: Hi")


def test_a_sample_of_several_answers_is_asked_about_by_its_last(opened, made):
    page = opened()
    for name, button, prompt, turns, generated in (
        ("long", "Ask what drives such a response: its last answer", "And snow?", LONG[:3], "Ice."),
        ("one", "Ask what drives such a response", "Name a fruit.", said("system: Be kind."), "A pear."),
        ("plain", "Ask what drives such a response", "Name a fruit.", [], "A fig."),
        ("pair", "Ask what drives such a response", RECORDS[4]["prompt"], [], "Hello."),
        ("text", "Ask what drives such a response", "", [], "Once upon a time."),
        ("tool", "Ask what drives such a response: its last answer", "", RECORDS[-1]["messages"][:3], "One."),
    ):
        page.goto(page.url.split("#")[0] + "#sample=" + quote(json.dumps(name)))
        page.locator("#whole-sample h2", has_text=name).wait_for()
        page.get_by_role("button", name=button, exact=True).click()
        page.locator("#generation", has_text=generated).wait_for()
        settled(page)
        assert (page.input_value("#prompt"), written(page)) == (prompt, turns), name
        assert page.input_value("#generated") == generated
        # Asked again as it stands in the form it is the same.
        first = question(page)
        go(page)
        assert question(page) == first and page.locator("#status.error").count() == 0, name
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_turns_on_a_phone(opened, scheme):
    page = opened(width=375, scheme=scheme)
    assert page.locator("#before").is_hidden() and page.locator(".turn").count() == 0
    page.fill("#generated", "Ice.")
    add(page, "user: " + "long" * 40, "assistant: Ho")
    go(page)
    page.locator("main summary").click()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = page.evaluate(
        "() => [...document.querySelectorAll('button')].filter((one) => one.offsetParent && one.getBoundingClientRect().height < 24).length"
    )
    assert small == 0, "large enough to be pressed"
    sizes = page.evaluate(
        "() => [...document.querySelectorAll('.turn textarea, .turn select')].map((one) => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert len(sizes) == 4 and min(sizes) >= 16, "a phone does not enlarge them"
    box, label = (page.locator(name).bounding_box() for name in ("#add-turn", "#prompt"))
    assert box["y"] + box["height"] <= label["y"] + 1, "it does not lie over what is typed"


def test_tools_and_calls_before_a_generation(tmp_path):
    """As in a record: over HTTP, in Python, and in a file of queries."""
    from test_spoken import AGENT, TEMPLATES

    from rapidin_vdb.query import query_from, read_queries

    model, tokenizer = save_chat_model(tmp_path / "model", begin="<s>")
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATES["calls"]
    tokenizer.save_pretrained(model)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    made = rapidin_vdb.init(
        tmp_path / "db", model=str(model), width=64, template="chat", turns="all", max_tokens=900,
        adapter=str(save_adapter(tmp_path / "adapter", "llama")),
    )  # fmt: skip
    made.ingest(write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "messages": AGENT, "tools": tools}]))
    before, said_last = AGENT[:4], "Two."
    asked = {"messages": [*before, {"role": "assistant", "content": said_last}], "tools": tools}
    (wanted,) = made.query(queries=read_queries(write_jsonl(tmp_path / "q.jsonl", [asked])))
    (found,) = made.query(queries=[query_from(None, said_last, messages=before, tools=tools)])
    (without,) = made.query(queries=[query_from(None, said_last, messages=before)])
    assert found.results[0].score == wanted.results[0].score != without.results[0].score
    (single,) = made.query(queries=[query_from("1 + 1?", said_last, tools=tools)])
    (turns,) = made.query(queries=[query_from(None, said_last, messages=[before[1]], tools=tools)])
    assert single.results[0].score == turns.results[0].score
    with pytest.raises(SpecError, match="tools are given without a prompt or messages"):
        query_from(None, said_last, tools=tools)
    with TestClient(make_app(made), base_url="http://127.0.0.1") as client:
        body = {"messages": before, "tools": tools}
        answer = client.post("/api/query", json=body | {"generation": said_last}).json()
        assert answer["results"][0]["score"] == wanted.results[0].score
        answer = client.post("/api/generate", json=body | {"max_tokens": 9})
        assert answer.status_code == 200, answer.text
        assert answer.json()["generation"] == made.generate(messages=before, tools=tools, max_tokens=9)
        assert answer.json()["messages"][2]["tool_calls"] == AGENT[2]["tool_calls"]
        refused = client.post("/api/generate", json={"messages": [{"role": "user", "content": "a", "tool_cals": []}]})
        assert refused.status_code == 422
    text = tokenizer.apply_chat_template(before, tools=tools, tokenize=False, add_generation_prompt=True)
    raw = rapidin_vdb.gradient.generate_one(
        made._engine.loaded, text, max_tokens=9, temperature=0.0, seed=0, special=False, end="<|im_end|>"
    ).text
    assert raw == made.generate(messages=before, tools=tools, max_tokens=9)
