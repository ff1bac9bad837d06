"""A whole visit in headless Chromium: from a pasted generation to a cleaned training file; and who cannot use a mouse."""

import json
import re
import shutil
import threading
from urllib.parse import unquote

import pytest
from conftest import toy_records, write_jsonl
from test_page import CHROMIUM, FLAGS, HOSTILE

import rapidin_vdb

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
from rapidin_vdb.web import make_app  # noqa: E402


@pytest.fixture(scope="module")
def address(tmp_path_factory, models, adapters):
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    pytest.importorskip("playwright.sync_api")
    folder = tmp_path_factory.mktemp("visit")
    made = rapidin_vdb.init(
        folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, template="text"
    )
    hostile = {"id": "<b>hostile</b>", "instruction": HOSTILE, "output": HOSTILE, "source": "<i>odd</i>", "stars": 9}
    made.ingest(write_jsonl(folder / "toy.jsonl", [*toy_records(24), hostile]))
    made.load()
    config = uvicorn.Config(make_app(made), host="127.0.0.1", port=0, log_level="warning")
    server, socket = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
    server.should_exit = True
    thread.join(30)
    socket.close()


@pytest.fixture(scope="module")
def driver():
    with pytest.importorskip("playwright.sync_api").sync_playwright() as driver:
        yield driver


@pytest.fixture
def visit(driver, address, tmp_path):
    """Yield a function that opens the page in a fresh profile."""
    contexts = []

    def open_page(*, width=1200, scheme="light", link=""):
        context = driver.chromium.launch_persistent_context(
            tmp_path / f"profile{len(contexts)}", executable_path=CHROMIUM, headless=True, args=FLAGS,
            color_scheme=scheme, viewport={"width": width, "height": 800}, accept_downloads=True,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address + link)
        page.get_by_text("db: 25 samples").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


def ask(page, prompt, generation, **options) -> None:
    page.fill("#prompt", prompt)
    page.fill("#generated", generation)
    for name, value in options.items():
        page.fill(f"#{name}", str(value))
    page.click("#go")
    settled(page)


def settled(page) -> str:
    page.locator("#status:not(.busy)").wait_for()
    return page.locator("#status").text_content()


def cards(page) -> list[str]:
    return page.locator("article").evaluate_all("all => all.map((one) => one.dataset.sample)")


def test_from_a_generation_to_a_cleaned_file(visit, address):
    page = visit()
    ask(page, "Say 5", "blue 35", top_k=4)
    assert re.match(r"4 of 25 samples, in [0-9.]+ s", settled(page))
    first = cards(page)
    assert first[0] == "toy-005" and len(first) == 4
    # Words are pressed: the samples are recoloured, then ranked by them alone.
    page.locator("#generation .choice", has_text="3").click()
    assert page.locator("#about").text_content() == "influence on 3"
    page.locator("#generation .choice", has_text="5").click()
    page.click("#refocus")
    settled(page)
    assert page.locator("#about").text_content() == "influence on 35"
    assert page.locator(".focused").all_text_contents() == ["3", "5"]
    # A training token is pressed: the generation shows what it drives.
    page.locator("article .choice").first.click()
    assert page.locator("#about").text_content() == "what the pressed training token drives"
    assert page.locator("#driven .piece").count() == len("blue 35") + 1
    page.click("#whole")
    settled(page)
    assert cards(page) == first and page.locator("#about").text_content() == "influence on the whole generation"
    # Marked, saved without them, and the ids saved.
    for place in (0, 2):
        page.locator("article button", has_text="Mark").nth(place).click()
    page.get_by_role("button", name="Marked 2").click()
    with page.expect_download() as saved:
        page.click("#save-clean")
    records = [json.loads(line) for line in saved.value.path().read_text("utf-8").splitlines()]
    assert {record["id"] for record in records} == {f"toy-{n:03d}" for n in range(24)} - {first[0], first[2]} | {
        "<b>hostile</b>"
    }
    with page.expect_download() as saved:
        page.click("#save-ids")
    assert saved.value.path().read_text().splitlines() == [
        json.dumps({"id": name}, separators=(",", ":")) for name in (first[0], first[2])
    ]
    # History, and a link that asks the same again in another browser.
    page.get_by_role("button", name="History").click()
    assert page.locator("article").count() == 2
    page.get_by_role("button", name="Ask again").nth(0).click()
    settled(page)
    assert cards(page) == first
    link = page.url.removeprefix(address)
    other = visit(link=link)
    other.locator("article").first.wait_for()
    assert cards(other) == first and "blue 35" in unquote(link)
    assert page.complaints == other.complaints == []
    assert all(url.startswith(address) or url.startswith("blob:") for url in page.asked)


