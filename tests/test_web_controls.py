"""What the page's controls say and do: filters and the SQL box, links, marks, what is shown when something fails."""

import json

import pytest
import test_web_page as whole
from conftest import toy_records, write_jsonl
from test_web_page import ask, cards, saved_lines, settled

import rapidin_vdb
from rapidin_vdb.question import Question

made, address, driver, visit = whole.made, whole.address, whole.driver, whole.visit


def choose(page, name: str, label: str, *, place: str = "filters") -> None:
    page.evaluate("document.querySelector('#among').open = true")
    page.select_option(f'#{place} select[data-column="{name}"]', label=label)


def chosen(page, name: str, *, place: str = "filters") -> str:
    control = page.locator(f'#{place} select[data-column="{name}"]')
    return control.evaluate("one => one.selectedOptions[0].textContent")


def put(page, name: str, end: str, value: str, *, place: str = "filters") -> None:
    page.evaluate("document.querySelector('#among').open = true")
    control = page.locator(f'#{place} input[data-column="{name}"]{end}')
    control.fill(value)
    control.dispatch_event("change")


FROM = '[data-end=">="]'


# Opening.


@pytest.mark.parametrize("act", ["browse", "escape", "ask"])
def test_what_is_pressed_while_the_page_opens_waits(visit, act):
    held = []
    page = visit(before=lambda page: page.route("**/api/columns", lambda route: held.append(route)), samples=None)
    page.locator("#status", has_text="opening").wait_for()
    while not held:
        page.wait_for_timeout(20)
    if act == "browse":
        page.click('[data-view="browse"]')
    elif act == "escape":
        page.keyboard.press("Escape")
    else:
        page.fill("#generated", "blue 35")
        page.click("#go")
    page.wait_for_timeout(300)
    held[0].continue_()
    page.get_by_text("db: 28 samples").wait_for()
    if act == "browse":
        page.get_by_text("1 to 20 of 28").first.wait_for()
        page.locator("article button", has_text="Mark").first.click()
        identity = page.evaluate("fetch('api/info').then((found) => found.json())")["identity"]
        assert page.evaluate("Object.keys(localStorage)") == [f"rapidin.{identity}.marked"]
    elif act == "ask":
        page.locator("#generation", has_text="blue 35").wait_for()
        page.locator("h2", has_text="Influence by source").wait_for()
    assert len(held) == 1
    assert page.locator("#filters [data-column]").count() > 5 and page.locator("#group_by option").count() > 2
    assert "opening" not in settled(page)


def test_an_opening_that_fails_is_said_and_can_be_tried_again(visit):
    broken = [True]

    def handle(route):
        route.abort() if broken[0] else route.continue_()

    page = visit(before=lambda page: page.route("**/api/info", handle), samples=None, link="#browse={}")
    page.locator("#status.error", has_text="The server does not answer").wait_for()
    broken[0] = False
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("db: 28 samples").wait_for()
    page.get_by_text("1 to 20 of 28").first.wait_for()
    assert page.get_by_role("button", name="Try again").count() == 0


# Filters.


@pytest.mark.parametrize(
    ("hand", "kept"),
    [
        ("(stars < 2) OR (stars > 3)", "((stars < 2) OR (stars > 3))"),
        ("(stars < 2 OR (stars > 3))", "(stars < 2 OR (stars > 3))"),
        ("(source <> ')') OR (stars = 1)", "((source <> ')') OR (stars = 1))"),
        ("(source <> '(' OR stars = 1)", "(source <> '(' OR stars = 1)"),
        ("(source <> 'it''s)' OR `stars` = 1)", "(source <> 'it''s)' OR `stars` = 1)"),
    ],
)
def test_what_is_written_by_hand_keeps_its_meaning(visit, hand, kept):
    page = visit()
    page.evaluate("document.querySelector('#among').open = true")
    page.fill("#where", hand)
    choose(page, "source", "even")
    assert page.input_value("#where") == f"{kept} AND `source` = 'even'"
    ask(page, "Say 5", "blue 35", top_k=28)
    assert cards(page) and all(int(name.split("-")[-1]) % 2 == 0 for name in cards(page))
    choose(page, "source", "any")
    assert page.input_value("#where") == kept


