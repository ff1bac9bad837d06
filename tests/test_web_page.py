"""A whole visit in headless Chromium: from a pasted generation to a cleaned training file; and who cannot use a mouse."""

import json
import re
import shutil
from contextlib import contextmanager
from urllib.parse import unquote

import pytest
from conftest import toy_records, write_jsonl
from test_page import CHROMIUM, FLAGS, HOSTILE

import rapidin_vdb

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from servers import listening

from rapidin_vdb.web import make_app


@contextmanager
def serving(made, *, port=0, **options):
    with listening(make_app(made, **options), port=port) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def made(tmp_path_factory, models, adapters):
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    pytest.importorskip("playwright.sync_api")
    folder = tmp_path_factory.mktemp("visit")
    made = rapidin_vdb.init(
        folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, template="text"
    )
    late = [record | {"id": f"late-{record['id']}", "split": "late"} for record in toy_records(3, first=30)]
    hostile = {"id": "<b>hostile</b>", "instruction": HOSTILE, "output": HOSTILE, "source": "<i>odd</i>", "stars": 9}
    made.ingest(write_jsonl(folder / "toy.jsonl", [*toy_records(24), *late, hostile]))
    made.load()
    made.query("Say 5", "blue 35", tokens=True)  # what is compiled at the first time
    return made


@pytest.fixture(scope="module")
def address(made):
    with serving(made) as address:
        yield address


@pytest.fixture(scope="module")
def driver():
    """A browser; a page has a fresh profile in it, as private as one in a browser of its own."""
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(driver, address):
    """Yield a function that opens the page in a fresh profile."""
    contexts = []

    def open_page(*, width=1200, scheme="light", link="", to=address, token=None, before=None, samples=28):
        context = driver.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        if before is not None:
            before(page)
        page.goto(to + link)
        if token is not None:
            page.fill("#secret-text", "not this one")
            page.keyboard.press("Enter")
            page.locator("#secret-text:focus").wait_for()
            page.fill("#secret-text", token)
            page.keyboard.press("Enter")
        page.set_default_timeout(120_000)  # the machine may be busy
        if samples:
            page.get_by_text(f"db: {samples} samples").wait_for()
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            # What a test has let pass is on its way perhaps; where it fails, the next test would be told.
            page.unroute_all(behavior="ignoreErrors")
        context.close()


def ask(page, prompt, generation, **options) -> None:
    page.fill("#prompt", prompt)
    page.fill("#generated", generation)
    for name, value in options.items():
        page.evaluate("document.querySelector('#among').open = true")
        page.fill(f"#{name}", str(value))
    page.click("#go")
    settled(page)


def settled(page) -> str:
    page.locator("main:not([aria-busy])").wait_for(state="attached")
    page.locator("#status:not(.busy)").wait_for(state="attached")
    return page.locator("#status").text_content()


def cards(page) -> list[str]:
    return page.locator("article").evaluate_all("all => all.map((one) => one.dataset.sample)")


def saved_lines(page, button: str) -> list[dict]:
    with page.expect_download() as saved:
        page.click(button)
    return [json.loads(line) for line in saved.value.path().read_text("utf-8").splitlines()]


