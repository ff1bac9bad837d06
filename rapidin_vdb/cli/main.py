"""The application: commands are added by the modules beside this one, and errors caught in one place."""

import logging
import sys

import typer

from rapidin_vdb.cli import commands, evaluate
from rapidin_vdb.errors import RapidInError

app = typer.Typer(
    name="rapidin-vdb",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=("Which training samples made a fine-tuned language model say this?\n\nStart with: rapidin-vdb demo"),
)
commands.add_to(app)
app.add_typer(evaluate.app)


def main() -> None:
    """Run the command line; an error of ours becomes a message and exit code 1."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("rapidin_vdb").setLevel(logging.INFO)
    try:
        app()
    except RapidInError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
