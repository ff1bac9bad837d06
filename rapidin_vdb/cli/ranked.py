"""Rankings in the terminal: a table, and tokens in colours."""

from collections.abc import Sequence

import typer

from rapidin_vdb.cli.text import cut, printable, token_label
from rapidin_vdb.pieces import pieces_of
from rapidin_vdb.records import Focus
from rapidin_vdb.results import RankedSample, RankedToken, Ranking

# The darkest red and blue of a scale that begins at white, with black letters: readable on any terminal.
_COLOURS = {True: (214, 96, 77), False: (67, 147, 195)}
_SHOWN = 5


def ranking_table(ranking: Ranking) -> None:
    """Print one ranking."""
    matching = f" that match {printable(ranking.where)}" if ranking.where is not None else ""
    focus = f", on {', '.join(map(_named, ranking.focus))}" if ranking.focus else ""
    what = "tokens" if any(isinstance(result, RankedToken) for result in ranking.results) else "samples"
    typer.echo(f"{printable(ranking.query_id)}{focus}: {len(ranking.results)} of {ranking.searched:,} {what}{matching}")
    if not ranking.results:
        typer.echo("  no sample matches")
        return
    most = _largest((*ranking.results, *(ranking.harmful or ())))
    _result_lines(ranking.results, most)
    if ranking.harmful is not None:
        typer.echo("most negative:")
        _result_lines(ranking.harmful, most)
    if ranking.groups is not None:
        typer.echo(f"{'samples':>8}  {'influence':>10}  value")
        for group in ranking.groups:
            value = "(none)" if group.value is None else cut(str(group.value), 56)
            typer.echo(f"{group.samples:>8,}  {group.score:>10.4g}  {value}")


def _named(entry: Focus) -> str:
    return printable(entry) if isinstance(entry, str) else f"characters {entry[0]} to {entry[1]}"


def _result_lines(results: Sequence[RankedSample | RankedToken], most: float) -> None:
    wide = min(max(len(printable(result.sample_id)) for result in results), 24)
    exact = any(isinstance(result, RankedSample) and result.exact_score is not None for result in results)
    typer.echo(f"{'rank':>4}  {'score':>10}  {'exact':>10}  "[: None if exact else 18] + f"{'sample_id':<{wide}}  text")
    for result in results:
        line = f"{result.rank:>4}  {result.score:>10.4g}  "
        if exact:
            known = result.exact_score if isinstance(result, RankedSample) else None
            line += f"{'' if known is None else f'{known:.4g}':>10}  "
        line += f"{cut(result.sample_id, wide):<{wide}}  "
        room = max(80 - len(line), 16)
        typer.echo(line + (_in_context(result, room) if isinstance(result, RankedToken) else _shown(result, room)))
        if isinstance(result, RankedSample) and result.tokens is not None:
            _token_lines(result, most)


def _shown(result: RankedSample, room: int) -> str:
    return cut(f"{result.prompt} -> {result.response}" if result.prompt else result.response, room)


def _in_context(token: RankedToken, room: int) -> str:
    """Return a token in brackets, with what stands around it."""
    if not token.text:
        return "[end of text]"
    inside = token_label(token.text, room - 2)
    around = max((room - len(inside) - 2) // 2, 0)
    before = printable(" ".join(token.response[: token.start].split(" ")))
    after = printable(" ".join(token.response[token.end :].split(" ")))
    return f"{before[max(len(before) - around, 0) :]}[{inside}]{after[:around]}"


def _token_lines(result: RankedSample, most: float) -> None:
    """Print a response in colours, and its strongest tokens in numbers."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    assert result.tokens is not None
    text, console = Text(), Console(highlight=False, soft_wrap=False)
    few = console.color_system not in ("256", "truecolor")
    for piece in pieces_of(result.response, [(token.start, token.end) for token in result.tokens]):
        score = sum(result.tokens[number].score for number in piece.tokens)
        text.append(printable(piece.text, lines=True), style=_style(score, most, few=few) if piece.tokens else "")
    console.print(Padding(text, (0, 0, 0, 6)))
    strongest = sorted(result.tokens, key=lambda token: (-abs(token.score), token.start))[:_SHOWN]
    named = ", ".join(f"{token_label(token.text, 16)} {token.score:+.3g}" for token in strongest)
    typer.echo(f"      strongest: {named}")


def _style(score: float, most: float, *, few: bool = False) -> str:
    """Return the style of a score: a shade of red or blue; in steps where a terminal has few colours, and no shades."""
    share = min(abs(score) / most, 1.0) if most else 0.0
    if few:
        name = "red" if score > 0 else "blue"
        return (
            "" if share < 0.15 else name if share < 0.4 else f"bold {name}" if share < 0.7 else f"bold white on {name}"
        )
    if share < 0.05:
        return ""
    red, green, blue = (round(255 + share * (full - 255)) for full in _COLOURS[score > 0])
    return f"black on rgb({red},{green},{blue})"


def _largest(results: Sequence[RankedSample | RankedToken]) -> float:
    scores = [
        abs(token.score) for result in results if isinstance(result, RankedSample) for token in result.tokens or ()
    ]
    return max(scores, default=0.0)