def test_the_controls_say_what_the_box_says(visit, address):
    page = visit()
    choose(page, "source", "even")
    put(page, "tokens", FROM, "7")
    put(page, "sample_id", "", "TOY")
    written = page.input_value("#where")
    assert written == "contains(lower(`sample_id`), 'toy') AND `source` = 'even' AND `tokens` >= 7"
    ask(page, "Say 5", "blue 35")
    # A link, in another browser.
    other = visit(link=page.url.removeprefix(address))
    other.locator("#generation").wait_for()
    assert chosen(other, "source") == "even"
    assert other.input_value(f'#filters input[data-column="tokens"]{FROM}') == "7"
    assert other.input_value('#filters input[data-column="sample_id"]') == "toy"
    choose(other, "source", "odd")
    assert other.input_value("#where") == written.replace("even", "odd")
    # The box by hand: what is taken away there is not there any more.
    other.fill("#where", "")
    assert chosen(other, "source") == "any"
    choose(other, "split", "late")
    assert other.input_value("#where") == "`split` = 'late'"
    for by_hand in ("`source` = 'even' OR `split` = 'late'", "source = 'even'", "NOT `source` = 'even'"):
        other.fill("#where", by_hand)
        assert (chosen(other, "source"), chosen(other, "split")) == ("any", "any")
    other.fill("#where", "(stars = 1 OR stars = 2) AND `source` = 'even'")
    assert chosen(other, "source") == "even"
    # History, and the way back.
    page.fill("#where", "")
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="Ask again").first.click()
    page.locator("#generation").wait_for()
    assert page.input_value("#where") == written and chosen(page, "source") == "even"


def test_browsing_anew_empties_the_controls_too(visit):
    page = visit()
    page.click('[data-view="browse"]')
    choose(page, "source", "even", place="browse-filters")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("1 to 14 of 14").first.wait_for()
    page.click('[data-view="browse"]')
    page.get_by_text("1 to 20 of 28").first.wait_for()
    assert page.input_value("#browse-where") == "" and chosen(page, "source", place="browse-filters") == "any"
    page.go_back()
    page.get_by_text("1 to 14 of 14").first.wait_for()
    assert chosen(page, "source", place="browse-filters") == "even"


def test_numbers_are_for_the_server_to_judge(visit):
    page = visit()
    page.click("#sampling summary")
    page.fill("#temperature", "0.35")
    page.fill("#max_tokens", "5")
    page.fill("#prompt", "Say 5")
    page.click("#generate")
    page.locator("#sampled", has_text="at temperature 0.35").wait_for()
    settled(page)
    page.fill("#generated", "blue 35")
    assert page.locator("#sampled").text_content() == "", "it was not said any more"
    page.click("#sampling summary")  # closed: a browser has no place to complain about what is in it
    put(page, "tokens", FROM, "100000")  # beyond what there is
    page.click("#go")
    page.locator("#status", has_text="0 of 0 samples").wait_for()
    page.fill("#top_k", "5000")
    page.click("#go")
    page.locator("#status.error", has_text="top_k: Input should be less than or equal to 1000").wait_for()
    page.fill("#top_k", "3")
    page.fill("#generated", "")
    page.click("#go")
    page.locator("#status.error", has_text="There is no generation to ask about").wait_for()


def test_a_link_restores_all_that_was_asked(visit, address):
    page = visit()
    page.select_option("#group_by", "stars")
    page.select_option("#ends", "both")
    page.uncheck("#tokens")
    ask(page, "Say 5", "blue 35", top_k=2)
    other = visit(link=page.url.removeprefix(address))
    other.locator("#main h2", has_text="Influence by stars").wait_for()
    assert [other.input_value(f"#{name}") for name in ("group_by", "ends", "top_k")] == ["stars", "both", "2"]
    assert not other.is_checked("#tokens") and other.locator("article .piece").count() == 0
    assert cards(other) == cards(page) and len(cards(page)) == 4
    assert other.locator("h2", has_text="less likely").count() == 1


def test_influence_by_values_is_that_of_the_api(visit, made):
    page = visit()
    page.select_option("#group_by", "stars")
    ask(page, "Say 5", "blue 35", top_k=1)
    rows = page.locator(".groups tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.cells].slice(0, 4).map((cell) => cell.textContent))"
    )
    (ranking,) = made.query("Say 5", "blue 35", group_by="stars")
    wanted = ranking.groups
    assert [(value, int(samples)) for value, samples, *_ in rows] == [(str(one.value), one.samples) for one in wanted]
    assert [float(score) for _, _, score, _ in rows] == pytest.approx([one.score for one in wanted], rel=1e-2, abs=1e-4)
    assert [float(error) for *_, error in rows] == pytest.approx([one.error for one in wanted], rel=1e-2, abs=1e-4)
    said = page.locator(".remarks").inner_text()
    assert said.startswith("Scores are off by ") and "Note" not in said
    assert float(said.split()[4]) == pytest.approx(ranking.score_error, abs=1e-4)
    assert said.endswith(f" Version {made.version} of the database {made.identity[:8]}.")
    assert page.locator(".remarks .origin").get_attribute("title") == made.identity