TRAINED = {f"toy-{n:03d}" for n in range(24)} | {"<b>hostile</b>"}


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_from_a_generation_to_a_cleaned_file(visit, address, made, width, scheme):
    page = visit(width=width, scheme=scheme)
    ask(page, "Say 5", "blue 35 blue", top_k=4)
    assert re.match(r"4 of 28 samples, in [0-9.]+ s", settled(page))
    first = cards(page)
    assert len(first) == 4 and page.locator(".histogram .mark").count() == 4
    assert page.locator(".groups tbody tr").count() == 3, "influence by source, of all that were searched"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # Words are pressed: the samples are recoloured, then ranked by these words alone, not by others that read the same.
    for number in (1, 9):  # the first l, and the second
        page.locator("#generation .choice").nth(number).click()
        settled(page)
    assert page.locator("#about").text_content() == "influence on l l"
    page.click("#refocus")
    # The answer of before is still there, and settled, until the new one comes.
    page.locator("#about", has_text="influence on l, l").wait_for()
    settled(page)
    assert page.locator("#about").text_content() == "influence on l, l"
    assert [entry for entry in json.loads(unquote(page.url.split("#ask=")[1]))["focus"]] == [[1, 2], [9, 10]]
    assert page.locator(".focused").count() == 2
    wanted = made.query("Say 5", "blue 35 blue", top_k=4, focus=[(1, 2), (9, 10)])[0].results
    assert cards(page) == [result.sample_id for result in wanted]
    # A training token is pressed: the generation shows what it drives.
    page.locator("article .choice").first.click()
    settled(page)
    assert page.locator("#about").text_content() == "what the pressed training token drives"
    assert page.locator("#driven .piece").count() == len("blue 35 blue") + 1
    page.click("#whole")
    page.locator("#about", has_text="influence on the whole generation").wait_for()
    settled(page)
    assert cards(page) == first
    # A filter that is wrong is said; then one that is right.
    page.evaluate("document.querySelector('#among').open = true")
    page.fill("#where", "nosuch = 1")
    page.click("#go")
    page.locator("#status.error", has_text="No field named nosuch").wait_for()
    page.fill("#where", "split = 'train'")
    page.click("#go")
    page.locator("#status", has_text="4 of 25 samples").wait_for()
    ranked = cards(page)
    # Marked, saved without them, and the ids saved: of what was searched among, and no more.
    for place in (0, 2):
        page.locator("article button", has_text="Mark").nth(place).click()
    page.get_by_role("button", name="Marked 2").click()
    assert page.input_value("#clean-where") == "`split` = 'train'", "what was trained on"
    records = saved_lines(page, "#save-clean")
    assert {record["id"] for record in records} == TRAINED - {ranked[0], ranked[2]}
    assert settled(page) == "Saved cleaned.jsonl: 23 samples. Of the 25 that match, 2 are marked and left out."
    page.fill("#clean-where", "")
    assert len(saved_lines(page, "#save-clean")) == 26
    assert saved_lines(page, "#save-ids") == [{"id": name} for name in (ranked[0], ranked[2])]
    # History, and a link that asks the same again in another browser.
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="Ask again").first.wait_for()  # until then the marked samples are there
    assert page.locator("article").count() == 3
    page.get_by_role("button", name="Ask again").nth(0).click()
    page.locator("#generation").wait_for()
    assert cards(page) == ranked
    link = page.url.removeprefix(address)
    other = visit(link=link)
    other.locator("#generation").wait_for()
    assert cards(other) == ranked and "blue 35" in unquote(link)
    assert page.complaints == other.complaints == []
    assert all(url.startswith(address) or url.startswith("blob:") for url in page.asked)


def test_what_is_kept_belongs_to_a_database(visit, made, tmp_path, models, adapters):
    """Another database behind the same address has other marks."""
    other = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    other.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(27)))
    with serving(made) as there:
        page = visit(to=there)
        page.get_by_role("button", name="Browse").click()
        page.locator("article button", has_text="Mark").first.click()
        page.get_by_role("button", name="Marked 1").wait_for()
        page.locator('[data-view="ask"]').click()
        ask(page, "Say 5", "blue 35", top_k=1)
    port = int(there.rstrip("/").rpartition(":")[2])
    for database, name, marks, asked in ((other, "db: 27 samples", 0, 0), (made, "db: 28 samples", 1, 1)):
        with serving(database, port=port):  # as when a server is started anew
            page.goto("about:blank")
            page.goto(there)
            page.get_by_text(name).wait_for()
            page.get_by_role("button", name=f"Marked {marks}").wait_for()
            page.get_by_role("button", name="History").click()
            page.get_by_text("Nothing was asked yet." if not asked else "Forget all").wait_for()
            assert page.locator("article").count() == asked


def test_filters_and_what_is_wrong_with_them(visit):
    page = visit()
    page.click("#among summary")
    page.select_option('#filters select[data-column="source"]', label="even")
    tokens = page.locator('#filters input[data-column="tokens"][data-end=">="]')
    tokens.fill("7")
    tokens.dispatch_event("change")
    assert page.input_value("#where") == "`source` = 'even' AND `tokens` >= 7"
    page.fill("#where", "stars < 9 OR stars > 10")  # by hand, in place of what the controls wrote
    assert tokens.input_value() == ""
    page.select_option('#filters select[data-column="source"]', label="even")
    tokens.fill("8")
    tokens.dispatch_event("change")
    assert page.input_value("#where") == "(stars < 9 OR stars > 10) AND `source` = 'even' AND `tokens` >= 8"
    tokens.fill("7")
    tokens.dispatch_event("change")
    page.select_option("#group_by", "stars")
    page.select_option("#ends", "both")
    ask(page, "Say 5", "blue 35")
    assert "No sample" not in page.locator("main").text_content() and page.locator("table tbody tr").count() >= 1
    assert all(int(name[-3:]) % 2 == 0 for name in cards(page))
    page.fill("#where", "")
    name = page.locator('#filters input[data-column="sample_id"]')
    name.fill("TOY-00'")  # nothing but text, whatever its case
    name.dispatch_event("change")
    ask(page, "Say 5", "blue 35")
    assert "0 of 0 samples" in settled(page) and "No sample matches." in page.locator("main").text_content()


