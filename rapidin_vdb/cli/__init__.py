"""The command line: parse, call one function, print."""

from rapidin_vdb.cli.main import main

__all__ = ["main"]
