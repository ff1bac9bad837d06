"""What workers log is handed on to whoever started them, who says each thing once: all of them find out the same."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Told:
    """What a worker has logged."""

    name: str
    level: int
    message: str


class Teller(logging.Handler):
    """Hands on what is logged in this process."""

    def __init__(self, tell: Callable[[Told], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on one line."""
        self._tell(Told(record.name, record.levelno, record.getMessage()))


class Hearer:
    """Logs what workers have told, each thing once."""

    def __init__(self) -> None:
        """Begin with nothing heard."""
        self._heard: set[Told] = set()

    def hear(self, told: Iterable[Told]) -> None:
        """Log what has not been heard before."""
        for one in told:
            if one not in self._heard:
                self._heard.add(one)
                logging.getLogger(one.name).log(one.level, "%s", one.message)
