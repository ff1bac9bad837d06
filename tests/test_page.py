"""The page of a ranking, in headless Chromium: colours and numbers read back, and nothing from a record run."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from conftest import write_jsonl

import rapidin_vdb
from rapidin_vdb.page import render_page
from rapidin_vdb.pieces import Piece, pieces_of
from rapidin_vdb.query import query_from

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> &amp; \x1b[31m\u202e é 黄👍🏽\n\tend"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
RECORDS = [
    {"id": "hostile", "instruction": HOSTILE, "output": HOSTILE, "source": "<b>bold</b>", "note": HOSTILE},
    *[{"id": f"plain-{n}", "instruction": f"Say {n}", "output": f"red {n}\nblue {n + 1}"} for n in range(4)],
]


@pytest.fixture(scope="module")
def rankings(tmp_path_factory, models, adapters):
    folder = tmp_path_factory.mktemp("page")
    database = rapidin_vdb.init(
        folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, template="text"
    )
    database.ingest(write_jsonl(folder / "records.jsonl", RECORDS))
    queries = [query_from("Say 2", "red 2 é黄"), query_from(HOSTILE, HOSTILE, query_id="</option><script>")]
    return database.query(queries=queries, top_k=3, both=True, tokens=True, matrix=True)


def test_the_file_holds_no_markup_of_a_record(rankings):
    page = render_page(rankings, title="<i>db</i> & 'more'")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page and "<i>" not in page and "\u202e" not in page
    before, block, after = re.split(r'(?<=id="data">)(.*?)(?=</script>)', page, maxsplit=1)
    assert not re.search(r"(?:src|href)\s*=|https?:", before + after) and not set("<>&") & set(block)
    data = json.loads(block)
    assert data["rankings"][1]["prompt"] == HOSTILE
    known = [(one["table_version"], one["identity"]) for one in data["rankings"]]
    assert known == [(one.table_version, one.identity) for one in rankings] and None not in known[0]


@pytest.fixture(scope="module")
def opened(rankings, tmp_path_factory):
    """Yield a function that opens the page in a browser of some colours and width."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    folder = tmp_path_factory.mktemp("browser")
    file = folder / "page.html"
    focused = replace(rankings[0], focus=("d 2", (6, 7), "nowhere"))
    nobody = replace(rankings[0], results=(), harmful=(), note="told of it")
    mixed = [
        replace(result, score=1.0, exact_score=exact)
        for result, exact in zip(rankings[0].results, (2.0, -1.0, 0.0), strict=True)
    ]
    few = replace(rankings[0], results=tuple(mixed), harmful=None)
    below = tuple(replace(result, score=-1.0, exact_score=-1.0) for result in rankings[0].harmful)
    ends = replace(rankings[0], harmful=below)
    file.write_text(render_page([*rankings, focused, nobody, few, ends], title="db"), "utf-8")
    contexts = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)

        def open_page(*, scheme="light", width=1200):
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
            contexts.append(context)
            page = context.new_page()
            page.complaints, page.requests = [], []
            page.on("console", lambda message: page.complaints.append(message.text))
            page.on("pageerror", lambda error: page.complaints.append(str(error)))
            page.on("request", lambda request: page.requests.append(request.url))
            page.goto(file.as_uri())
            return page

        yield open_page
        for context in contexts:
            context.close()
        browser.close()


def shares(page) -> list[list[tuple[list[int], float, float, str]]]:
    """Tokens, score, share of the largest colour, and hue, of each card's pieces, as the browser paints them."""
    return page.evaluate(
        """() => [...document.querySelectorAll('article')].map((card) => [...card.querySelectorAll('.piece')].map((piece) => {
            const [red, green, blue, alpha] = getComputedStyle(piece).backgroundColor.match(/[\\d.]+/g).map(Number);
            return [piece.dataset.tokens.split(' ').map(Number), Number(piece.dataset.score),
                    alpha === undefined ? 1 : alpha, red > blue ? 'red' : 'blue', piece.title];
        }))"""
    )


