"""The application: commands are added by the modules beside this one, and errors caught in one place."""

import logging
import os
import sys
import tempfile

import typer

from rapidin_vdb.cli import commands, evaluate
from rapidin_vdb.errors import RapidInError, out_of_handles, shown

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


# Typer has no public name for what its errors of usage have in common.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__base__  # type: ignore[assignment]


class _Shown(logging.Formatter):
    """What the library says, as a terminal may have it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message on one line."""
        return shown(record.getMessage())


def _name_temporary_folder() -> None:
    """Let there be a folder for temporary files, if only by name: libraries ask for it as they are imported.

    Where all disks are full there is none that can be written, and a purge, which would make room, needs none.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.curdir


def main() -> None:
    """Run the command line; an error of ours becomes a message and exit code 1."""
    told = logging.StreamHandler()
    told.setFormatter(_Shown())
    logging.basicConfig(handlers=[told], level=logging.ERROR)
    logging.getLogger("rapidin_vdb").setLevel(logging.INFO)
    _name_temporary_folder()
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageError as error:
        # Help is such an error too, where nothing else was asked for.
        error.message = shown(error.message, lines=True)
        error.show()
        sys.exit(error.exit_code)
    except typer.Abort:
        typer.echo("aborted", err=True)
        sys.exit(1)
    except RapidInError as error:
        # Each by itself: a name from a file must not make a line of its own.
        typer.echo("error: " + "\n  ".join(shown(str(line)) for line in error.args), err=True)
        sys.exit(1)
    except Exception as error:
        # Wherever it happens, in the libraries' own imports too.
        if not out_of_handles(error):
            raise
        typer.echo("error: too many open files; raise the limit (`ulimit -n 4096`) and run the same again", err=True)
        sys.exit(1)