def test_what_is_said_of_an_answer_is_said_of_the_nearest_samples(visit, made):
    page = visit(link="#sample=" + json.dumps("toy-005"))
    page.locator("#nearest article").first.wait_for()
    said = page.locator("#nearest .remarks").inner_text()
    error = made.nearest("toy-005", Question()).score_error
    assert float(said.split()[4]) == pytest.approx(error, abs=1e-4)
    assert f"Version {made.version} of the database " in said


def test_what_an_answer_leaves_out_is_told(visit, made):
    long = "blue 35 " * 200
    (ranking,) = made.query("Say 5", long)
    page = visit()
    ask(page, "Say 5", long, top_k=1)
    assert ranking.note is not None
    assert ranking.note[1:] + "." in page.locator(".remarks").inner_text()


# Marks.


def test_every_button_of_a_sample_says_whether_it_is_marked(visit):
    page = visit()
    ask(page, "Say 5", "blue 35", where="sample_id IN ('toy-001', 'toy-007', 'toy-008')")
    page.click("#compare")
    ask(page, "Say 7", "blue 49")
    page.locator("[data-side='1'] article").first.wait_for()
    buttons = page.locator('article[data-sample="toy-007"] [data-does=mark]')
    assert buttons.count() == 2
    buttons.nth(0).click()
    assert buttons.all_text_contents() == ["Marked", "Marked"]
    page.get_by_role("button", name="Marked 1").wait_for()
    # Another tab tells of its own.
    other = page.context.new_page()
    other.goto(page.url)
    other.locator('article[data-sample="toy-007"] [data-does=mark][aria-pressed=true]').first.wait_for()
    other.locator('article[data-sample="toy-007"] [data-does=mark]').nth(1).click()
    page.get_by_role("button", name="Marked 0").wait_for()
    assert buttons.all_text_contents() == ["Mark", "Mark"]
    # And where that is not heard in time, a button does what it says.
    name = next(name for name in page.evaluate("Object.keys(localStorage)") if name.endswith(".marked"))
    page.evaluate("([name, text]) => localStorage.setItem(name, text)", [name, '[["toy-007", "x"], ["toy-008", "y"]]'])
    assert buttons.nth(0).text_content() == "Mark"
    buttons.nth(0).click()
    page.get_by_role("button", name="Marked 2").wait_for()
    page.get_by_role("button", name="Marked 2").click()
    page.evaluate("([name, text]) => localStorage.setItem(name, text)", [name, '[["toy-001", "x"], ["toy-008", "y"]]'])
    assert [line["id"] for line in saved_lines(page, "#save-ids")] == ["toy-001", "toy-008"]
    assert len(saved_lines(page, "#save-clean")) == 25 - 2


# What is shown when something fails, and when nothing new was asked.


def test_a_page_does_not_take_another_database_for_its_own(visit, made, tmp_path, models, adapters):
    other = rapidin_vdb.init(tmp_path / "else", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    other.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(5)))
    with whole.serving(made) as address:
        page = visit(to=address)
        ask(page, "Say 5", "blue 35")
        page.locator("article [data-does=mark]").first.click()
        page.get_by_role("button", name="Marked 1").wait_for()
        assert page.locator("#moved").is_hidden()
    port = int(address.split(":")[2].strip("/"))
    with whole.serving(other, port=port):
        # Its marks, its history and what was asked are not those of this one.
        ask(page, "Say 6", "blue 42")
        page.get_by_text("else: 5 samples").wait_for()
        page.locator("article").nth(4).wait_for()
        assert settled(page).startswith("5 of 5 ") and page.locator("#moved").is_visible()
        page.get_by_role("button", name="Marked 0").wait_for()
        page.locator("article [data-does=mark]").first.click()
        page.reload()
        page.get_by_role("button", name="Marked 1").wait_for()
        assert page.locator("#moved").is_hidden()
        page.get_by_role("button", name="Marked 1").click()
    with whole.serving(made, port=port):
        # Nor does a cleaned file leave out what was marked there.
        page.click("#save-clean")
        page.get_by_text("db: 28 samples").wait_for()
        page.get_by_role("button", name="Marked 1").wait_for()
        assert page.locator("#moved").is_visible()
    assert {key.split(".")[1] for key in page.evaluate("Object.keys(localStorage)")} == {made.identity, other.identity}


