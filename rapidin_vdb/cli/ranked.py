"""Rankings in the terminal: a table, and tokens in colours."""

import textwrap
from collections.abc import Sequence

import typer

from rapidin_vdb.cli.coloured import asked_lines, largest_score, legend_line, sample_lines
from rapidin_vdb.cli.text import columns, cut, fitted, padded, printable, token_label
from rapidin_vdb.pieces import pieces_of
from rapidin_vdb.records import Focus, Sample
from rapidin_vdb.results import GroupInfluence, RankedSample, RankedToken, Ranking

# A column may have a value of its own in every sample.
_GROUPS = 20


def ranking_table(ranking: Ranking, query: Sample, *, words: bool = True) -> None:
    """Print one ranking; with the `words` of samples that have scores, what the model was asked and said above them."""
    matching = f" that match {printable(ranking.where)}" if ranking.where is not None else ""
    focus = f", on {', '.join(map(named, ranking.focus))}" if ranking.focus else ""
    what = f"{len(ranking.results)} of {ranking.searched:,} {ranking.level}s{matching}"
    typer.echo(f"{printable(ranking.query_id)}{focus}: {what}")
    if ranking.note is not None:
        typer.echo(indented(printable(ranking.note)))
    if ranking.score_error and ranking.results:
        typer.echo(f"  scores are off by {ranking.score_error:.2g} or so (one standard deviation)")
    _, _, again = ranking.score_unit.partition("; ")
    if again:
        typer.echo(indented(again))
    if not ranking.results:
        if not ranking.without_tokens:
            typer.echo("  no sample matches")
        return
    results = (*ranking.results, *(ranking.harmful or ()))
    most = largest_score(results)
    words = words and any(isinstance(result, RankedSample) and result.tokens is not None for result in results)
    if words:
        said = query.response if ranking.generation is None else ranking.generation
        asked_lines(query.prompt, said, ranking.focus or ())
        legend_line(most)
    _result_lines(ranking.results, most, words=words)
    if ranking.harmful is not None:
        typer.echo("most negative:")
        _result_lines(ranking.harmful, most, words=words)
    if ranking.groups is not None:
        _group_lines(ranking.groups)


def indented(text: str) -> str:
    """Return a text in lines of 80 columns, two of them empty."""
    return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="  ")


def _group_lines(groups: Sequence[GroupInfluence]) -> None:
    """Print the groups that are farthest from zero, in the order that all of them have."""
    typer.echo(f"{'samples':>8}  {'influence':>10}  {'off by':>8}  value")
    shown = sorted(groups, key=lambda group: -abs(group.score))[:_GROUPS]
    for group in sorted(shown, key=lambda group: -group.score):
        value = "(none)" if group.value is None else cut(str(group.value), 46)
        typer.echo(f"{group.samples:>8,}  {group.score:>10.4g}  {group.error:>8.2g}  {value}")
    if len(shown) < len(groups):
        typer.echo(f"  and {len(groups) - len(shown):,} more, of less influence either way: --json has all")


def named(entry: Focus) -> str:
    """Return a text or span of a focus as it is told."""
    return printable(entry) if isinstance(entry, str) else f"characters {entry[0]} to {entry[1]}"


def _result_lines(results: Sequence[RankedSample | RankedToken], most: float, *, words: bool) -> None:
    exact = any(isinstance(result, RankedSample) and result.exact_score is not None for result in results)
    single = any(isinstance(result, RankedToken) for result in results)
    longest = max(columns(printable(result.sample_id)) for result in results)
    wide = min(max(longest, len("sample_id")), 22 if exact else 24)
    heads = [f"{'rank':>4}", f"{'score':>10}", *([f"{'exact':>10}", f"{'differs':>8}"] if exact else [])]
    heads += [f"{'sample_id':<{wide}}", *(["token"] if single else []), "text"]
    typer.echo("  ".join(heads))
    for result in results:
        parts = [f"{result.rank:>4}", f"{result.score:>10.4g}"]
        if exact:
            parts += [f"{part:>{width}}" for part, width in zip(_exact(result), (10, 8), strict=True)]
        parts += [padded(cut(result.sample_id, wide), wide)]
        parts += [f"{result.token_index:>5}"] if isinstance(result, RankedToken) else []
        line = "  ".join([*parts, ""])
        room = max(80 - columns(line), 14)
        typer.echo(line + (_in_context(result, room) if isinstance(result, RankedToken) else _shown(result, room)))
        if words and isinstance(result, RankedSample) and result.tokens is not None:
            sample_lines(result, most)


def _exact(result: RankedSample | RankedToken) -> tuple[str, str]:
    """Return the exact score, and by what share of it the score from RapidGrads is larger."""
    if not isinstance(result, RankedSample) or result.exact_score is None:
        return "", ""
    if not result.exact_score or result.difference is None:
        return f"{result.exact_score:.4g}", ""
    share = 100 * result.difference / abs(result.exact_score)
    return f"{result.exact_score:.4g}", f"{share:+.1f}%" if abs(share) < 10_000 else "+++" if share > 0 else "---"


def _shown(result: RankedSample, room: int) -> str:
    return cut(f"{result.prompt} -> {result.response}" if result.prompt else result.response, room)


def _in_context(token: RankedToken, room: int) -> str:
    """Return a token in brackets, with what stands around it; of a letter in part, all of it."""
    # What may be shown, in pieces that are seen as one character each.
    first = max(token.start - 4 * room, 0)
    near = token.response[first : token.end + 4 * room]
    own = before = after = ""
    for piece in pieces_of(near, [(place, place + 1) for place in range(len(near))]):
        if piece.tokens[-1] + first < token.start:
            before += piece.text
        elif piece.tokens[0] + first < token.end:
            own += piece.text
        else:
            after += piece.text
    end = "end of text" if token.end == len(token.response) else "end of answer"
    inside = token_label(own, room - 2) if own else end
    left = max(room - columns(inside) - 2, 0)
    start = fitted(before, left // 2 if own else left, last=True)
    return f"{start}[{inside}]{fitted(after, left - columns(start))}"
