"""The page asks in steps: what is quick stands first, and stays whatever becomes of the rest; and what is pressed is seen."""

import json
import re
from urllib.parse import quote, unquote

import pytest
import test_web_page as whole
from test_web_page import ask, cards, settled

made, address, driver, visit = whole.made, whole.address, whole.driver, whole.visit

TOLD = 'event: progress\ndata: {"stage": "matrix", "done": 12, "total": 678}\n\n'
LATE = 'event: error\ndata: {"detail": "the request took longer than is allowed", "status": 504}\n\n'
SAID = """() => { const status = document.querySelector('#status'); window.said = [];
    new MutationObserver(() => window.said.push(status.textContent)).observe(status, { childList: true, characterData: true, subtree: true }); }"""


def step_of(route) -> str:
    asked = json.loads(route.request.post_data)
    return "matrix" if asked["matrix"] else "words" if asked["tokens"] else "ranking"


def watched(page, **handlers) -> list[str]:
    """Let steps be handled by these; return what will have been asked for."""
    steps: list[str] = []

    def handle(route) -> None:
        steps.append(step_of(route))
        handlers.get(steps[-1], lambda route: route.continue_())(route)

    page.route("**/api/query*", handle)
    return steps


def until(page, met) -> None:
    """Wait until something has come to the routes of this process, which Playwright runs only meanwhile."""
    for _ in range(6000):
        if met():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it is waited for in vain")


def dear(route) -> None:
    """Answer as where the scores of tokens take long, and what drives what much longer."""
    answer = route.fetch()
    route.fulfill(response=answer, body=re.sub(r'("seconds": {[^}]*"tokens": )[^,]*', r"\g<1>99.0", answer.text()))


def test_the_ranking_stands_before_the_influence_of_words(visit):
    page, held = visit(), []
    steps = watched(page, words=held.append)
    page.fill("#prompt", "Say 5")
    page.fill("#generated", "blue 35")
    page.fill("#top_k", "3")
    page.click("#go")
    page.locator("article").nth(2).wait_for()
    assert len(cards(page)) == 3 and page.locator("article .piece").count() == 0
    assert page.locator("main:not([aria-busy])").count() == 1, "it can be read and used"
    first = cards(page)
    page.locator("#stop").click()
    page.locator(".lacks", has_text="The influence of words is missing: Stopped. The ranking stands").wait_for()
    assert cards(page) == first and page.locator(".histogram").count() == 1
    page.unroute("**/api/query*")
    page.locator(".lacks button").click()
    page.locator("article .piece").first.wait_for()
    settled(page)
    assert cards(page) == first and page.locator(".lacks").count() == 0
    assert steps == ["ranking", "words"] and page.complaints == []


def test_which_words_drive_which_is_asked_when_a_word_is_pressed(visit, made):
    page = visit()
    late = [True]
    steps = watched(
        page, words=dear, matrix=lambda route: route.fulfill(body=TOLD + LATE) if late[0] else route.continue_()
    )  # fmt: skip
    ask(page, "Say 5", "blue 35", top_k=2)
    assert steps == ["ranking", "words"], "it would take long"
    assert settled(page).startswith("2 of 28 samples") and page.locator("article .piece").count() > 0
    colours = page.locator("article .piece").evaluate_all("all => all.map((one) => one.dataset.score)")
    page.evaluate(SAID)
    page.locator("#generation .choice").nth(1).click()
    page.locator(".lacks", has_text="Which words drive which is missing: the request took longer than is").wait_for()
    assert "reading which words drive which: 12 of 678" in page.evaluate("window.said")
    assert page.locator("#about").text_content() == "what drove l is not known"
    assert page.locator("article .piece").evaluate_all("all => all.map((one) => one.dataset.score)") == colours
    assert page.locator("#refocus").is_enabled(), "which takes less"
    page.locator("#generation .choice").nth(2).click()
    page.wait_for_timeout(300)
    assert steps == ["ranking", "words", "matrix"], "not at every press"
    late[0] = False
    page.locator(".lacks button").click()
    page.locator("#about", has_text="influence on l u").wait_for()
    settled(page)
    matrix = made.query("Say 5", "blue 35", top_k=2, matrix=True)[0].results[0].matrix
    shown = page.locator("article").first.locator(".piece").evaluate_all("all => all.map((one) => one.dataset.score)")
    assert [float(score) for score in shown] == pytest.approx(matrix[:, 1:3].sum(1).tolist(), rel=1e-3, abs=1e-6)
    page.locator("article .choice").first.click()
    page.locator("#driven").wait_for()
    assert steps == ["ranking", "words", "matrix", "matrix"] and page.complaints == []