def test_a_mark_is_of_the_texts_that_were_read(visit, tmp_path, models, adapters):
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    records = toy_records(4)
    records[2] |= {"instruction": "Sag \U0001f40d \u00e4\u4e16", "output": "blau \U0001f40d"}
    made.ingest(write_jsonl(tmp_path / "toy.jsonl", records))
    with whole.serving(made) as address:
        page = visit(to=address, samples=4)
        page.get_by_role("button", name="Browse").click()
        for number in (1, 2):
            page.locator(f'article[data-sample="toy-00{number}"] [data-does=mark]').click()
        page.get_by_role("button", name="Marked 2").click()
        assert [line["id"] for line in saved_lines(page, "#save-clean")] == ["toy-000", "toy-003"]
        changed = [records[2] | {"output": "blau \U0001f422"}]
        made.ingest(write_jsonl(tmp_path / "changed.jsonl", changed), on_duplicate="replace")
        page.click("#save-clean")
        page.get_by_text("other texts by now than when they were marked, such as toy-002").wait_for()
        # Nor by its id alone.
        with page.expect_response("**/api/export"):
            page.click("#save-ids")
        page.get_by_text("such as toy-002").wait_for()
        with page.expect_response("**/api/export"):
            page.set_input_files("#own-file", tmp_path / "changed.jsonl")
        page.get_by_text("such as toy-002").wait_for()
        page.locator('article[data-sample="toy-002"]').get_by_role("button", name="Unmark").click()
        assert {line["id"] for line in saved_lines(page, "#save-clean")} == {"toy-000", "toy-002", "toy-003"}


def test_nothing_dead_is_left_standing(visit):
    page, held = visit(), []
    ask(page, "Say 5", "blue 35", top_k=2)
    assert len(cards(page)) == 2
    page.fill("#where", "nosuch = 1")
    page.evaluate("document.querySelector('#go').click()")
    page.locator("#status.error", has_text="No field named nosuch").wait_for()
    assert cards(page) == [] and page.locator("#generation").count() == 0
    ask(page, "Say 5", "blue 35", where="")
    assert len(cards(page)) == 2
    page.route("**/api/query*", lambda route: held.append(route))
    page.fill("#generated", "blue 36")
    page.click("#go")
    page.locator("#stop").click()
    page.locator("#status", has_text="Stopped.").wait_for()
    assert cards(page) == [] and page.locator("#generation").count() == 0
    page.route("**/api/nearest*", lambda route: route.abort())
    page.click('[data-view="browse"]')
    page.locator("article a.id").first.click()
    near = page.locator("#nearest")
    near.get_by_text("Not found out: The server does not answer. Is it still running?").wait_for()
    page.unroute("**/api/nearest*")
    page.route("**/api/nearest*", lambda route: held.append(route))
    page.go_back()
    page.locator("article a.id").nth(1).click()
    near.get_by_text("searching").wait_for()
    page.locator("#stop").click()
    near.get_by_text("Not found out: Stopped.").wait_for()


def test_the_answer_is_there_when_one_comes_back(visit):
    page = visit()
    ask(page, "Say 5", "blue 35", top_k=2)
    before, asked = cards(page), [url for url in page.asked if "/api/query" in url]
    page.click('[data-view="browse"]')
    page.get_by_text("1 to 20 of 28").first.wait_for()
    page.click('[data-view="ask"]')
    page.locator("#generation").wait_for()
    assert cards(page) == before
    assert [url for url in page.asked if "/api/query" in url] == asked
    # Asked again it is asked anew, as there may be other samples now.
    page.click("#go")
    settled(page)
    page.wait_for_timeout(200)
    assert settled(page) and len([url for url in page.asked if "/api/query" in url]) > len(asked)
    # A question that was changed has no answer yet, and stays as it was written.
    page.fill("#generated", "blue 36")
    page.click('[data-view="browse"]')
    page.get_by_text("1 to 20 of 28").first.wait_for()
    page.click('[data-view="ask"]')
    page.get_by_text("Paste what a model said").wait_for()
    assert page.input_value("#generated") == "blue 36" and page.locator("#generation").count() == 0


def test_a_legend_is_that_of_the_colours_beside_it(visit):
    page = visit()
    ask(page, "Say 5", "blue 35", top_k=3)
    ends = page.locator(".sticky .legend .number")
    before = ends.all_text_contents()
    page.locator("article .choice").nth(2).click()
    page.locator("#driven").wait_for()
    scores = page.locator("#driven .piece").evaluate_all("all => all.map((one) => Math.abs(Number(one.dataset.score)))")
    low, high = (float(text) for text in ends.all_text_contents())
    assert -low == high == pytest.approx(max(scores), rel=1e-2)
    assert ends.all_text_contents() != before
    assert before[1].removeprefix("+") in page.locator(".sticky .legend .soft").text_content()


