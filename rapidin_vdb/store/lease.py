"""One writer at a time where there are no file locks: a lease, an object that only conditional puts may change.

Whoever holds it renews it. A holder that stands still (dead, or cut off) loses it: another has seen it unchanged for
`seconds` by its own clock, so that no two clocks are compared. What the former holder may still be about to commit is
then made to fail by a `fence`, before the new one begins.
"""

import json
import logging
import random
import time
from collections.abc import Callable
from threading import Event, RLock, Thread
from typing import Any
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError

from rapidin_vdb.errors import OvertakenError, TableError
from rapidin_vdb.locks import QUIET_SECONDS, still_waiting

logger = logging.getLogger(__name__)

LEASE_SECONDS = 20.0
RENEWAL_SECONDS = 5.0
_UNFINISHED = "nobody, unfinished"
"""Who holds it after an error or an interruption, behind which a commit may still be on its way."""
PROBE = ".probe-"
"""What the names of objects begin with that a store is tried with."""
Tag = dict[str, str]
"""What tells one state of an object from another; empty for one that is not there.

Amazon's and Azure's conditional puts go by entity tags, Google's by the number of the version: both are handed on.
"""
_LOST = (AlreadyExistsError, PreconditionError, NotFoundError)


class Lease:
    """A lock for all writers to a place in an object store; may be entered again by the thread that holds it."""

    def __init__(
        self, store: Any, name: str, *, place: str, fence: Callable[[Callable[[], bool], bool], bool],
        seconds: float = LEASE_SECONDS, hasty: Any = None,
    ) -> None:  # fmt: skip
        """`store` holds the object `name`; `place` is for messages; `fence` ends what a former holder has begun.

        `hasty` is the same store, for renewals: what hangs there must not keep a holder from saying that it lives.

        It is given what says whether the lease is still ours, and whether it was taken over, or let go of; it returns
        whether it came to its end before the lease was lost again.
        """
        self._store, self._name, self._place = store, name, place
        self._hasty = hasty or store
        self._fence, self._seconds = fence, seconds
        self._threads, self._depth = RLock(), 0
        self._token, self._failed = "", False
        self._tag: Tag = {}
        self._changing = RLock()
        self._stop: Event | None = None

    def __enter__(self) -> "Lease":
        self._threads.acquire()
        try:
            if not self._depth:
                self._take()
            self._depth += 1
        except BaseException:
            if not self._depth:
                self._stop_renewing()  # not let go of: whoever comes next has to fence
            self._threads.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """Let go; without an error, only what was committed while it was still ours counts as done.

        Raises:
            TableError: it was taken, maybe before the last commit, of which nothing need be left then.
        """
        try:
            self._failed |= kind is not None
            if self._depth == 1 and not self._failed:
                self.check()
        finally:
            try:
                self._depth -= 1
                if not self._depth:
                    self._let_go(_UNFINISHED if self._failed else "")
            finally:
                self._threads.release()

    def check(self) -> bool:
        """Refuse to go on where somebody else has taken the lease; return whether this thread holds it at all.

        Whatever is then committed on top of a version that was read before this check succeeds before the other's
        fence, or fails.

        Raises:
            TableError: it was taken.
        """
        # Held by another thread of this process, it is not ours.
        if not self._depth or not self._threads.acquire(blocking=False):
            return False
        try:
            if self._depth and self._read()[0] != self._token:
                raise OvertakenError(
                    f"another writer took over {self._place}: this one had not been heard of for "
                    f"{self._seconds:.0f} s. Nothing was lost; run the same command again to go on"
                )
            return self._depth > 0
        finally:
            self._threads.release()

    def _take(self) -> None:
        self._token, self._failed, begun = uuid4().hex, False, time.monotonic()
        seen, since, quiet = Tag(), begun, True
        while True:
            holder, tag = self._read()
            if tag != seen:
                seen, since = tag, time.monotonic()
            expired = holder == _UNFINISHED or (bool(holder) and time.monotonic() - since > self._seconds)
            if holder and not expired and holder != self._token:
                if quiet and time.monotonic() - begun > QUIET_SECONDS:
                    logger.warning(
                        "waiting for the database %s, to which another is writing; one that died is passed by after "
                        "%.0f s", self._place, self._seconds,
                    )  # fmt: skip
                    quiet = False
                if not still_waiting():
                    # Not all at the same moment.
                    time.sleep(random.uniform(0.2, 0.6) * min(1.0, self._seconds / 4))
                continue
            try:
                self._write(self._token, tag)
            except _LOST as error:
                if isinstance(error, NotFoundError) and not tag:
                    raise  # no such bucket
                # Or it was written, and the answer got lost on the way.
                if not self.is_ours():
                    continue
            self._renew()
            if self._fence(self.is_ours, bool(holder)):
                return
            self._stop_renewing()

    def _read(self, *, hasty: bool = False) -> tuple[str, Tag]:
        """Return who holds it, nobody being "", and the tag of what was read."""
        try:
            found = obstore.get(self._hasty if hasty else self._store, self._name)
        except (NotFoundError, FileNotFoundError):
            return "", {}
        tag = _tag_of(found.meta)
        try:
            return str(json.loads(bytes(found.bytes()))["holder"]), tag
        except (ValueError, KeyError, TypeError):
            return "nobody known", tag

    def is_ours(self) -> bool:
        """Say whether this lease holds it, as the store knows it now."""
        with self._changing:
            holder, tag = self._read(hasty=True)  # while no renewal can go out
            if holder == self._token:
                self._tag = tag
            return holder == self._token

    def _write(self, holder: str, tag: Tag, *, hasty: bool = False) -> None:
        # Never twice the same: an entity tag may be a hash of the content.
        content = json.dumps({"holder": holder, "written": uuid4().hex}).encode("ascii")
        with self._changing:
            mode: Any = tag or "create"
            self._tag = _tag_of(obstore.put(self._hasty if hasty else self._store, self._name, content, mode=mode))

    def _renew(self) -> None:
        stop, token = Event(), self._token
        self._stop = stop

        def renew() -> None:
            while not stop.wait(self._seconds / 4):
                try:
                    with self._changing:
                        if not stop.is_set():
                            self._write(token, self._tag, hasty=True)
                    lost = False
                except _LOST:
                    lost = True
                except (BaseError, OSError):
                    continue  # the network may come back in time
                try:
                    if lost and not self.is_ours():
                        return  # what is committed next finds out
                except (BaseError, OSError):
                    continue

        Thread(target=renew, name="lease", daemon=True).start()

    def _stop_renewing(self) -> None:
        if self._stop is not None:
            self._stop.set()  # first: an interruption while we wait must not leave a thread that renews for ever
            with self._changing:
                pass  # what is being written is there then

    def _let_go(self, holder: str) -> None:
        self._stop_renewing()
        try:
            self._write(holder, self._tag)
        except (BaseError, OSError):
            pass  # taken by somebody else, or out of reach: then it runs out by itself


def _tag_of(found: Any) -> Tag:
    """Return the tag in what the store says of an object; it leaves out what the store does not have."""
    return {name: str(found[name]) for name in ("e_tag", "version") if found[name]}


def check_conditional_puts(store: Any, *, place: str) -> None:
    """Refuse a store in which two writers could both win.

    Raises:
        TableError: it does not honour conditional puts.
    """
    name = f"{PROBE}{uuid4().hex}"
    stale: Any = _tag_of(obstore.put(store, name, b"1", mode="create"))
    try:
        won: list[str] = []
        tries: list[tuple[str, Any]] = [("If-None-Match", "create")]
        if stale:
            # One that was true once: a store may refuse for its form what it never gave out.
            obstore.put(store, name, b"2", mode=stale)
            tries.append(("If-Match", stale))
        for what, mode in tries:
            try:
                obstore.put(store, name, b"3", mode=mode)
                won.append(what)
            except _LOST:
                continue
        if won or not stale:
            raise TableError(
                f"the object store of {place} does not honour conditional puts ({' and '.join(won) or 'no tags'}): two "
                "writers could lose each other's work there. Use a store or a version of it that does"
            )
    finally:
        obstore.delete(store, name)