def test_a_training_token_waits_for_what_it_drives(visit):
    page, held = visit(), []
    watched(page, words=dear, matrix=held.append)
    ask(page, "Say 5", "blue 35", top_k=2)
    page.locator("article .choice").nth(2).click()
    page.locator("#about", has_text="reading what the pressed training token drives").wait_for()
    page.locator("#generation .choice").nth(1).click()  # meanwhile something else is meant
    page.locator("#about", has_text="reading what drove l").wait_for()
    assert len(held) == 1
    held[0].continue_()
    page.locator("#about", has_text=re.compile("^influence on l$")).wait_for()
    assert settled(page) == "" and page.complaints == []


def test_two_answers_are_ranked_before_either_is_read_word_by_word(visit):
    page = visit()
    ask(page, "Say 5", "blue 35", top_k=2)
    page.locator("#generation .choice").nth(1).click()
    settled(page)
    steps = watched(page)
    page.click("#compare")
    ask(page, "Say 7", "blue 49")
    page.locator("[data-side='1'] article .piece").first.wait_for()
    settled(page)
    assert page.locator("[data-side='0'] article .piece").count() > 0
    assert steps[:2] == ["ranking", "words"], "the other is known"
    assert page.locator("main [aria-pressed=true].choice").count() == 0, "nothing is pressed in it yet"
    page.reload()
    page.locator("[data-side='1'] article .piece").first.wait_for()
    assert steps[len(steps) - 6 :][:2] == ["ranking", "ranking"] or steps.count("ranking") == 3


LONG = "blue 35 and then " * 5


def test_on_a_phone_what_a_training_token_drives_is_seen_where_it_is_pressed(visit):
    page = visit(width=390)
    ask(page, "Say 5", LONG, top_k=4)
    token = page.locator("article").last.locator(".choice").nth(1)
    token.scroll_into_view_if_needed()
    token.click()
    strip = page.locator("article .strip")
    strip.locator(".piece").first.wait_for()
    settled(page)
    box = strip.bounding_box()
    assert 0 <= box["y"] and box["y"] + box["height"] <= 800 and box["height"] <= 0.36 * 800
    assert strip.locator(".scale").is_visible() and strip.locator(".text").text_content() == LONG
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    token.click()
    assert page.locator(".strip").count() == 0
    page.set_viewport_size({"width": 1200, "height": 800})
    token.click()
    assert page.locator("#driven").is_visible() and not strip.is_visible(), "there the generation itself is in sight"


def test_pressing_does_not_scroll_a_long_generation(visit):
    page = visit()
    page.set_viewport_size({"width": 1280, "height": 700})
    ask(page, "\n".join(["Say 5"] * 20), LONG, top_k=2)
    page.locator("article").last.scroll_into_view_if_needed()
    within = page.locator(".within")
    before = within.evaluate("one => (one.scrollTop = one.scrollHeight, one.scrollTop)")
    assert before > 50
    page.locator("#generation .choice").nth(-3).click()
    settled(page)
    assert within.evaluate("one => one.scrollTop") == before
    button = page.locator("#refocus").bounding_box()
    card = page.locator(".sticky").bounding_box()
    assert card["y"] <= button["y"] and button["y"] + button["height"] <= card["y"] + card["height"] <= 0.46 * 700


def test_the_keyboard_is_never_below_the_generation(visit):
    page = visit()
    page.set_viewport_size({"width": 1280, "height": 700})
    ask(page, "Say 5", LONG, top_k=4)
    page.locator("article button").last.focus()
    hidden, seen = [], 0
    while page.evaluate("document.activeElement.closest('article') !== null"):
        seen += 1
        if page.evaluate(
            """() => { const box = document.activeElement.getClientRects()[0];
                const there = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
                return !(there && document.activeElement.contains(there)); }"""
        ):
            hidden.append(page.evaluate("document.activeElement.outerHTML.slice(0, 100)"))
        page.keyboard.press("Shift+Tab")
    assert seen == 4 * 3 and hidden == []


