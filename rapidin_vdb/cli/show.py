"""What the commands print: data to stdout, messages to stderr."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rapidin_vdb.errors import SpecError
from rapidin_vdb.results import (
    DatabaseInfo,
    IndexInfo,
    IngestEstimate,
    IngestReport,
    RankedSample,
    Ranking,
    StoredSample,
)

if TYPE_CHECKING:
    from rapidin_vdb.database import Database


def json_line(value: Any) -> None:
    """Print one JSON object on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def created(database: "Database") -> None:
    """Say what was made."""
    stored = database.fingerprint
    typer.echo(
        f"made {database.path}: {len(stored.theta)} parameter tensors of {stored.gradient_length:,} coordinates, "
        f"sketched to width {stored.sketch.width:,}. Next: rapidin-vdb ingest {database.path} FILE",
        err=True,
    )


def ingested(report: IngestReport | IngestEstimate) -> None:
    """Say what an ingest did, or would take."""
    if isinstance(report, IngestEstimate):
        _estimated(report)
        return
    parts = [f"{report.added:,} samples added"]
    parts += [f"{report.replaced:,} replaced"] if report.replaced else []
    parts += [f"{report.unchanged:,} were there already"] if report.unchanged else []
    parts += [f"{report.kept:,} kept as they were"] if report.kept else []
    parts += [f"{len(report.bad):,} skipped"] if report.bad else []
    rate = (report.added + report.replaced) / report.seconds
    typer.echo(f"{', '.join(parts)}, in {report.seconds:.1f} s ({rate:,.1f} samples/s)", err=True)
    for message in report.bad:
        typer.echo(f"skipped: {message}", err=True)


def _estimated(expected: IngestEstimate) -> None:
    typer.echo(
        f"{expected.samples:,} samples of {expected.tokens:,} tokens, in {expected.batches:,} batches\n"
        f"{expected.bytes / 1e6:,.1f} MB in the database, {expected.peak_memory / 1e9:,.1f} GB of memory at the most\n"
        f"{expected.seconds:,.0f} s expected, from timing a few batches; nothing was written"
    )
    for message in expected.bad:
        typer.echo(f"would be skipped: {message}", err=True)


def indexed(built: IndexInfo) -> None:
    """Say what was built."""
    typer.echo(
        f"index {built.name} holds {built.samples:,} samples of version {built.table_version}{_recalled(built)}",
        err=True,
    )


def _recalled(built: IndexInfo) -> str:
    if built.recall is None:
        return ""
    return (
        f"; not exact: it finds {100 * built.recall['recall']:.1f} % of the best {built.recall['at']} "
        f"(measured with {built.recall['queries']} samples as queries)"
    )


def ranked(rankings: Sequence[Ranking], *, as_json: bool) -> None:
    """Print rankings as tables, or one JSON object a query."""
    for number, ranking in enumerate(rankings):
        if as_json:
            json_line(ranking.to_dict())
        else:
            if number:
                typer.echo("")
            _ranking_table(ranking)


def _ranking_table(ranking: Ranking) -> None:
    matching = f" that match {ranking.where}" if ranking.where is not None else ""
    typer.echo(f"{_printable(ranking.query_id)}: {len(ranking.results)} of {ranking.searched:,} samples{matching}")
    if not ranking.results:
        typer.echo("  no sample matches")
        return
    _result_lines(ranking.results)
    if ranking.harmful is not None:
        typer.echo("most negative:")
        _result_lines(ranking.harmful)
    if ranking.groups is not None:
        typer.echo(f"{'samples':>8}  {'influence':>10}  value")
        for group in ranking.groups:
            value = "(none)" if group.value is None else _cut(str(group.value), 56)
            typer.echo(f"{group.samples:>8,}  {group.score:>10.4g}  {value}")


def _result_lines(results: Sequence[RankedSample]) -> None:
    wide = min(max(len(_printable(result.sample_id)) for result in results), 24)
    typer.echo(f"{'rank':>4}  {'score':>10}  {'sample_id':<{wide}}  {'split':<8}  text")
    for result in results:
        name = _cut(result.sample_id, wide)
        text = f"{result.prompt} -> {result.response}" if result.prompt else result.response
        line = f"{result.rank:>4}  {result.score:>10.4g}  {name:<{wide}}  {_cut(result.split, 8):<8}  "
        typer.echo(line + _cut(text, max(80 - len(line), 16)))


def sample(stored: StoredSample, *, as_json: bool) -> None:
    """Print one sample."""
    if as_json:
        json_line(stored.to_dict())
        return
    cut = ", cut to fit" if stored.truncated else ""
    source = f"  source: {_printable(stored.source)}" if stored.source is not None else ""
    typer.echo(f"{_printable(stored.sample_id)}  split: {_printable(stored.split)}{source}")
    typer.echo(f"{stored.tokens} response tokens{cut}, loss {stored.loss:.4f} nats")
    for name, value in stored.metadata.items():
        typer.echo(f"{name}: {_printable(str(value))}")
    for title, text in (("prompt", stored.prompt), ("response", stored.response)):
        if text is not None:
            typer.echo(f"\n{title}:\n{textwrap.indent(_printable(text, lines=True), '  ')}")


def info(found: DatabaseInfo, *, as_json: bool) -> None:
    """Print what a database is."""
    if as_json:
        json_line(found.to_dict())
        return
    for name, value in (found.to_dict() | {"columns": None}).items():
        if name == "columns":
            typer.echo(
                textwrap.fill(", ".join(found.columns), 80, initial_indent=f"{name:<15}", subsequent_indent=" " * 15)
            )
        elif name == "indexes":
            for built in found.indexes:
                state = "fresh" if built.fresh else f"of version {built.table_version}; a query brings it up to date"
                line = f"{built.name}: {built.samples:,} samples, {state}{_recalled(built)}"
                typer.echo(textwrap.fill(line, 80, initial_indent=f"{'index':<15}", subsequent_indent=" " * 15))
        else:
            typer.echo(
                f"{name.replace('_', ' '):<14} {f'{value:,}' if type(value) is int and name != 'seed' else value}"
            )


def read_ids(path: Path) -> list[str]:
    """Return the sample ids in a file, one a line.

    Raises:
        SpecError: the file cannot be read, or names none.
    """
    try:
        wanted = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--ids {path}: cannot be read: {error}") from error
    if not wanted:
        raise SpecError(f"--ids {path}: no id in it; wanted one a line")
    return wanted


def deleted(result: list[str] | int, wanted: list[str] | None) -> None:
    """Say what was deleted, and which ids were not there."""
    count = result if isinstance(result, int) else len(result)
    typer.echo(f"{count:,} samples deleted", err=True)
    if wanted is not None and not isinstance(result, int):
        missing = sorted(set(wanted) - set(result))
        if missing:
            typer.echo(f"{len(missing):,} ids were not in the database: {_cut(', '.join(missing), 200)}", err=True)


def _cut(text: str, length: int) -> str:
    text = _printable(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"


def _printable(text: str | None, *, lines: bool = False) -> str:
    """Show control characters instead of sending them to the terminal: a record may hold escape sequences."""
    return "".join(
        character if character.isprintable() or (lines and character == "\n") else repr(character)[1:-1]
        for character in text or ""
    )
