"""Rankings in the terminal: lines of tokens, in colours and in brackets, with what a terminal must not be sent."""

import dataclasses
import re

import pytest
from conftest import toy_records, write_jsonl
from test_cli import call

import rapidin_vdb
from rapidin_vdb.cli.ranked import ranking_table
from rapidin_vdb.query import query_from
from rapidin_vdb.results import GroupInfluence, RankedSample, RankedToken, Ranking, Seconds, TokenScore

SECONDS = Seconds(gradient=0.0, search=0.0, tokens=0.0, total=0.0)
QUERY = query_from("Name a fruit.", "A comet.")
HOSTILE = "a\x1b[31mb é👍🏽\nc"


def group_of(score: float, value="v") -> GroupInfluence:
    return GroupInfluence(value=value, samples=1, score=score, error=0.1)


def ranking_of(*results, **more) -> Ranking:
    return Ranking(
        query_id="query", score_unit="", searched=9, where=None, seconds=SECONDS, results=tuple(results), **more
    )


def sample_of(response: str, scores, *, truncated=False, **more) -> RankedSample:
    spans = [(place, place + 1) for place in range(len(scores))]
    tokens = tuple(
        TokenScore(text=response[start:end], start=start, end=end, score=score)
        for (start, end), score in zip(spans, scores, strict=True)
    )
    values = {
        "rank": 1,
        "sample_id": "s1",
        "score": 1.0,
        "exact_score": sum(scores, 0.0),
        "split": "train",
        "source": None,
    }
    return RankedSample(
        **values
        | {"prompt": None, "response": response, "metadata": {}, "tokens": tokens, "truncated": truncated}
        | more
    )


def token_of(response: str, start: int, end: int, *, number=0, sample_id="s1") -> RankedToken:
    return RankedToken(
        rank=1, sample_id=sample_id, token_index=number, text=response[start:end], start=start, end=end, score=1.0,
        split="train", source=None, prompt=None, response=response, metadata={},
    )  # fmt: skip