def test_browsing_a_sample_and_the_way_back(visit):
    page = visit()
    page.get_by_role("button", name="Browse").click()
    page.get_by_text("1 to 20 of 28").first.wait_for()
    assert len(cards(page)) == 20
    page.get_by_role("button", name="Next").first.click()
    page.get_by_text("21 to 28 of 28").first.wait_for()
    page.fill("#browse-where", "sample_id = 'toy-007'")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("1 to 1 of 1").wait_for()
    page.get_by_role("link", name="toy-007").click()
    page.locator("#nearest article").first.wait_for()
    assert settled(page) == ""
    near = cards(page)[1:]
    assert len(near) == 20 and "toy-007" not in near
    assert "".join(page.locator(".token").all_text_contents()) == "黄 49"
    assert page.locator(".token").count() == 5, "黄, a space, 4, 9, and the end"
    page.go_back()
    page.get_by_text("1 to 1 of 1").wait_for()
    page.go_back()
    page.get_by_text("21 to 28 of 28").first.wait_for()
    page.go_forward()
    page.go_forward()
    page.locator("#nearest article").first.wait_for()
    assert page.complaints == []


def test_a_late_answer_replaces_nothing(visit):
    page, held = visit(), []
    page.route("**/api/query*", lambda route: held.append(route))
    page.fill("#prompt", "Say 5")
    page.fill("#generated", "blue 35")
    page.click("#go")
    page.locator("#stop").wait_for()
    page.get_by_role("button", name="Browse").click()
    page.get_by_text("1 to 20 of 28").first.wait_for()
    held[0].continue_()
    page.wait_for_timeout(1000)
    assert page.locator("#generation").count() == 0 and len(cards(page)) == 20
    # And what takes its time can be stopped in any view.
    page.route("**/api/samples?*", lambda route: held.append(route))
    page.get_by_role("button", name="Next").first.click()
    page.locator("#stop").click()
    page.locator("#status", has_text="Stopped.").wait_for()
    assert page.locator("#stop").is_hidden()


def test_records_are_text(visit):
    page = visit()
    ask(page, HOSTILE, HOSTILE[:40], where="stars = 9")
    assert page.locator("#generation").text_content() == HOSTILE[:40]
    assert cards(page) == ["<b>hostile</b>"]
    assert page.locator("article").first.locator(".text").all_text_contents() == [HOSTILE, HOSTILE]
    page.get_by_role("link", name="<b>hostile</b>").click()
    page.locator("#nearest article").first.wait_for()
    assert page.locator("#whole-sample .text").all_text_contents() == [HOSTILE, HOSTILE]
    page.locator("#whole-sample button", has_text="Mark").click()
    page.get_by_role("button", name="Marked 1").click()
    assert cards(page) == ["<b>hostile</b>"]
    page.get_by_role("button", name="History").click()
    assert page.locator("main script, main img, main b, main i:not(.bar > i)").count() == 0
    assert page.title() == "rapidin-vdb" and page.complaints == []


