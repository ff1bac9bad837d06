"""The command `clean`."""

from pathlib import Path
from typing import Annotated

import typer

from rapidin_vdb.cli.ids import read_ids
from rapidin_vdb.cli.options import DB, IdField, Ids
from rapidin_vdb.cli.text import cut, printable
from rapidin_vdb.errors import shown
from rapidin_vdb.records import OnUnscored
from rapidin_vdb.results import CleanReport

_TOLD = 5


def clean(
    db: DB,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What was ingested.")],
    out: Annotated[
        Path,
        typer.Option(help="The new file: .jsonl or .jsonl.gz; or .parquet, if all are Parquet or saved datasets."),
    ],
    where: Annotated[str | None, typer.Option(help="SQL filter: records of samples that match are left out.")] = None,
    ids: Ids = None,
    absent: Annotated[
        bool, typer.Option("--absent", help="Leave out what is not in the database, as what was deleted.")
    ] = False,
    random: Annotated[
        int | None,
        typer.Option(
            help="Leave out so many samples, drawn from all in the database: what a removal is compared with."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of --random: the same seed draws the same samples.")] = 1,
    on_unscored: Annotated[
        OnUnscored,
        typer.Option(
            help="For a record that would go but was never scored: one with an id of theirs and another prompt or "
            "response, and, with --absent, one that was never in the database. Stop before anything is written, keep "
            "it, or leave it out."
        ),
    ] = "stop",
    id_field: IdField = "id",
) -> None:
    """Write training files again without some of their records.

    Example: rapidin-vdb clean db corpus.jsonl --ids marked.jsonl --out cleaned.jsonl
    """
    import rapidin_vdb

    if (where is not None) + (ids is not None) + absent + (random is not None) != 1:
        raise typer.BadParameter("give one of --where SQL, --ids FILE, --absent and --random N")
    database = rapidin_vdb.open(db)
    wanted = None if ids is None else read_ids(ids, database)
    report = database.clean(
        *files, out=out, where=where, ids=wanted, absent=absent, random=random, seed=seed, on_unscored=on_unscored,
        id_field=id_field,
    )  # fmt: skip
    _told(report, absent=absent, kept=on_unscored == "keep")


def _told(report: CleanReport, *, absent: bool, kept: bool) -> None:
    typer.echo(f"{report.written:,} records written to {shown(report.out)}; {report.left_out:,} left out", err=True)
    if absent and not report.left_out:
        typer.echo("nothing had to be left out: no record is of a sample that was deleted", err=True)
    elif absent and not report.written and not report.deleted:
        typer.echo("none of them is in the database; if another field holds the ids, name it: --id-field", err=True)
    if report.deleted:
        typer.echo(f"left out, for they had been deleted: {_records(report.deleted)}", err=True)
    for message in report.unscored:
        typer.echo(f"{'kept' if kept else 'left out'}: {shown(message)}", err=True)
    if report.by_id_alone:
        what = f"left out by id alone, for nothing else is known of these samples: {_records(report.by_id_alone)}"
        typer.echo(what, err=True)
    for name, count in report.as_text.items():
        what = f"field {printable(name)} is a text now in {_records(count)}, for JSON cannot hold what it was"
        typer.echo(f"{what}; Parquet can: --out FILE.parquet", err=True)
    if report.not_found:
        of = "of the database" if absent else "to be left out"
        what = f"1 sample {of} is" if report.not_found == 1 else f"{report.not_found:,} samples {of} are"
        typer.echo(f"{what} in none of the files: {cut(', '.join(report.first_not_found), 200)}", err=True)
    if report.bad:
        typer.echo(f"{len(report.bad):,} records have no sample id:", err=True)
    for message in report.bad[:_TOLD]:
        typer.echo(f"  {cut(shown(message), 200)}", err=True)


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count:,} records"