def test_what_a_browser_keeps_may_be_forbidden_or_wrong(visit, made):
    forbid = (
        "Object.defineProperty(window, 'sessionStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    page = visit(before=lambda page: page.add_init_script(forbid))
    assert page.complaints == []
    wrong = "sessionStorage.setItem('rapidin.token', '\u9ec4'.repeat(20));"
    page = visit(before=lambda page: page.add_init_script(wrong))
    assert page.complaints == []
    with whole.serving(made, token="0123456789abcdef") as there:
        page = visit(to=there, samples=None)
        page.fill("#secret-text", "\u9ec4" * 16)
        page.keyboard.press("Enter")
        page.locator("#status.error", has_text="only the letters, digits and signs of ASCII").wait_for()
        page.get_by_role("button", name="Try again").click()
        page.fill("#secret-text", "0123456789abcdef")
        page.keyboard.press("Enter")
        page.get_by_text("db: 28 samples").wait_for()
        page.reload()
        page.get_by_text("db: 28 samples").wait_for()


def test_an_export_that_breaks_off_is_said(visit):
    page = visit()
    page.click('[data-view="marked"]')
    # The server's own answer, less what it ends with.
    page.evaluate(
        """() => {
          const whole = window.fetch;
          window.fetch = async (...asked) => {
            const answer = await whole(...asked);
            const text = await answer.text();
            return new Response(text.slice(0, text.lastIndexOf("event: result")), answer);
          };
        }"""
    )
    page.click("#save-clean")
    page.locator("#status.error").wait_for()
    assert page.locator("#status").text_content() == "The server stopped in the middle of its answer."


# Training files.


def test_ones_own_file_is_cleaned_byte_for_byte(visit, tmp_path):
    page = visit()
    page.click('[data-view="browse"]')
    page.fill("#browse-where", "sample_id IN ('toy-003', 'toy-005', 'toy-007')")
    page.get_by_role("button", name="Show").click()
    for name in ("toy-003", "toy-005", "toy-007"):
        page.locator(f'article[data-sample="{name}"] [data-does=mark]').click()
    page.get_by_role("button", name="Marked 3").click()
    lines = [
        b'\xef\xbb\xbf{"id": "toy-001", "tags": ["a", {"b": 1.50}],  "output": "\\u00e9 \xc3\xa9"}\r\n',
        b'{"output": "x", "id":"toy-003"}\n',
        b"\n",
        b'{"id": 17, "n": 12345678901234567890.0}\n',
        b'{"id": "toy-0\\u0303", "id": "toy-005"}\n',
        b'  {"id": "toy-003 "}\n',
        b'{"id": "long", "output": "' + b"x" * 200_000 + b'"}\n',
        b'{"id": "toy-005", "again": true}\n',
        b'{"id": "last"}',
    ]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"".join(lines))
    with page.expect_download() as saved:
        page.set_input_files("#own-file", path)
    assert saved.value.suggested_filename == "cleaned-mine.jsonl"
    assert saved.value.path().read_bytes() == b"".join(lines[place] for place in (0, 2, 3, 5, 6, 8))
    assert settled(page) == "Saved cleaned-mine.jsonl: 5 of 8 lines. 1 marked sample is not in the file."
    # Ids that were derived from the content are not to be found there.
    path.write_text('{"id": "toy-003"}\n{"output": "nameless"}\n')
    with page.expect_download() as saved:
        page.set_input_files("#own-file", path)
    assert saved.value.path().read_text() == '{"output": "nameless"}\n'
    assert "1 line has no id in the field id" in settled(page) and "cannot tell whether it is marked" in settled(page)
    path.write_text('{"uid": "toy-003"}\n{"uid": "b"}\n')
    page.set_input_files("#own-file", path)
    page.locator("#status.error", has_text="Nothing is saved: no line of mine.jsonl has the id").wait_for()
    page.fill("#own-id", "uid")
    with page.expect_download() as saved:
        page.set_input_files("#own-file", path)
    assert saved.value.path().read_text() == '{"uid": "b"}\n'
    for wrong in (b"id,output\ntoy-003,x\n", b"\x1f\x8b\x08\x00", b'[{"id": "toy-003"}]'):
        path.write_bytes(wrong)
        page.set_input_files("#own-file", path)
        page.locator("#status.error", has_text="Line 1 of the file is no JSON object").wait_for()
        page.click('[data-view="marked"]')
        page.locator("#status:not(.error)").wait_for(state="attached")
    assert page.complaints == []


