"""How long work says how far it is."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives the state of long work; faces draw it, the library only calls it."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say that `done` of `total` steps of a stage are done; `total` is 0 where it is not known."""
        ...


def silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""
