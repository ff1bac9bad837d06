"""What the commands print: data to stdout, messages to stderr."""

import json
import shlex
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from rapidin_vdb.cli.ranked import ranking_table
from rapidin_vdb.cli.text import cut, printable
from rapidin_vdb.errors import shown
from rapidin_vdb.records import Sample
from rapidin_vdb.results import (
    DatabaseInfo,
    IndexInfo,
    KeptVersion,
    Ranking,
    StoredSample,
    VerifyReport,
)

if TYPE_CHECKING:
    from rapidin_vdb.database import Database


def json_line(value: Any) -> None:
    """Print one JSON object on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def created(database: "Database") -> None:
    """Say what was made."""
    stored, path = database.fingerprint, shown(database.path)
    typer.echo(
        f"made {path}: {len(stored.theta)} parameter tensors of {stored.gradient_length:,} coordinates, sketched to "
        f"width {stored.sketch.width:,}; prompts are written by the template {stored.template}. "
        f"Next: rapidin-vdb ingest {shlex.quote(path)} FILE",
        err=True,
    )


def indexed(built: IndexInfo) -> None:
    """Say what was built."""
    typer.echo(
        f"index {built.name} holds {built.samples:,} {built.level}s of version {built.table_version}{_recalled(built)}",
        err=True,
    )


def _recalled(built: IndexInfo) -> str:
    if built.recall is None:
        return ""
    at, harmful = built.recall["at"], built.recall.get("recall_harmful")
    # One of before both ends were measured has it once `index` is run again.
    lowest = "" if harmful is None else f" and {100 * harmful:.0f} % of the most negative {at}"
    return (
        f"; not exact: it finds {100 * built.recall['recall']:.0f} % of the best {at}{lowest} "
        f"(measured with {built.recall['queries']} samples as queries)"
    )


def ranked(rankings: Sequence[Ranking], queries: Sequence[Sample], *, as_json: bool, words: bool = True) -> None:
    """Print rankings as tables, with the words of samples if so wanted, or one JSON object a query."""
    for number, (ranking, query) in enumerate(zip(rankings, queries, strict=True)):
        if as_json:
            json_line(ranking.to_dict())
        else:
            if number:
                typer.echo("")
            ranking_table(ranking, query, words=words)


def sample(stored: StoredSample, *, as_json: bool) -> None:
    """Print one sample."""
    if as_json:
        json_line(stored.to_dict())
        return
    cut = ", cut to fit" if stored.truncated else ""
    source = f"  source: {printable(stored.source)}" if stored.source is not None else ""
    typer.echo(f"{printable(stored.sample_id)}  split: {printable(stored.split)}{source}")
    typer.echo(f"{stored.tokens} response tokens{cut}, loss {stored.loss:.4f} nats")
    for name, value in stored.metadata.items():
        typer.echo(f"{name}: {printable(str(value))}")
    for title, text in (("prompt", stored.prompt), ("response", stored.response)):
        if text is not None:
            typer.echo(f"\n{title}:\n{textwrap.indent(printable(text, lines=True), '  ')}")


def info(found: DatabaseInfo, *, as_json: bool) -> None:
    """Print what a database is."""
    if as_json:
        json_line(found.to_dict())
        return
    for name, value in (found.to_dict() | dict(found.made_with) | {"columns": None}).items():
        if name == "columns":
            typer.echo(
                textwrap.fill(", ".join(found.columns), 80, initial_indent=f"{name:<15}", subsequent_indent=" " * 15)
            )
        elif name == "indexes":
            for built in found.indexes:
                old = f"of version {built.table_version}; a query brings it up to date, unless over 30 % changed"
                state = "fresh" if built.fresh else old
                line = f"{built.name}: {built.samples:,} {built.level}s, {state}{_recalled(built)}"
                typer.echo(textwrap.fill(line, 80, initial_indent=f"{'index':<15}", subsequent_indent=" " * 15))
        else:
            typer.echo(
                f"{name.replace('_', ' '):<14} {f'{value:,}' if type(value) is int and name != 'seed' else value}"
            )


def versions(kept: Sequence[KeptVersion], *, as_json: bool) -> None:
    """Print the versions of a database, one a line."""
    if not as_json:
        typer.echo(f"{'version':>7}  {'made':<19}  {'samples':>12}  made by")
    for version in kept:
        if as_json:
            json_line(version.to_dict())
        else:
            line = f"{version.version:>7}  {version.made:%Y-%m-%d %H:%M:%S}  {version.samples:>12,}  {version.made_by}"
            typer.echo(line.rstrip())


def verified(report: VerifyReport, *, as_json: bool) -> None:
    """Print what `verify` found."""
    if as_json:
        json_line(report.to_dict())
        return
    for title, findings in (("wrong", report.findings), ("mended", report.mended)):
        for finding in findings:
            typer.echo(f"{title}: {printable(finding.place)}: {shown(finding.what)}")
    what = f"{report.samples:,} samples" + (f" and {report.tokens:,} tokens" if report.tokens else "")
    verdict = "all as it was written" if not report.findings else f"{len(report.findings):,} findings"
    typer.echo(f"{what}: {verdict}", err=True)


def deleted(result: list[str] | int, wanted: list[str] | None) -> None:
    """Say what was deleted, and which ids were not there."""
    count = result if isinstance(result, int) else len(result)
    typer.echo(f"{count:,} samples deleted", err=True)
    if wanted is not None and not isinstance(result, int):
        missing = sorted(set(wanted) - set(result))
        if missing:
            typer.echo(f"{len(missing):,} ids were not in the database: {cut(', '.join(missing), 200)}", err=True)


def purged(freed: int) -> None:
    """Say what a purge did, and what it cannot reach; others may have written meanwhile, so that nothing is freed."""
    less = f", which take {freed:,} bytes less than before" if freed > 0 else ""
    typer.echo(
        f"purged: what was deleted or replaced is in none of its files{less}; older versions are gone, and --as-of "
        "cannot reach them\nnot reached (see SECURITY.md): copies and snapshots, what a bucket with versioning keeps, "
        "pages of --html, marks in browsers, other machines' caches of a bucket, blocks that a disk keeps",
        err=True,
    )
