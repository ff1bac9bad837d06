"""Reads of the table, which need no model: threads of their own, of which no address has more than its share."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from fastapi import Request

from rapidin_vdb.web.answers import client_of, gone_away
from rapidin_vdb.web.lines import BusyError, CancelledError, LateError

_Found = TypeVar("_Found")
Check = Callable[[], None]
"""Raises where nobody waits any more: long reads call it now and then."""


class Reads:
    """Threads that read.

    A read that has begun keeps its thread until it ends, also when its time is over or whoever asked has gone. So an
    address waits while it has half of the threads: others always find one.
    """

    def __init__(self, *, seconds: float, threads: int = 8) -> None:
        self._seconds = seconds
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._most_of_one = max(1, threads // 2)
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self.open = 0
        """How many are under way or wait."""

    def stop(self) -> None:
        """End long reads at their next look."""
        self._stopped.set()

    def close(self) -> None:
        """Begin no other read."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def read(self, request: Request, work: Callable[[Check], _Found]) -> _Found:
        """Return what a read gives.

        Raises:
            LateError: it took longer than is allowed, waiting included.
            CancelledError: whoever asked has gone.
            BusyError: the server is stopping.
        """
        end, given_up = time.monotonic() + self._seconds, threading.Event()

        def check() -> None:
            if self._stopped.is_set():
                raise BusyError("the server is stopping")
            if given_up.is_set():
                raise CancelledError
            if time.monotonic() > end:
                raise LateError

        address = client_of(request).address
        places = self._places.setdefault(address, asyncio.Semaphore(self._most_of_one))
        reading = asyncio.create_task(self._in_turn(places, lambda: work(check)))
        gone = asyncio.create_task(gone_away(request))
        self.open += 1
        try:
            await asyncio.wait({reading, gone}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise CancelledError if gone.done() else LateError
            return await reading
        finally:
            self.open -= 1
            given_up.set()
            gone.cancel()
            reading.cancel()  # of no effect where it is done

    async def _in_turn(self, places: asyncio.Semaphore, work: Callable[[], _Found]) -> _Found:
        await places.acquire()
        loop = asyncio.get_running_loop()

        def leave(_: object) -> None:
            try:
                loop.call_soon_threadsafe(places.release)
            except RuntimeError:
                pass  # the server has stopped

        try:
            future = self._pool.submit(work)
        except RuntimeError:
            raise BusyError("the server is stopping") from None
        future.add_done_callback(leave)
        return await asyncio.wrap_future(future)
