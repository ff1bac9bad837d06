"""The command `ingest`."""

from pathlib import Path
from typing import Annotated

import typer

from rapidin_vdb.cli.options import DB, Cluster, IdField, Moved, MovedAdapter
from rapidin_vdb.cli.progress import progress_bars
from rapidin_vdb.cli.text import printable
from rapidin_vdb.errors import shown
from rapidin_vdb.records import OnBadRecord, OnDeleted, OnDuplicate
from rapidin_vdb.results import IngestEstimate, IngestReport, ReadRecords


def ingest(
    db: DB,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help=".jsonl, .ndjson, .json, .csv (each also .gz), .parquet or a saved dataset."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Split of the samples [default: the records' own, else train].")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Source of the samples [default: the records' own].")] = None,
    id_field: IdField = "id",
    limit: Annotated[int | None, typer.Option(help="Read this many records at most.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens a batch may have, padding included [default: by free memory].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, or several: cuda:0,cuda:1.")] = "auto",
    workers_per_device: Annotated[int, typer.Option(help="Processes a device, each with the model.")] = 1,
    cluster: Cluster = None,
    on_bad_record: Annotated[
        OnBadRecord, typer.Option(help="Stop before anything is written, or skip and list at the end.")
    ] = "stop",
    on_duplicate: Annotated[OnDuplicate, typer.Option(help="For an id that is there with other content.")] = "error",
    on_deleted: Annotated[OnDeleted, typer.Option(help="For a sample that was deleted before.")] = "add",
    token_gradients: Annotated[
        bool, typer.Option("--token-gradients", help="Store a RapidGrad for every response token too.")
    ] = False,
    token_width: Annotated[
        int | None, typer.Option(help="Length of those, a power of two [default: what is there, else 4096].")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, from timing a few batches; write nothing.")
    ] = False,
    model: Moved = None,
    adapter: MovedAdapter = None,
) -> None:
    """Add training records; those that are there already are left alone.

    Example: rapidin-vdb ingest db alpaca.jsonl.gz --source alpaca
    """
    import rapidin_vdb

    database = rapidin_vdb.open(db)
    with progress_bars() as progress:
        report = database.ingest(
            *files, split=split, source=source, id_field=id_field, limit=limit, batch_tokens=batch_tokens,
            device=device, workers_per_device=workers_per_device, cluster=cluster, on_bad_record=on_bad_record,
            on_duplicate=on_duplicate, on_deleted=on_deleted, token_gradients=token_gradients,
            token_width=token_width, dry_run=dry_run, model=model, adapter=adapter, progress=progress,
        )  # fmt: skip
    ingested(report)


def ingested(report: IngestReport | IngestEstimate) -> None:
    """Say what an ingest did, or would take."""
    if isinstance(report, IngestEstimate):
        _estimated(report)
        return
    parts = [f"{report.added:,} samples added"]
    parts += [f"{report.replaced:,} replaced"] if report.replaced else []
    parts += [f"{report.unchanged:,} were there already"] if report.unchanged else []
    parts += [f"{report.repeated:,} are repeated in these files"] if report.repeated else []
    parts += [f"{report.kept:,} kept as they were"] if report.kept else []
    parts += [f"{report.left_deleted:,} left out, for they had been deleted"] if report.left_deleted else []
    parts += [f"{len(report.bad):,} skipped"] if report.bad else []
    if parts == ["0 samples added"] and not report.token_gradients:
        typer.echo("0 samples added: there is no record in what was given", err=True)
        return
    parts += [f"{report.token_gradients:,} token gradients"] if report.token_gradients else []
    written = report.added + report.replaced
    rate, what = (written, "samples") if written else (report.token_gradients, "token gradients")
    speed = f" ({rate / report.seconds:,.1f} {what}/s, {report.tokens / report.seconds:,.0f} tokens/s)" if rate else ""
    typer.echo(f"{', '.join(parts)}, in {report.seconds:.1f} s{speed}; version {report.table_version}", err=True)
    _told(report, "were", "holds", "are back")
    for message in report.bad:
        typer.echo(f"skipped: {shown(message)}", err=True)


def _estimated(expected: IngestEstimate) -> None:
    there = f"; {expected.unchanged:,} are there already" if expected.unchanged else ""
    there += f"; {expected.repeated:,} are repeated in these files" if expected.repeated else ""
    there += f"; {expected.kept:,} would be kept as they are" if expected.kept else ""
    there += f"; {expected.left_deleted:,} left out, for they had been deleted" if expected.left_deleted else ""
    single = f", and {expected.token_gradients:,} token gradients" if expected.token_gradients else ""
    typer.echo(
        f"{expected.samples:,} samples of {expected.tokens:,} tokens, in {expected.batches:,} batches{single}{there}\n"
        f"{expected.bytes / 1e6:,.1f} MB in the database, {expected.peak_memory / 1e9:,.1f} GB of memory at the most\n"
        f"{expected.seconds:,.0f} s expected once the model is loaded, from timing a few batches; nothing was written"
    )
    _told(expected, "would be", "would hold", "would be back")
    for message in expected.bad:
        typer.echo(f"would be skipped: {shown(message)}", err=True)


def _told(found: ReadRecords, cut: str, hold: str, back: str) -> None:
    """Say what of the samples is otherwise than one might think, if anything."""
    if found.truncated:
        typer.echo(
            f"{found.truncated:,} of them {cut} cut to the database's limit of tokens (init --max-tokens)", err=True
        )
    if found.brought_back:
        typer.echo(
            f"{found.brought_back:,} of them had been deleted before, and {back}; leave such records out with: "
            "--on-deleted skip",
            err=True,
        )
    if found.unwritten:
        typer.echo(
            f"{found.unwritten:,} of them have a turn that the template does not write as it is, so that it has no "
            f"part in their gradients: {shown(found.first_unwritten)}",
            err=True,
        )
    if found.earlier_turns:
        typer.echo(
            f"{found.earlier_turns:,} of them have earlier turns of the assistant, which have no gradient: only the "
            "last one has. Where a model was trained on all of them, make a database with: init --template chat "
            "--turns all",
            err=True,
        )
    for name, place in found.mixed.items():
        typer.echo(f"column {printable(name)} {hold} text: its values are of several types ({shown(place)})", err=True)