def drawn(capsys, monkeypatch, ranking, *, colours="", query=QUERY) -> str:
    """What a terminal of 80 columns is sent; without colours, what a file is."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLORTERM", colours)
    ranking_table(ranking, query)
    return "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())


def test_tokens_with_their_scale_and_without_colours(capsys, monkeypatch):
    ranking = ranking_of(sample_of("a\nb\x1b[2J", [0.5, 0.0, -0.25, 0.01, 0.0, 0.0, 0.0]))
    assert drawn(capsys, monkeypatch, ranking) == (
        "query: 1 of 9 samples\n"
        "      prompt:     Name a fruit.\n"
        "      generation: A comet.\n"
        "       +0.5  more likely;  -0.5  less likely, underlined; ↵ new line\n"
        "rank       score       exact   differs  sample_id  text\n"
        "   1           1        0.26            s1         a b\\x1b[2J\n"
        "      about:      split: train\n"
        "      response:   a↵\n"
        "                  b\\x1b[2J\n"
        "      strongest:  a +0.5, b -0.25, \\x1b +0.01, \\n +0, [ +0"
    )
    known = dataclasses.replace(ranking.results[0], difference=1.0 - 0.26)
    assert "        0.26   +284.6%  s1 " in drawn(capsys, monkeypatch, ranking_of(known))


def test_what_was_asked_and_said_is_above_the_tokens_and_as_harmless(capsys, monkeypatch):
    ranking, long = ranking_of(sample_of("a", [1.0])), "word " * 15 + "end"
    shown = drawn(capsys, monkeypatch, ranking, query=query_from("[red]" + HOSTILE, long)).splitlines()[1:5]
    assert shown == [
        "      prompt:     [red]a\\x1b[31mb é👍🏽↵",
        "                  c",
        "      generation: " + "word " * 11 + "word",
        "                  word word word end",
    ]
    alone = drawn(capsys, monkeypatch, ranking, query=query_from(None, "A comet."))
    assert "prompt:" not in alone and "      generation: A comet." in alone.splitlines()
    focus = dataclasses.replace(ranking, focus=("comet", (0, 1)))
    marked = drawn(capsys, monkeypatch, focus, query=query_from(None, "A comet é."), colours="truecolor")
    line = next(line for line in marked.splitlines() if "generation:" in line)
    under = re.findall(r"\x1b\[1;4m(.*?)\x1b\[0m", line)
    assert "".join(under) == "Acomet"
    plain = ranking_of(dataclasses.replace(ranking.results[0], tokens=None))
    assert "generation:" not in drawn(capsys, monkeypatch, plain)


def test_tokens_in_colours(capsys, monkeypatch):
    ranking = ranking_of(sample_of("abcd", [1.0, -1.0, -0.2, 0.05]))
    out = drawn(capsys, monkeypatch, ranking, colours="truecolor")
    assert "\x1b[30;48;2;236;0;0ma\x1b[0m\x1b[4;30;48;2;30;111;238mb\x1b[0m\x1b[4;38;2;" in out
    assert out.split("mc\x1b[0m")[1].startswith("d"), "a weak token is left as it is"
    legend = out.splitlines()[3]
    assert "\x1b[30;48;2;236;0;0m +1 \x1b[0m" in legend and "\x1b[4;30;48;2;30;111;238m -1 \x1b[0m" in legend
    monkeypatch.setenv("NO_COLOR", "1")
    ranking_table(ranking, QUERY)


def test_what_is_known_of_a_sample_is_above_its_tokens(capsys, monkeypatch):
    more = {"source": "forum", "metadata": {"stars": 4, "note": "a\x1bb", "none": None}, "prompt": "Say\nit."}
    ranking = ranking_of(sample_of("a", [1.0], **more))
    assert (
        "      about:      split: train  source: forum  stars: 4  note: a\\x1bb\n"
        "      prompt:     Say↵\n"
        "                  it.\n"
        "      response:   a\n"
    ) in drawn(capsys, monkeypatch, ranking)


def test_every_line_of_tokens_fits_the_terminal(capsys, monkeypatch):
    words = [f"word{number}abcdefghij" for number in range(6)]
    text = " ".join(words)
    starts = [text.index(word) for word in words]
    tokens = tuple(
        TokenScore(text=word, start=start, end=start + len(word), score=-1.2345e-5)
        for word, start in zip(words, starts, strict=True)
    )
    ranking = ranking_of(dataclasses.replace(sample_of(text, []), tokens=tokens))
    assert max(map(len, drawn(capsys, monkeypatch, ranking).splitlines())) <= 80


def test_what_ranks_is_said_where_results_were_ranked_again(capsys, monkeypatch):
    ranking = dataclasses.replace(ranking_of(sample_of("a", [1.0])), score_unit="this; the first 2 are ranked by that")
    assert "\n  the first 2 are ranked by that\n" in drawn(capsys, monkeypatch, ranking)


def test_the_scale_is_that_of_what_is_coloured(capsys, monkeypatch):
    """A character of several tokens has their sum."""
    tokens = tuple(TokenScore(text="é", start=0, end=1, score=score) for score in (0.75, 0.5))
    ranking = ranking_of(dataclasses.replace(sample_of("éb", []), tokens=tokens))
    assert "+1.25  more likely" in drawn(capsys, monkeypatch, ranking)


def test_a_sample_that_was_cut_shows_where(capsys, monkeypatch):
    ranking = ranking_of(sample_of("abcdef", [1.0, -1.0], truncated=True))
    out = drawn(capsys, monkeypatch, ranking)
    assert (
        "      response:   ab (cut off:) cdef\n      cut:        to --max-tokens: 2 tokens have scores, none behind"
        in out
    )
    assert "\x1b[2mcdef\x1b[0m" in drawn(capsys, monkeypatch, ranking, colours="truecolor")
    assert "cut" not in drawn(capsys, monkeypatch, ranking_of(sample_of("ab", [1.0, -1.0])))


@pytest.mark.parametrize(
    ("start", "end", "shown"),
    [
        (0, 1, r"[a]\x1b[31mb é👍🏽\nc"),
        (1, 2, r"a[\x1b][31mb é👍🏽\nc"),
        (8, 9, r"a\x1b[31mb [é]👍🏽\nc"),
        (9, 10, r"a\x1b[31mb é[👍🏽]\nc"),
        (10, 11, r"a\x1b[31mb é[👍🏽]\nc"),
        (11, 12, r"a\x1b[31mb é👍🏽[\n]c"),
        (13, 13, r"a\x1b[31mb é👍🏽\nc[end of text]"),
    ],
)
def test_a_token_in_brackets_is_what_is_seen(capsys, monkeypatch, start, end, shown):
    assert len(HOSTILE) == 13
    response = HOSTILE
    out = drawn(capsys, monkeypatch, ranking_of(token_of(response, start, end, number=5), matching=1, without_tokens=0))
    assert out == (
        f"query: 1 of 9 tokens\nrank       score  sample_id  token  text\n   1           1  s1             5  {shown}"
    )


def test_context_begins_and_ends_with_whole_characters(capsys, monkeypatch):
    """Whatever the room: no escape, and no letter, in part; and all lines fit."""
    for filler in ("\x1b", "e\u0301", "👍🏽", "黄"):
        for more in range(12):
            text = filler * 30 + "X" + filler * 30
            token = token_of(text, len(filler) * 30, len(filler) * 30 + 1, sample_id="s" * (more + 3))
            line = drawn(capsys, monkeypatch, ranking_of(token, matching=1, without_tokens=0)).splitlines()[-1]
            before, after = line.split("  ")[-1].strip().split("[X]")
            whole = filler.replace("\x1b", "\\x1b")
            assert before == whole * (len(before) // len(whole)) != "" and after == whole * (len(after) // len(whole))
            assert len(line) <= 80


def test_rankings_of_tokens_say_what_they_leave_out(capsys, database, tmp_path):
    database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16, limit=10)
    asked = ("query", database.path, "--prompt", "Say 5", "--generation", "blue 35", "--level", "token", "--where")
    code, out, _ = call(capsys, *asked, "source = 'odd'")
    assert code == 0 and out.splitlines()[0].startswith("query: 10 of ")
    assert out.splitlines()[1:3] == [
        "  7 of the 12 samples that match have no RapidGrads of their tokens, which are",
        "  left out here; make them with: rapidin-vdb ingest DB FILE --token-gradients",
    ]
    lines = out.splitlines()[4:]
    assert len(lines) == 10 == len({re.sub(r"^ *\d+ +\S+", "", line) for line in lines}), "no two lines are the same"
    code, out, _ = call(capsys, *asked, "sample_id > 'toy-010'")
    assert out.splitlines()[0] == "query: 0 of 0 tokens that match sample_id > 'toy-010'"
    assert "13 of the 13 samples" in out and "no sample matches" not in out
    code, out, _ = call(capsys, *asked, "stars > 99")
    assert out == "query: 0 of 0 tokens that match stars > 99\n  no sample matches\n"


def test_a_matrix_that_nobody_would_see_is_refused(capsys, database, tmp_path):
    asked = ("query", database.path, "--prompt", "Say 5", "--generation", "blue 35", "--matrix")
    code, out, err = call(capsys, *asked)
    assert (code, out) == (1, "")
    assert err == "error: --matrix is shown by --json and --html FILE only; add one of them, or leave it out\n"
    assert call(capsys, *asked, "--json", "--top-k", 1)[0] == 0
    code, out, _ = call(capsys, *asked, "--html", tmp_path / "page.html", "--top-k", 1)
    # Words are on the page; the terminal shows those that were asked for there.
    assert code == 0 and "generation:" not in out and "response:" not in out
    code, more, _ = call(capsys, *asked, "--html", tmp_path / "page.html", "--top-k", 1, "--tokens")
    assert (
        code == 0 and "generation:" in more and "response:" in more and set(out.splitlines()) < set(more.splitlines())
    )


def test_a_difference_is_shown_beside_an_exact_score(capsys, tmp_path, models, adapters):
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(5)))
    asked = ("query", made.path, "--prompt", "Say 5", "--generation", "blue 35")
    _, out, _ = call(capsys, *asked, "--refine", 3)
    (ranking,) = made.query("Say 5", "blue 35", refine=3)
    assert out.splitlines()[2:4] == [
        "  the first 3 are ranked by exact_score, epochs * learning_rate * the inner",
        "  product of full gradients",
    ]
    assert out.splitlines()[4].split() == ["rank", "score", "exact", "differs", "sample_id", "text"]
    for line, result in zip(out.splitlines()[5:], ranking.results, strict=True):
        if result.exact_score is None:
            assert line.split()[2] == result.sample_id
        else:
            shown = float(line.split()[3].removesuffix("%"))
            assert shown == pytest.approx(
                100 * (result.score / result.exact_score - 1) * (1 if result.exact_score > 0 else -1), abs=0.06
            )
    assert "differs" not in call(capsys, *asked)[1]


def test_how_far_scores_are_off_is_told_beside_exact_ones_too(capsys, monkeypatch):
    """They still are in a column of their own, and chose what is shown."""
    line = "  scores are off by 0.25 or so (one standard deviation)\n"
    exact, plain = sample_of("a", [1.0]), sample_of("a", [1.0], exact_score=None, tokens=None)
    for result in (exact, plain):
        assert line in drawn(capsys, monkeypatch, ranking_of(result, score_error=0.25))
        assert "off by" not in drawn(capsys, monkeypatch, ranking_of(result))
    assert drawn(capsys, monkeypatch, ranking_of(score_error=0.25)).splitlines()[1:] == ["  no sample matches"]


def test_that_nothing_stands_out_is_told_whatever_is_asked_for_besides(capsys, database, tmp_path, monkeypatch):
    monkeypatch.setattr("rapidin_vdb.ranking.chance", lambda error, samples: 1e9)
    asked = ("query", database.path, "--prompt", "Say 5", "--generation", "blue 35", "--top-k", 2)
    page = tmp_path / "page.html"
    for more in ((), ("--tokens",), ("--refine", 5), ("--html", page)):
        code, out, _ = call(capsys, *asked, *more)
        assert code == 0 and "  no positive score stands out: by chance alone" in out and "scores are off by" in out
    assert "no positive score stands out" in page.read_text("utf-8")


def test_of_many_groups_both_ends_are_shown(capsys, monkeypatch):
    """A column may have a value of its own in every sample, as one of numbers."""

    def lines(*scores) -> list[str]:
        groups = tuple(group_of(score, f"v{number}") for number, score in enumerate(scores))
        out = drawn(capsys, monkeypatch, ranking_of(sample_of("x", [1.0], tokens=None), groups=groups))
        return out.partition("  value\n")[2].splitlines()

    half = [float(score) for score in range(40, 0, -1)]
    few, many = lines(*half[:20]), lines(*half, *(-score - 0.5 for score in reversed(half)))
    assert [line.split()[3] for line in few] == [f"v{number}" for number in range(20)]
    assert [line.split()[3] for line in many[:-1]] == [f"v{number}" for number in (*range(10), *range(70, 80))]
    assert many[-1] == "  and 60 more, of less influence either way: --json has all"
    assert len(lines(*[0.0] * 30)) == 21 and lines(*[0.0] * 30)[-1].startswith("  and 10 more")
