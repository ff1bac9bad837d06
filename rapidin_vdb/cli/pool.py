"""The command `pool`."""

from pathlib import Path
from typing import Annotated

import typer

from rapidin_vdb.cli.options import DB, AsJson, AsOf, Cluster, Device, IndexName, Moved, MovedAdapter
from rapidin_vdb.cli.progress import progress_bars
from rapidin_vdb.cli.ranked import indented, named
from rapidin_vdb.cli.show import json_line
from rapidin_vdb.cli.text import columns, cut, fitted, padded, printable
from rapidin_vdb.results import Pool


def pool(
    db: DB,
    file: Annotated[Path, typer.Option(help="The generations: records with prompt and generation.")],
    size: Annotated[int, typer.Option(help="How many samples to return.")] = 100,
    where: Annotated[str | None, typer.Option(help="SQL filter, applied before the search.")] = None,
    harmful: Annotated[bool, typer.Option("--harmful", help="Those of most negative influence.")] = False,
    both: Annotated[
        bool, typer.Option("--both", help="Those of largest influence either way: most positive, or most negative.")
    ] = False,
    focus: Annotated[
        list[str] | None, typer.Option(help="Ask only about this text of the generations; may be given several times.")
    ] = None,
    index_name: IndexName = None,
    as_of: AsOf = None,
    as_json: AsJson = False,
    device: Device = "auto",
    cluster: Cluster = None,
    model: Moved = None,
    adapter: MovedAdapter = None,
) -> None:
    """List the samples of largest influence on any of several generations.

    Example: rapidin-vdb pool db --file queries.jsonl --both --size 150 --json > found.jsonl
    """
    import rapidin_vdb

    with progress_bars() as progress:
        found = rapidin_vdb.open(db).pool(
            file=file, size=size, where=where, harmful=harmful, both=both, focus=focus, index=index_name, as_of=as_of,
            model=model, adapter=adapter, device=device, cluster=cluster, progress=progress,
        )  # fmt: skip
    if as_json:
        json_line(found.to_dict())
    else:
        _table(found)


def _table(found: Pool) -> None:
    matching = f" that match {printable(found.where)}" if found.where is not None else ""
    said = "1 generation" if len(found.queries) == 1 else f"{len(found.queries):,} generations"
    focus = f", on {', '.join(map(named, found.focus))}" if found.focus else ""
    typer.echo(f"{said}{focus}: {len(found.results):,} of {found.searched:,} samples{matching}")
    if found.note is not None:
        typer.echo(indented(printable(found.note)))
    if found.score_error and found.results:
        typer.echo(f"  scores are off by {found.score_error:.2g} or so (one standard deviation)")
    if not found.results:
        typer.echo("  no sample matches")
        return
    names = [[printable(name) for name in (result.sample_id, result.query_id)] for result in found.results]
    wide = [
        min(max(len(head), *(columns(row[place]) for row in names)), most)
        for place, (head, most) in enumerate((("sample_id", 20), ("query_id", 14)))
    ]
    typer.echo(f"{'rank':>5}  {'score':>10}  {'sample_id':<{wide[0]}}  {'query_id':<{wide[1]}}  text")
    for result in found.results:
        parts = [padded(cut(result.sample_id, wide[0]), wide[0]), padded(_end_of(result.query_id, wide[1]), wide[1])]
        line = "  ".join([f"{result.rank:>5}", f"{result.score:>10.4g}", *parts, ""])
        text = f"{result.prompt} -> {result.response}" if result.prompt else result.response
        typer.echo(line + cut(text, max(80 - columns(line), 14)))


def _end_of(name: str, room: int) -> str:
    """Return as much of a name's end as there is room for: it is what tells many names apart."""
    return printable(name) if columns(printable(name)) <= room else "…" + fitted(name, room - 1, last=True)