def test_what_cannot_be_restored_is_said_before_it_is_saved(visit, mixed):
    page = visit(to=mixed, samples=6)
    page.click('[data-view="marked"]')
    page.fill("#clean-where", "")
    page.click("#save-clean")
    page.get_by_text("1 record of 6 cannot be restored exactly").wait_for()
    assert settled(page) == "Not saved yet."
    records = {record["id"]: record for record in saved_lines(page, "#to-save button")}
    assert records["plain"] == json.loads(RECORDS[0]) and "tags" not in records["listed"]
    assert page.locator("#to-save").text_content() == ""


def test_what_waits_to_be_saved_outlives_what_others_ask(visit, mixed):
    page = visit(to=mixed, samples=6)
    page.evaluate(
        """() => { window.heard = [];
          window.addEventListener("storage", ({ key }) => window.heard.push(key.split(".").pop())); }"""
    )
    page.click('[data-view="marked"]')
    page.fill("#clean-where", "")
    page.click("#save-clean")
    page.locator("#to-save button").wait_for()
    other = page.context.new_page()
    other.goto(mixed)
    other.get_by_text("db: 6 samples").wait_for()
    ask(other, "Say 5", "blue 35", top_k=6)
    page.wait_for_function("window.heard.includes('history')")
    assert len(saved_lines(page, "#to-save button")) == 6
    # It is without what was marked, which is what is shown: once something else is, it is no more to be had.
    page.click("#save-clean")
    page.locator("#to-save button").wait_for()
    other.locator('article[data-sample="plain"] [data-does=mark]').click()
    page.get_by_role("button", name="Marked 1").wait_for()
    page.locator("#to-save", has_text="What is marked has changed since: save the samples again.").wait_for()
    assert page.locator("#to-save button").count() == 0 and page.locator("main article").count() == 1
    page.click("#save-clean")
    page.locator("#to-save button").wait_for()
    page.click('[data-view="history"]')
    page.locator("#to-save").wait_for(state="hidden")
    page.click('[data-view="marked"]')
    page.locator("main article").wait_for()
    assert page.locator("#to-save").text_content() == "", "records are not held for nobody"


def test_how_many_match_is_counted_where_they_are_written(visit):
    page = visit()
    page.click('[data-view="browse"]')
    page.locator("article [data-does=mark]").first.click()
    page.click('[data-view="marked"]')
    page.fill("#clean-where", "")

    def grown(route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.text().replace('"matching": 28', '"matching": 1030'))

    page.route("**/api/export", grown)
    page.asked.clear()
    assert len(saved_lines(page, "#save-clean")) == 27
    assert settled(page) == "Saved cleaned.jsonl: 27 samples. Of the 1,030 that match, 1,003 are marked and left out."
    assert [url.rpartition("/")[2] for url in page.asked if "/api/" in url] == ["export"]


def test_an_export_without_room_is_said(visit, monkeypatch):
    monkeypatch.setattr("rapidin_vdb.web.export._IN_MEMORY", 100)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    page = visit()
    page.click('[data-view="marked"]')
    page.click("#save-clean")
    page.locator("#status.error", has_text="Make room in /nowhere, or name a folder that has some").wait_for()


RECORDS = [
    json.dumps({"id": "plain", "instruction": "Say 1", "input": "", "output": "red 7"}),
    json.dumps({"id": "listed", "instruction": "Say 2", "output": "blue 14", "tags": ["a"]}),
    *[
        json.dumps(
            {"id": f"s{n}", "instruction": f"Say {n}", "output": "red", "source": f"{n}" + "long" * 40, "note": n}
        )
        for n in range(4)
    ],
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, models, adapters, made):
    """A database of records with and without a source, whose samples have few tokens."""
    folder = tmp_path_factory.mktemp("mixed")
    other = whole.rapidin_vdb.init(
        folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, template="text",
        max_tokens=24,
    )  # fmt: skip
    (folder / "mixed.jsonl").write_text("\n".join(RECORDS))
    other.ingest(folder / "mixed.jsonl")
    with whole.serving(other) as there:
        yield there


def test_what_has_no_value_can_be_asked_for(visit, mixed):
    page = visit(to=mixed, samples=6)
    page.click('[data-view="browse"]')
    choose(page, "source", "(none)", place="browse-filters")
    page.locator('#browse-filters input[type=checkbox][data-column="note"]').check()
    assert page.input_value("#browse-where") == "`source` IS NULL AND `note` IS NULL"
    page.get_by_role("button", name="Show").click()
    page.get_by_text("1 to 2 of 2").wait_for()
    assert set(cards(page)) == {"plain", "listed"}
    page.reload()
    page.get_by_text("1 to 2 of 2").wait_for()
    assert chosen(page, "source", place="browse-filters") == "(none)"
    assert page.locator('#browse-filters input[type=checkbox][data-column="note"]').is_checked()