def pieces_of_tokens(result):
    return pieces_of(result.response, [(token.start, token.end) for token in result.tokens])


def ends_of(result):
    return [Piece("", (number,)) for number, token in enumerate(result.tokens) if token.start == token.end]


def check_colours(page, results, scores_of):
    scores = [scores_of(result) for result in results]
    most = max(
        abs(sum(row[token] for token in piece.tokens))
        for row, result in zip(scores, results, strict=True)
        for piece in [*pieces_of_tokens(result), *ends_of(result)]
    )
    for row, pieces in zip(scores, shares(page), strict=True):
        assert sorted({token for piece in pieces for token in piece[0]}) == list(range(len(row)))
        for tokens, score, alpha, hue, title in pieces:
            wanted = sum(row[token] for token in tokens)
            assert score == pytest.approx(wanted, abs=1e-6 * most)
            assert alpha == pytest.approx(abs(wanted) / most * 0.72, abs=0.01)
            assert hue == ("red" if wanted >= 0 else "blue") or alpha < 0.01
            shown = float(title.split(" = ")[-1])
            assert shown == pytest.approx(wanted, rel=1e-2, abs=1e-4)


def test_colours_and_numbers_are_those_of_the_ranking(opened, rankings):
    page = opened()
    above = page.locator("#top").inner_text()
    assert (
        f" Scores are off by {rankings[0].score_error:.4f} or so (one standard deviation), but" in above
        and "Note: " not in above
    )
    origin = page.locator("#top .origin")
    assert origin.inner_text() == f"Version {rankings[0].table_version} of the database {rankings[0].identity[:8]}."
    assert origin.get_attribute("title") == rankings[0].identity
    page.select_option("#query", str(len(rankings) + 1))
    assert "Note: told of it. Version " in page.locator("#top").inner_text()
    page.select_option("#query", "0")
    results = [*rankings[0].results, *rankings[0].harmful]
    check_colours(page, results, lambda result: [token.score for token in result.tokens])
    assert page.locator("article .text:not(.prompt)").all_text_contents() == [result.response for result in results]
    most = max(
        abs(sum(result.tokens[token].score for token in piece.tokens))
        for result in results
        for piece in [*pieces_of_tokens(result), *ends_of(result)]
    )
    for place, sign in (("#highest", 1), ("#lowest", -1)):
        assert float(page.locator(place).text_content()) == pytest.approx(sign * most, rel=1e-2)
    # A generated token by mouse, then a second one by keyboard, then all of them again.
    page.locator("#generation .choice", has_text="2").click()
    column = rankings[0].generation.index("2")
    check_colours(page, results, lambda result: [float(row[column]) for row in result.matrix])
    assert page.locator("#about").text_content() == "influence on 2"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    both = [number for number, span in enumerate(rankings[0].generation_tokens) if span.text in ("2", "é")]
    assert len(both) == 3  # é is two bytes, and one thing to press
    check_colours(page, results, lambda result: [sum(float(row[c]) for c in both) for row in result.matrix])
    page.locator("#whole").click()
    check_colours(page, results, lambda result: [token.score for token in result.tokens])
    assert page.complaints == []


def test_hostile_records_are_text(opened, rankings):
    page = opened()
    page.locator("#query").select_option("1")
    assert page.locator("#generation").text_content() == HOSTILE
    assert page.locator("article[data-sample=hostile] .text").all_text_contents() == [HOSTILE, HOSTILE]
    assert page.title() == "rapidin-vdb: db"
    assert page.locator("main script, main img, main b, header script").count() == 0
    assert page.complaints == [] and len(page.requests) == 1


def test_what_was_asked_about_is_marked(opened):
    page = opened()
    assert page.locator(".focused").count() == 0
    page.locator("#query").select_option("2")
    assert page.locator("#generation .focused").all_text_contents() == ["d", " ", "2", "é"]
    assert page.locator("#about").text_content() == "influence on d 2, é, nowhere"
    assert page.locator("#whole").text_content() == "what was asked"
    assert page.complaints == []