def test_what_is_asked_again_is_asked_anew(visit, address):
    page, samples = visit(), [28]

    def more(route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"samples": samples[0]})

    ask(page, "Say 5", "blue 35", top_k=2)
    page.click("#compare")
    ask(page, "Say 7", "blue 49")
    page.locator("[data-side='1'] article").first.wait_for()
    settled(page)
    steps = watched(page)
    page.route("**/api/info", more)
    samples[0] = 29
    page.click('[data-view="history"]')
    page.get_by_role("button", name="Ask again").nth(1).click()
    page.locator("#generation").wait_for()
    settled(page)
    assert steps.count("ranking") == 1
    page.get_by_text("db: 29 samples").wait_for()
    samples[0] = 30
    page.click('[data-view="history"]')
    page.get_by_role("button", name="Ask again").nth(1).click()  # the comparison, which is the second by now
    page.locator("[data-side='1'] article").first.wait_for()
    settled(page)
    assert steps.count("ranking") == 3, "both halves"
    page.get_by_text("db: 30 samples").wait_for()
    page.go_back()  # while the way back asks nothing
    page.go_forward()
    page.locator("[data-side='1'] article").first.wait_for()
    settled(page)
    assert steps.count("ranking") == 3 and "compare" in unquote(page.url)


# Leaving, stopping, and what fails on the way.


@pytest.mark.parametrize(("to", "step"), [("history", "ranking"), ("marked", "matrix"), ("damaged", "words")])
def test_what_is_left_is_not_told_of_in_the_next_view(visit, to, step):
    page, held = visit(), []
    ask(page, "Say 5", "blue 35", top_k=2)
    page.locator("article [data-does=mark]").first.click()
    page.get_by_role("button", name="Marked 1").wait_for()
    watched(page, **{"words": dear, step: held.append})
    page.fill("#generated", "blue 42")
    page.click("#go")
    if step != "ranking":
        page.locator("#generation", has_text="blue 42").wait_for()
    if step == "matrix":
        page.locator("#generation .choice").nth(1).click()
    page.locator("#stop").wait_for()
    until(page, lambda: held)
    page.evaluate(SAID)
    with page.expect_event("requestfailed"):
        if to == "damaged":
            page.evaluate("location.hash = '#ask=%7B'")
        else:
            page.click(f'[data-view="{to}"]')
    page.wait_for_timeout(300)
    assert "Stopped." not in page.evaluate("window.said")
    assert page.locator("#status").text_content() == ("This link is damaged." if to == "damaged" else "")
    assert page.locator("#stop").is_hidden() and page.locator("main[aria-busy]").count() == 0
    if to == "damaged":
        assert page.locator("main").text_content() == "", "nothing dead is left standing"
    elif to == "marked":
        assert page.locator("main article").count() == 1
    else:
        asked = page.locator("main article").all_text_contents()
        assert ["blue 35" in one or "blue 42" in one for one in asked] == [True] * (1 if step == "ranking" else 2)
    assert page.complaints == []


@pytest.mark.parametrize("how", ["stop", "late"])
def test_what_is_pressed_no_more_may_still_come_to_nothing(visit, how):
    page, held = visit(), []
    watched(page, words=dear, matrix=held.append)
    ask(page, "Say 5", "blue 35", top_k=2)
    token = page.locator("#generation .choice").nth(1)
    token.click()
    until(page, lambda: held)
    token.click()
    page.locator("#about", has_text="influence on the whole generation").wait_for()
    if how == "stop":
        page.locator("#stop").click()
    else:
        held[0].fulfill(body=LATE)
    page.locator(".lacks", has_text="Which words drive which is missing: ").wait_for()
    assert settled(page) == ("Stopped." if how == "stop" else "the request took longer than is allowed")
    page.locator("#generation .choice").nth(2).click()
    page.locator("#about", has_text="what drove u is not known").wait_for()
    assert page.locator("#refocus").is_enabled() and page.complaints == []
    page.locator(".lacks button").click()
    until(page, lambda: len(held) == 2)
    held[1].continue_()
    page.locator("#about", has_text=re.compile("^influence on u$")).wait_for()


def test_what_is_wrong_in_the_page_is_no_damaged_link(visit):
    page = visit()
    page.evaluate("() => { Heat.generation = () => { throw new Error('odd'); }; }")
    ask(page, "Say 5", "blue 35", top_k=2)
    assert settled(page) == "Something went wrong in this page: odd"