def test_two_generations_side_by_side(visit):
    page = visit()
    ask(page, "Say 5", "blue 35", top_k=3)
    page.click("#compare")
    ask(page, "Say 7", "blue 49")
    sides = [page.locator(f"[data-side='{number}']") for number in (0, 1)]
    sides[1].locator("article").first.wait_for()

    def names(number: int) -> list[str]:
        return sides[number].locator("article").evaluate_all("all => all.map((one) => one.dataset.sample)")

    assert [sides[n].locator("section .text").nth(1).text_content() for n in (0, 1)] == ["blue 35", "blue 49"]
    both = set(names(0)) & set(names(1))
    assert names(0) != names(1) and len(names(0)) == len(names(1)) == 3
    assert page.locator("#shared").text_content().startswith(f"{len(both)} of the 3")
    assert page.locator(".chip.shared").count() == 2 * len(both)
    # Each side has words of its own to press.
    right, second = names(1), sides[1].locator("section .choice").nth(5)
    second.click()
    settled(page)
    assert [sides[n].locator(".about").text_content() for n in (0, 1)] == [
        "influence on the whole generation",
        "influence on 4",
    ]
    sides[1].get_by_role("button", name="Rank by the pressed words").click()
    page.locator("[data-side='1'] .focused").wait_for()
    settled(page)
    assert sides[0].locator(".focused").count() == 0
    page.go_back()
    page.locator("[data-side='1']:not(:has(.focused))").wait_for()
    assert names(1) == right
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    sides[1].locator("article").first.wait_for()
    assert names(1) == right
    sides[1].get_by_role("button", name="Keep this one only").click()
    page.locator("#generation", has_text="blue 49").wait_for()
    assert cards(page) == right and page.locator("#beside").is_hidden()
    assert page.complaints == []


def test_the_model_answers(visit):
    page = visit()
    page.fill("#prompt", "Say 5")
    page.click("#sampling summary")
    page.fill("#max_tokens", "9")
    page.click("#generate")
    page.locator("#sampled", has_text="at temperature 0, seed 0, at most 9 tokens").wait_for()
    assert page.input_value("#generated")


def tab_to(page, found: str) -> None:
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(f"document.activeElement.matches({found!r})"):
            return
    raise AssertionError(f"{found} is not reached")


def test_without_a_mouse(visit):
    page = visit()
    page.focus("#prompt")
    page.keyboard.type("Say 5")
    page.keyboard.press("Tab")
    page.keyboard.type("blue 35")
    page.keyboard.press("Control+Enter")
    page.locator("article").first.wait_for()
    settled(page)
    # A text is one stop of the keyboard; arrows go from word to word, and the place is kept when all is drawn anew.
    tab_to(page, "#generation .choice")
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    settled(page)
    assert page.locator("#about").text_content() == "influence on l"
    here = "document.activeElement.textContent + document.activeElement.getAttribute('aria-pressed')"
    assert page.evaluate(here) == "ltrue", "and stays where it was"
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    settled(page)
    assert page.locator("#about").text_content() == "influence on l the end of the text"
    tab_to(page, "#refocus")
    page.keyboard.press("Enter")
    page.locator(".focused").first.wait_for()
    settled(page)
    assert json.loads(unquote(page.url.split("#ask=")[1]))["focus"] == [[1, 2], [7, 7]], "l, and the end of the text"
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)"), "not at the top again"
    tab_to(page, "article [data-does=mark]")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "Marked"
    page.locator('[data-view="marked"]').focus()
    page.keyboard.press("Enter")
    tab_to(page, "#save-clean")
    with page.expect_download():
        page.keyboard.press("Enter")
    named = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea, button')].filter((one) => one.offsetParent)
            .filter((one) => !(one.labels && one.labels.length) && !one.textContent.trim() && !one.getAttribute('aria-label')).map((one) => one.outerHTML)"""
    )
    assert named == [], "whoever only hears the page knows what each control is for"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(visit, scheme):
    page = visit(width=390, scheme=scheme)
    ask(page, "Say 5", "b " + "long" * 14, top_k=1)  # too wide for a line
    for view in ("", "browse", "marked", "history", "compare"):
        if view == "compare":
            page.go_back()
            page.click("#compare")
            ask(page, "Say 7", "blue 49")
        elif view:
            page.locator(f'[data-view="{view}"]').click()
            settled(page)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), view
        small = page.evaluate(
            "() => [...document.querySelectorAll('button')].filter((one) => one.offsetParent && one.getBoundingClientRect().height < 24).length"
        )
        assert small == 0, "large enough to be pressed"
        if view == "history":
            page.get_by_role("button", name="Ask again").first.click()
            page.locator("#generation").wait_for()
            page.locator('[data-view="history"]').click()


def test_a_token_is_asked_for(visit, made):
    with serving(made, token="0123456789abcdef") as there:
        page = visit(to=there, token="0123456789abcdef")
        assert page.get_by_text("db: 28 samples").is_visible()


def test_a_server_that_is_gone_is_said(visit, driver):
    page = visit()
    page.route("**/api/query*", lambda route: route.abort())
    ask(page, "Say 5", "blue 35")
    assert page.locator("#status").text_content() == "The server does not answer. Is it still running?"
    assert shutil.which(CHROMIUM)