def test_a_generation_that_was_cut_is_not_called_whole(visit, mixed):
    page = visit(to=mixed, samples=6)
    ask(page, "Say 5", "blue 35 and much more than fits", top_k=1)
    cut = page.locator("#generation .cut").text_content()
    assert cut and "blue 35 and much more than fits".endswith(cut)
    assert page.locator("#about").text_content() == "influence on the generation up to the largest number of tokens"
    ask(page, "Say 5", "blue 35")
    assert page.locator("#generation .cut").count() == 0
    assert page.locator("#about").text_content() == "influence on the whole generation"


# Eyes and hands.


def test_a_long_source_fits_a_phone(visit, mixed):
    page = visit(to=mixed, samples=6, width=390)
    page.select_option("#group_by", "source")
    ask(page, "Say 5", "blue 35")
    assert page.locator(".groups tbody tr").count() == 5
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    for view in ("ask", "browse", "marked"):
        page.click(f'[data-view="{view}"]')
        settled(page)
        wide = page.evaluate(
            "() => [...document.querySelectorAll('*')].filter((one) => one.getBoundingClientRect().right > window.innerWidth + 1).map((one) => one.outerHTML.slice(0, 100))"
        )
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (view, wide)
    page.click('[data-view="ask"]')
    bars = page.locator(".groups .bar").evaluate_all("all => all.map((one) => one.getBoundingClientRect().right)")
    assert bars and max(bars) <= 390, "nothing is cut off on the right either"