def test_filters_and_what_is_wrong_with_them(visit):
    page = visit()
    page.select_option('#filters select[data-column="source"]', label="even")
    page.locator('#filters input[data-column="tokens"][data-end=">="]').fill("7")
    page.locator('#filters input[data-column="tokens"][data-end=">="]').dispatch_event("change")
    assert page.input_value("#where") == "`source` = 'even' AND `tokens` >= 7"
    page.select_option("#group_by", "stars")
    page.select_option("#ends", "both")
    ask(page, "Say 5", "blue 35")
    assert "No sample" not in page.locator("main").text_content() and page.locator("table tbody tr").count() > 1
    assert all(int(name[4:]) % 2 == 0 for name in cards(page))
    page.fill("#where", "nosuch = 1")
    page.click("#go")
    page.locator("#status.error").wait_for()
    assert "No field named nosuch" in page.locator("#status").text_content()
    assert (
        page.complaints == ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]
        or not page.complaints
    )
    ask(page, "Say 5", "blue 35", where="stars = 4")
    assert page.locator("#status.error").count() == 0 and len(cards(page)) == 8


def test_browsing_and_nearest(visit):
    page = visit()
    page.get_by_role("button", name="Browse").click()
    settled(page)
    assert len(cards(page)) == 20 and "1 to 20 of 25" in page.locator("main").text_content()
    page.get_by_role("button", name="Next").click()
    page.get_by_text("21 to 25 of 25").wait_for()
    page.fill("#browse-where", "sample_id = 'toy-007'")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("1 to 1 of 1").wait_for()
    page.get_by_role("button", name="Nearest by influence").click()
    page.get_by_text("Nearest to toy-007").wait_for()
    assert cards(page)[0] == "toy-007" and len(cards(page)) == 20


def test_records_are_text(visit):
    page = visit()
    ask(page, HOSTILE, HOSTILE, top_k=3)
    assert cards(page)[0] == "<b>hostile</b>"
    assert page.locator("article").first.locator(".text").all_text_contents() == [HOSTILE, HOSTILE]
    assert page.locator("main script, main img, main b, main i:not(.bar > i)").count() == 0
    assert page.title() == "rapidin-vdb" and page.complaints == []


def test_two_generations_side_by_side(visit):
    page = visit()
    ask(page, "Say 5", "blue 35", top_k=2)
    page.click("#compare")
    ask(page, "Say 7", "blue 49", top_k=2)
    columns = page.locator(".columns > div")
    assert columns.count() == 2
    assert columns.nth(0).locator("article").first.get_attribute("data-sample") == "toy-005"
    assert [columns.nth(n).locator("section .text").nth(1).text_content() for n in (0, 1)] == ["blue 35", "blue 49"]
    names = [
        columns.nth(n).locator("article").evaluate_all("all => all.map((one) => one.dataset.sample)") for n in (0, 1)
    ]
    assert names[0] != names[1] and len(names[0]) == len(names[1]) == 2


def test_the_model_answers(visit):
    page = visit()
    page.fill("#prompt", "Say 5")
    page.click("#sampling summary")
    page.fill("#max_tokens", "9")
    page.click("#generate")
    settled(page)
    page.locator("#sampled", has_text="at temperature 0, seed 0, at most 9 tokens").wait_for()
    assert page.input_value("#generated")


def test_without_a_mouse(visit):
    page = visit()
    page.focus("#prompt")
    page.keyboard.type("Say 5")
    page.keyboard.press("Tab")
    page.keyboard.type("blue 35")
    page.keyboard.press("Control+End")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "go":
            break
    page.keyboard.press("Enter")
    page.locator("article").first.wait_for()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#generation') !== null"):
            break
    page.keyboard.press(" ")
    assert page.locator("#about").text_content() == "influence on b"
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true", "and stays where it was"
    named = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea, button')].filter((one) => one.offsetParent)
            .filter((one) => !(one.labels && one.labels.length) && !one.textContent.trim() && !one.getAttribute('aria-label')).map((one) => one.outerHTML)"""
    )
    assert named == [], "whoever only hears the page knows what each control is for"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(visit, scheme):
    page = visit(width=390, scheme=scheme)
    ask(page, "Say 5", "blue 35 " + "long" * 30, top_k=3)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = page.evaluate(
        "() => [...document.querySelectorAll('button')].filter((one) => one.offsetParent && one.getBoundingClientRect().height < 24).length"
    )
    assert small == 0, "large enough to be pressed"


def test_a_server_that_is_gone_is_said(visit, driver):
    page = visit()
    page.route("**/api/query*", lambda route: route.abort())
    ask(page, "Say 5", "blue 35")
    assert page.locator("#status").text_content() == "The server does not answer. Is it still running?"
    assert shutil.which(CHROMIUM)