def test_what_is_behind_a_cut_and_what_overlaps_is_marked(opened):
    page = opened()
    drawn = """(ends) => [...Heat.coloured([['a', [0]], [' ', []], ['b', [1]], [' tail', []]], ends, [1, 2, 3], 3).children]
        .filter((piece) => piece.classList.contains('cut')).map((piece) => piece.textContent)"""
    assert page.evaluate(drawn, []) == [" tail"], "a sample without an end was cut"
    assert page.evaluate(drawn, [2]) == []
    asked = """(text) => [...Heat.generation([['ban', [0]], ['an', [1]], ['a', [2]], ['s', [3]]], [], [text], {}).children]
        .filter((piece) => piece.classList.contains('focused')).map((piece) => piece.textContent)"""
    assert page.evaluate(asked, "ana") == ["ban", "an", "a"], "twice, of which the second begins in the first"
    assert page.evaluate(asked, "s") == ["s"]


def test_text_from_right_to_left_stands_as_it_does_without_colours(opened):
    """Letter by letter, as tokens of bytes are, and in words."""
    page = opened()
    drawn = """(pieces) => {
        const order = (block) => {
            document.querySelector('article').append(block);
            const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT), places = [];
            for (let node = walker.nextNode(); node; node = walker.nextNode())
                for (let at = 0; at < node.length; at += 1) {
                    const range = new Range();
                    range.setStart(node, at);
                    range.setEnd(node, at + 1);
                    places.push([range.getBoundingClientRect().x, node.data[at]]);
                }
            block.remove();
            return places.sort((one, other) => one[0] - other[0]).map(([, letter]) => letter).join('');
        };
        const plain = Heat.make('div', { class: 'text', dir: 'auto' }, pieces.map(([text]) => text).join(''));
        const scores = pieces.map(() => 1), chosen = new Set();
        return [order(plain), order(Heat.coloured(pieces, [], scores, 1)),
                order(Heat.generation(pieces, [], [], { press: () => {}, chosen }))];
    }"""
    for text in ("He said שלום עולם in 1948.", "في سنة 1948 قال hello world ثم ذهب"):
        for parts in (list(text), re.findall(r"\S+|\s", text)):
            plain, *coloured = page.evaluate(drawn, [[part, [number]] for number, part in enumerate(parts)])
            assert coloured == [plain, plain] and plain != text


def test_a_piece_of_several_tokens_is_no_deeper_than_the_scale(opened, rankings):
    page = opened()
    deepest = "([pieces, ends, scores]) => Heat.deepest(pieces, ends, scores)"
    assert page.evaluate(deepest, [[["é", [0, 1]], ["b", [2]]], [3], [0.75, 0.5, -1, 0.25]]) == 1.25
    assert page.evaluate(deepest, [[["é", [0, 1]], ["b", [2]]], [3], [0.75, 0.5, -1, -2]]) == 2
    for result in [*rankings[0].results, *rankings[0].harmful]:
        top = max(abs(sum(result.tokens[n].score for n in piece.tokens)) for piece in pieces_of_tokens(result))
        assert top <= float(page.locator("#highest").text_content()) * 1.01


def test_what_is_pressed_is_named(opened, rankings):
    page = opened()
    about = page.locator("#about")
    page.locator("#generation .choice", has_text=re.compile("^ $")).first.click()
    assert about.text_content() == "influence on a space"
    page.locator("#generation .choice", has_text="2").click()
    page.locator("#generation .end").click()
    assert about.text_content() == "influence on a space 2 the end of the text"
    named = "([pieces, chosen]) => Heat.pressed(pieces, [], new Set(chosen))"
    assert page.evaluate(named, [[["a", [0]], ["\n", [1]]], [1]]) == "a line break"