CONTRASTS = """() => {
    const numbers = (colour) => { const found = colour.match(/[\\d.]+/g).map(Number); return found.length < 4 ? [...found, 1] : found; };
    const over = (top, below) => [0, 1, 2].map((n) => top[n] * top[3] + below[n] * (1 - top[3])).concat(1);
    const behind = (element) => {
        if (!element) return [255, 255, 255, 1];
        const own = numbers(getComputedStyle(element).backgroundColor);
        return own[3] === 1 ? own : over(own, behind(element.parentElement));
    };
    const light = (colour) => { const [r, g, b] = colour.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const texts = [...document.querySelectorAll("body *")].filter((one) => one.getClientRects().length && !one.disabled
        && ([...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || one.matches("input, textarea, select")));
    return { page: light(behind(document.body)), texts: texts.map((one) => {
        const back = behind(one), ink = light(over(numbers(getComputedStyle(one).color), back)), paper = light(back);
        return [(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), one.outerHTML.slice(0, 120)];
    }) };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(visit, scheme):
    page = visit(scheme=scheme)
    ask(page, "Say 5", "blue 35", top_k=4)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.locator("#generation .choice").first.click()
    seen = []
    for view in ("ask", "browse", "marked", "history", "error"):
        if view == "error":
            page.click('[data-view="ask"]')
            page.fill("#where", "nosuch = 1")
            page.click("#go")
            page.locator("#status.error").wait_for()
        elif view != "ask":
            page.click(f'[data-view="{view}"]')
            settled(page)
        found = page.evaluate(CONTRASTS)
        assert found["page"] < 0.05 if scheme == "dark" else found["page"] > 0.8
        assert [text for text in found["texts"] if text[0] < 4.5] == [], view
        seen += found["texts"]
    assert len(seen) > 100


def test_the_keyboard_reaches_filters_and_training_tokens(visit):
    page = visit()
    whole.tab_to(page, "#prompt")
    page.keyboard.type("Say 5")
    whole.tab_to(page, "#generated")
    page.keyboard.type("blue 35")
    whole.tab_to(page, "#among summary")
    page.keyboard.press("Enter")
    whole.tab_to(page, '#filters select[data-column="source"]')
    page.keyboard.type("even")
    assert page.input_value("#where") == "`source` = 'even'"
    whole.tab_to(page, "#go")
    page.keyboard.press("Enter")
    page.locator("article").first.wait_for()
    settled(page)
    assert all(int(name[-3:]) % 2 == 0 for name in cards(page))
    whole.tab_to(page, "article .choice")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    settled(page)
    assert page.locator("#about").text_content() == "what the pressed training token drives"
    assert page.evaluate("document.activeElement.closest('article') !== null"), "and stays where it was"


# Samples, numbers and links that are out of the ordinary.


@pytest.fixture(scope="module")
def odd(tmp_path_factory, models, adapters, made):
    """A database of ids that are no part of a path, and of numbers that JavaScript rounds."""
    folder = tmp_path_factory.mktemp("odd")
    other = whole.rapidin_vdb.init(
        folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, template="text"
    )
    records = [
        {"id": name, "instruction": f"Say {n}", "output": "red", "code": 9007199254740993 + n}
        for n, name in enumerate((".", "..", "a\nb"))
    ]
    (folder / "odd.jsonl").write_text("\n".join(map(json.dumps, records)))
    other.ingest(folder / "odd.jsonl")
    with whole.serving(other) as there:
        yield there


def test_every_sample_can_be_opened(visit, odd):
    page = visit(to=odd, samples=3)
    for number, name in enumerate((".", "..", "a\nb")):
        page.click('[data-view="browse"]')
        page.locator("article a.id").nth(number).click()
        page.locator("#nearest article").first.wait_for()
        assert page.locator("#whole-sample h2").text_content() == name
        assert settled(page) == "" and len(cards(page)) == 3
        shares = page.locator("#nearest .bar > i").evaluate_all(
            "all => all.map((i) => i.style.getPropertyValue('--share'))"
        )
        assert max(map(float, shares)) == 1.0, "of those that are shown"
    assert page.complaints == []


def test_whole_numbers_stay_whole(visit, odd):
    page = visit(to=odd, samples=3)
    page.click('[data-view="browse"]')
    page.locator(".chip", has_text="code: 9007199254740993").wait_for()
    for end in (">=", "<="):
        put(page, "code", f'[data-end="{end}"]', "9007199254740993", place="browse-filters")
    assert page.input_value("#browse-where") == "`code` >= 9007199254740993 AND `code` <= 9007199254740993"
    page.get_by_role("button", name="Show").click()
    page.get_by_text("1 to 1 of 1").wait_for()
    assert cards(page) == ["."]


def test_texts_have_controls_too(visit):
    page = visit()
    put(page, "prompt", '[type="text"]', "SAY 7")
    put(page, "response", '[type="text"]', "9")
    assert page.input_value("#where") == "contains(lower(`prompt`), 'say 7') AND contains(lower(`response`), '9')"
    ask(page, "Say 5", "blue 35")
    assert cards(page) == ["toy-007"]


@pytest.mark.parametrize(
    "link",
    [
        '#ask={"generated":"blue","where":null}', '#ask={"generated":"blue","focus":"x"}', '#ask={"generated":["x"]}',
        '#compare=[{"generated":"blue"},{"generated":"red","prompt":1}]', "#sample", "#sample=7", '#browse={"where":null}',
    ],
)  # fmt: skip
def test_a_damaged_link_is_said(visit, link):
    page = visit(link=link)
    page.locator("#status.error", has_text="This link is damaged.").wait_for()
    assert not [url for url in page.asked if "api/sample" in url or "api/query" in url] and page.complaints == []


def test_marks_have_room_beside_what_was_asked(visit):
    page = visit()
    identity = page.evaluate("fetch('api/info').then((found) => found.json())")["identity"]
    page.evaluate(
        """(name) => localStorage.setItem(name, JSON.stringify(Array.from({ length: 20 }, (_, n) =>
            ({ view: "ask", value: { generated: n + "x".repeat(1e5), prompt: "", where: "", focus: [] }, at: "2026-01-01" }))))""",
        f"rapidin.{identity}.history",
    )
    ask(page, "Say 5", "blue 35", top_k=1)
    assert page.evaluate("name => localStorage.getItem(name).length", f"rapidin.{identity}.history") < 1.1e6
    page.click('[data-view="history"]')
    page.locator("article").nth(7).wait_for()  # the view that was left has one, and may be there a moment longer
    assert 8 <= page.locator("article").count() <= 11 and "blue 35" in page.locator("article").first.text_content()
    # Where there is no room all the same, it is said.
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    page.click('[data-view="browse"]')
    page.locator("article button", has_text="Mark").first.click()
    page.locator("#status.error", has_text="what is marked is lost when this page is closed").wait_for()
    page.get_by_role("button", name="Marked 1").wait_for()


def test_a_phone_does_not_enlarge_what_is_typed_into(visit):
    page = visit(width=390)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    sizes = page.evaluate(
        "() => [...document.querySelectorAll('input:not([type=checkbox]), textarea, select')].map((one) => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert sizes and min(sizes) >= 16
    tops = page.evaluate(
        """() => [...document.querySelectorAll('#filters input[type=text]')].map((one) =>
            [one.parentElement.firstChild, one].map((node) => { const range = document.createRange(); range.selectNode(node); return range.getBoundingClientRect().top; }))"""
    )
    assert tops and all(label < box for label, box in tops), "a label stands above its box"
    boxes = page.locator("#filters input[type=checkbox]").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect().width)"
    )
    assert boxes and max(boxes) < 24, "and none stands beside its own"
