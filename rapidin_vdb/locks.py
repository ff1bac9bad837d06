"""Locks between processes, which the system lets go of when their holder dies; who waits for one says so."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

# Commits take less as a rule: whoever waits longer would like to know for what.
QUIET_SECONDS = 1.0
# Between two steps of waiting.
_STEP_SECONDS = 0.2

_STEP: ContextVar[Callable[[bool], bool]] = ContextVar("step", default=lambda keeping: False)
_KEEPING: ContextVar[bool] = ContextVar("keeping", default=False)


@contextmanager
def while_waiting(step: Callable[[bool], bool]) -> Iterator[None]:
    """Call `step` now and then where this thread waits for a lock, until the block ends; what it raises ends the wait.

    So a thread that serves others can do so meanwhile, or give up what nobody wants any more. It is told whether that
    would lose what was computed, and says whether it did something: then it is called again at once.
    """
    before = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(before)


@contextmanager
def keeping() -> Iterator[None]:
    """Say that what is waited for in the block is to keep what was computed."""
    before = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(before)


def still_waiting() -> bool:
    """Call what `while_waiting` was given, and return what it says: for locks of other kinds, between two looks."""
    return _STEP.get()(_KEEPING.get())


def wait(seconds: float) -> None:
    """Wait so long; as while a lock is waited for, `while_waiting` may let others in, or end it."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if not still_waiting():
            time.sleep(min(_STEP_SECONDS, left))


@contextmanager
def holding(lock: FileLock, what: str) -> Iterator[None]:
    """Hold a lock; where another has it, wait, and after a second say who that is and what is waited for."""
    _acquire(lock, what)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, what: str) -> None:
    loud, busy = time.monotonic() + QUIET_SECONDS, False
    while True:
        try:
            lock.acquire(timeout=0.0 if busy else _STEP_SECONDS)
            return
        except Timeout:
            pass
        # Out here, where what goes wrong meanwhile does not look as if it came of the lock.
        if time.monotonic() >= loud:
            logger.warning("waiting for %s, which %s holds", what, holder_of(Path(lock.lock_file)))
            loud = math.inf
        busy = still_waiting()


class NamedLock:
    """A file lock that says what it keeps, for whoever waits; may be entered again inside."""

    def __init__(self, lock: FileLock, what: str) -> None:
        self._lock, self._what = lock, what

    def __enter__(self) -> "NamedLock":
        _acquire(self._lock, self._what)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def holder_of(path: Path) -> str:
    """Say who holds a lock: which process, what it runs and since when, as far as the system tells."""
    try:
        inode = path.stat().st_ino
        # Lines such as "1: FLOCK  ADVISORY  WRITE 7920 fe:00:2337378 0 EOF"; those that wait have "->" in them.
        entries = [line.split() for line in Path("/proc/locks").read_text("ascii").splitlines()]
        (pid, *_) = [int(entry[4]) for entry in entries if entry[1] == "FLOCK" and entry[5].endswith(f":{inode}")]
    except (OSError, ValueError, IndexError):
        return "another process"
    if pid == os.getpid():
        return "this process itself"
    try:
        # Its command and subcommand; not what follows, which may hold secrets.
        words = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").split("\0")
        began = time.time() - _age(pid)
    except (OSError, ValueError, IndexError):
        return f"process {pid}"
    since = datetime.fromtimestamp(began).astimezone().isoformat(" ", "seconds")
    return f"process {pid} ({_command(words)}, running since {since})"


def _age(pid: int) -> float:
    """Return for how many seconds a process has been running."""
    # The name, in parentheses, may hold anything; the start is the 20th number behind it, in ticks since the system's.
    behind = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    up = float(Path("/proc/uptime").read_text("ascii").split()[0])
    return up - int(behind[19]) / os.sysconf("SC_CLK_TCK")


def _command(words: list[str]) -> str:
    """Return the program that a command line runs, and which of our commands.

    >>> _command(["/usr/bin/python", "/usr/bin/rapidin-vdb", "ingest", "db"])
    'rapidin-vdb ingest'
    """
    for place, word in enumerate(words[:4]):
        if word.endswith(("rapidin-vdb", "rapidin_vdb", "rapidin_vdb/__main__.py")):
            return " ".join(["rapidin-vdb", *words[place + 1 : place + 2]])
    return Path(words[0]).name
