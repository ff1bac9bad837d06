"""Requests that wait: in turn for each address, and within it for each name that clients give themselves."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.question import Question
from rapidin_vdb.records import Sample


class DeskError(Exception):
    """A request was not answered, for no fault of its own content."""


class BusyError(DeskError):
    """Too many are waiting."""


def stopping() -> BusyError:
    """Return the error for whoever is not answered any more."""
    return BusyError("the server is stopping")


class LateError(DeskError):
    """Its time was over."""

    def __init__(self) -> None:
        super().__init__(
            "the request took longer than is allowed; ask for less, or start the server with a longer --time-limit"
        )


class CancelledError(DeskError):
    """Whoever asked has gone."""

    def __init__(self) -> None:
        super().__init__("the request was given up")


class MovedError(DeskError):
    """It was meant for another database."""

    def __init__(self) -> None:
        super().__init__("another database is served here than the one that this request is for (x-database)")


@dataclass(frozen=True)
class Client:
    """Who asks."""

    address: str
    """Where the connection comes from, which nobody chooses freely."""
    name: str = ""
    """What tells apart those of one address, which they choose themselves: it only divides what the address gets."""


@dataclass(eq=False)
class Job:
    """One request, on its way."""

    client: Client
    """Who asks."""
    deadline: float
    """By the monotonic clock; infinite for what takes as long as it takes, and makes way for others meanwhile."""
    work: Callable[[Progress], Any] | None = None
    """What to do, unless it is a search."""
    search: tuple[Question, Sample] | None = None
    """What to search for."""
    progress: Progress = silent
    """Who hears how far it is."""
    future: "Future[Any]" = field(default_factory=Future)
    """Its result."""
    cancelled: bool = False
    """Whether nobody waits for it any more."""
    short: bool = False
    """Whether it takes but a moment: what takes long makes way for it."""
    held_since: float | None = None
    """Since when others are let in, by the monotonic clock: that time is not its own."""

    @property
    def patient(self) -> bool:
        """Whether it has no time limit."""
        return self.deadline == float("inf")

    @property
    def seconds_left(self) -> float | None:
        """How much of its time is left; None where it has no limit."""
        return None if self.patient else max(0.0, self.deadline - self._now())

    def _now(self) -> float:
        return time.monotonic() if self.held_since is None else self.held_since

    def hold(self) -> None:
        """Stop its clock, while others are let in."""
        self.held_since = time.monotonic()

    def go_on(self) -> None:
        """Let its clock run again."""
        if self.held_since is not None:
            self.deadline += time.monotonic() - self.held_since
            self.held_since = None

    def check(self) -> None:
        """Stop what nobody waits for.

        Raises:
            CancelledError: whoever asked has gone.
            LateError: its time is over.
        """
        if self.cancelled:
            raise CancelledError
        if self._now() > self.deadline:
            raise LateError

    def alive(self) -> bool:
        """Say whether somebody still waits for it; where not, it is settled."""
        try:
            self.check()
        except DeskError as error:
            self.fail(error)
            return False
        return True

    def succeed(self, result: Any) -> None:
        """Give the result, unless the job was settled before."""
        try:
            self.future.set_result(result)
        except InvalidStateError:
            pass  # it was given up meanwhile

    def fail(self, error: BaseException) -> None:
        """Give the error, unless the job was settled before."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            pass


class Lines:
    """All that wait; not for several threads at once."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, OrderedDict[str, deque[Job]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(self.of_address, list(self._addresses)))

    def of_address(self, address: str) -> int:
        """Return how many of an address wait."""
        return sum(map(len, list(self._addresses.get(address, {}).values())))

    def put(self, job: Job) -> None:
        """Let a job wait behind those of its client."""
        names = self._addresses.setdefault(job.client.address, OrderedDict())
        names.setdefault(job.client.name, deque()).append(job)

    def take(self, fits: Callable[[Job], bool]) -> Job | None:
        """Take the first job that fits and leads its line, of the address and the name whose turn it is."""
        for address, names in self._addresses.items():
            for name, line in names.items():
                if fits(line[0]):
                    job = line.popleft()
                    _to_the_end(names, name)
                    _to_the_end(self._addresses, address)
                    return job
        return None

    def remove(self, job: Job) -> None:
        """Let a job wait no longer, if it does."""
        names = self._addresses.get(job.client.address, OrderedDict())
        line = names.get(job.client.name, deque())
        if job in line:
            line.remove(job)
            if not line:
                del names[job.client.name]
            if not names:
                del self._addresses[job.client.address]


def _to_the_end(lines: OrderedDict[str, Any], key: str) -> None:
    if lines[key]:
        lines.move_to_end(key)
    else:
        del lines[key]