def test_the_end_of_a_text_can_be_what_was_asked_about(opened):
    page = opened()
    ends = """(focus) => [...Heat.generation([['ab', [0]]], [1], focus, {}).children]
        .filter((piece) => piece.classList.contains('focused')).map((piece) => piece.textContent)"""
    assert page.evaluate(ends, [[2, 2]]) == [""] and page.evaluate(ends, [[0, 2]]) == ["ab"]


def test_whole_numbers_of_any_size_are_shown(rankings):
    big = {"big": (1 << 53) + 1, "small": -(1 << 53), "yes": True}
    page = render_page([replace(rankings[0], results=(replace(rankings[0].results[0], metadata=big),))], title="db")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    shown = data["rankings"][0]["results"][0]["metadata"]
    assert shown == {"big": "9007199254740993", "small": -(1 << 53), "yes": True}


def test_headings_say_what_is_below_them(opened, rankings):
    page = opened()
    headings = lambda: page.locator("h2").all_text_contents()  # noqa: E731
    signs = ": above zero made it more likely, below zero less likely"
    assert min(result.score for result in rankings[0].harmful) > 0, "of so few samples, none made it less likely"
    assert headings() == ["Training samples that made it more likely", f"Training samples at the other end{signs}"]
    page.locator("#query").select_option("5")
    assert headings() == [f"Training samples that made it {word} likely" for word in ("more", "less")]
    page.locator("#query").select_option("3")
    assert headings() == [] and page.get_by_text("no sample matches").count() == 1
    page.locator("#query").select_option("4")
    # One of them is negative by its exact score: they were fewer that match than were asked for.
    assert headings() == [f"Training samples by influence{signs}"]
    asked = "(scores) => Heat.heading(scores.map((score) => ({ score, exact_score: null })))"
    assert page.evaluate(asked, [-1, -2]) == "Training samples that made it less likely"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_signs_can_be_told_without_colours_and_texts_be_read_on_them(opened, scheme):
    page = opened(scheme=scheme)
    assert (
        "blue, underlined with dots from a tenth of the largest on: less likely" in page.locator("#legend").inner_text()
    )
    drawn = page.evaluate(
        """() => {
            const pieces = [['up', [0]], ['down', [1]], ['little', [2]], [' rest', []]];
            const text = Heat.coloured(pieces, [], [1, -1, -0.09], 1);
            document.querySelector('article').append(text);
            const light = (colour) => colour.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
            const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
            const paper = numbers(getComputedStyle(document.querySelector('article')).backgroundColor);
            return [...text.children].map((piece) => {
                const style = getComputedStyle(piece), [r, g, b, alpha = 1] = numbers(style.backgroundColor);
                const back = light([r, g, b].map((v, place) => v * alpha + paper[place] * (1 - alpha)));
                const ink = light(numbers(style.color).slice(0, 3));
                return [style.textDecorationLine, (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05), style.opacity];
            });
        }"""
    )
    assert [line for line, _, _ in drawn] == ["none", "underline", "none", "none"], "what is cut off is no negative"
    assert min(contrast for _, contrast, _ in drawn) >= 4.5 and {opacity for _, _, opacity in drawn} == {"1"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_and_can_be_read(opened, scheme, width):
    page = opened(scheme=scheme, width=width)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    lightness = page.evaluate(
        """() => ['backgroundColor', 'color'].map((name) => {
            const [r, g, b] = getComputedStyle(document.body)[name].match(/[\\d.]+/g).map(Number);
            return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
        })"""
    )
    assert (
        (lightness[0] > 0.9 and lightness[1] < 0.2)
        if scheme == "light"
        else (lightness[0] < 0.2 and lightness[1] > 0.8)
    )


def test_nothing_else_may_run(opened):
    """The policy of the page itself, should anything slip through."""
    page = opened()
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s); }"
    )
    page.evaluate(
        "() => { const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x'; document.body.append(i); }"
    )
    page.wait_for_timeout(100)
    assert page.title() == "rapidin-vdb: db"
    assert sum("Content Security Policy" in text for text in page.complaints) == 2