def side_by_side(page, left: str, right: str) -> list:
    both = [{"prompt": "Say 8", "generated": text, "top_k": "2"} for text in (left, right)]
    page.evaluate("to => { location.hash = to; }", "#compare=" + quote(json.dumps(both), safe=""))
    return [page.locator(f"[data-side='{number}']") for number in (0, 1)]


def test_of_two_answers_one_may_come_to_nothing(visit):
    page, broken = visit(), [True]

    def words(route) -> None:
        if broken[0] and json.loads(route.request.post_data)["generation"] == "blue 56":
            route.fulfill(body=LATE)
        else:
            dear(route)

    steps = watched(page, words=words)
    left, right = side_by_side(page, "blue 56", "blue 63")
    left.locator(".lacks", has_text="The influence of words is missing: the request took longer").wait_for()
    right.locator("article .piece").first.wait_for()
    assert settled(page) == "the request took longer than is allowed"
    assert right.locator(".lacks").count() == 0 and left.locator("article .piece").count() == 0
    broken[0] = False
    left.locator("[data-does=more]").click()
    left.locator("article .piece").first.wait_for()
    settled(page)
    assert steps == ["ranking", "ranking", "words", "words", "words"] and page.complaints == []


def test_of_two_answers_both_may_be_stopped(visit):
    page, held = visit(), []
    watched(page, words=held.append)
    left, right = side_by_side(page, "blue 56", "blue 63")
    until(page, lambda: held)
    page.locator("#stop").click()
    for side in (left, right):
        side.locator(".lacks", has_text="The influence of words is missing: Stopped.").wait_for()
        assert side.locator("[data-does=more]").count() == 1
    assert settled(page) == "Stopped."


def test_of_two_answers_both_may_be_pressed(visit):
    page, held = visit(), []
    watched(page, words=dear, matrix=held.append)
    left, right = side_by_side(page, "blue 56", "blue 63")
    right.locator("article .piece").first.wait_for()
    settled(page)
    left.locator(".choice").nth(1).click()
    until(page, lambda: held)
    right.locator(".choice").nth(2).click()
    right.locator(".about", has_text="reading what drove u").wait_for()
    for number in (0, 1):
        until(page, lambda number=number: len(held) == number + 1)
        held[number].continue_()
    left.locator(".about", has_text=re.compile("^influence on l$")).wait_for()
    right.locator(".about", has_text=re.compile("^influence on u$")).wait_for()
    assert settled(page) == "" and page.complaints == []


def test_the_model_answers_or_a_word_is_read_and_what_gives_way_is_said(visit):
    page, held = visit(), []
    watched(page, words=dear, matrix=held.append)
    page.route("**/api/generate", lambda route: held.append(route))
    ask(page, "Say 5", "blue 35", top_k=2)
    page.click("#sampling summary")
    # A word, while the model answers.
    page.click("#generate")
    until(page, lambda: len(held) == 1)
    page.locator("#generation .choice").nth(1).click()
    page.locator("#sampled", has_text="the model was stopped before it had answered").wait_for()
    page.locator("#about", has_text="reading what drove l").wait_for()
    # The model, while a word is read.
    until(page, lambda: len(held) == 2)
    page.click("#generate")
    page.locator(".lacks", has_text="Which words drive which is missing: Stopped.").wait_for()
    assert page.locator("#about").text_content() == "what drove l is not known"
    assert page.locator("#status").text_content() == "the model answers"
    assert page.locator("#sampled").text_content() == ""
    until(page, lambda: len(held) == 3)
    page.unroute("**/api/generate")
    held[2].continue_()
    page.locator("#sampled", has_text="said at temperature 0").wait_for()
    assert settled(page) == "" and page.complaints == []


def test_an_answer_that_is_known_says_what_it_waits_for(visit):
    page, held = visit(), []
    watched(page, words=dear, matrix=held.append)
    ask(page, "Say 5", "blue 35", top_k=2)
    page.locator("#generation .choice").nth(1).click()
    until(page, lambda: held)
    page.click('[data-view="browse"]')
    page.get_by_text("1 to 20 of 28").first.wait_for()
    page.go_back()
    until(page, lambda: len(held) == 2)
    page.locator("#about", has_text="reading what drove l").wait_for()
    assert page.locator("#status.busy").text_content() == "reading which words drive which"
    held[1].continue_()
    page.locator("#about", has_text=re.compile("^influence on l$")).wait_for()
