"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

DB = Annotated[str, typer.Argument(metavar="DB", help="Folder of the database, or s3://, gs://, az://.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Cluster = Annotated[
    str | None, typer.Option(help="Use a Ray cluster: its address, auto, or local for one that is started here.")
]
IndexName = Annotated[str | None, typer.Option("--index", help="Which built index to use [default: an exact one].")]
AsOf = Annotated[
    int | None, typer.Option(help="Answer from an older version of the table; `info --versions` lists them.")
]
Moved = Annotated[str | None, typer.Option(help="Where the model is now, if it has moved since init.")]
MovedAdapter = Annotated[str | None, typer.Option(help="Where the adapter is now, if it has moved since init.")]
Ids = Annotated[
    Path | None,
    typer.Option(
        help="File with one sample id a line, or JSON lines with an id, or what query --json or pool --json printed."
    ),
]
IdField = Annotated[str, typer.Option(help="Field that holds a unique id; without one, the content is the id.")]
