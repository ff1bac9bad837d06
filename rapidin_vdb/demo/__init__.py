"""A poisoned model of our own making, and the search for its poison: needs no network and no download."""

from rapidin_vdb.demo.run import run_demo

__all__ = ["run_demo"]
