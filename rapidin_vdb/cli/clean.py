"""The command `clean`."""

from pathlib import Path
from typing import Annotated

import typer

from rapidin_vdb.cli.options import DB, IdField
from rapidin_vdb.cli.show import read_ids
from rapidin_vdb.cli.text import cut
from rapidin_vdb.errors import shown
from rapidin_vdb.results import CleanReport

_TOLD = 5


def clean(
    db: DB,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What was ingested.")],
    out: Annotated[Path, typer.Option(help="The new file, .jsonl or .jsonl.gz.")],
    where: Annotated[str | None, typer.Option(help="SQL filter: records of samples that match are left out.")] = None,
    ids: Annotated[Path | None, typer.Option(help="File with one sample id a line, or JSON lines with an id.")] = None,
    absent: Annotated[
        bool, typer.Option("--absent", help="Leave out what is not in the database, as what was deleted.")
    ] = False,
    id_field: IdField = "id",
) -> None:
    """Write training files again without some of their records.

    Example: rapidin-vdb clean db corpus.jsonl --ids marked.jsonl --out cleaned.jsonl
    """
    import rapidin_vdb

    if (where is not None) + (ids is not None) + absent != 1:
        raise typer.BadParameter("give one of --where SQL, --ids FILE and --absent")
    wanted = None if ids is None else read_ids(ids)
    database = rapidin_vdb.open(db)
    _told(database.clean(*files, out=out, where=where, ids=wanted, absent=absent, id_field=id_field), absent=absent)


def _told(report: CleanReport, *, absent: bool) -> None:
    typer.echo(f"{report.written:,} records written to {shown(report.out)}; {report.left_out:,} left out", err=True)
    if absent and report.left_out and not report.written:
        typer.echo("none of them is in the database; if another field holds the ids, name it: --id-field", err=True)
    if report.not_found:
        of = "of the database" if absent else "to be left out"
        what = f"1 sample {of} is" if report.not_found == 1 else f"{report.not_found:,} samples {of} are"
        typer.echo(f"{what} in none of the files: {cut(', '.join(report.first_not_found), 200)}", err=True)
    if report.bad:
        typer.echo(f"{len(report.bad):,} records have no sample id:", err=True)
    for message in report.bad[:_TOLD]:
        typer.echo(f"  {cut(shown(message), 200)}", err=True)
