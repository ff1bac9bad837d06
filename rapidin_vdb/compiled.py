"""Loops compiled by numba on first use, and the threads that share them."""

import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


def compiled(function: Callable[..., Any], *, fastmath: set[str] | None = None) -> Any:
    """Return a function compiled, and free of Python's lock while it runs; it takes arrays and numbers only.

    `fastmath` names LLVM's licences, such as `reassoc` for sums in any order.
    """
    import numba

    # Where types are checked, as in the tests, what is compiled is what stands inside the check.
    loop = numba.njit(nogil=True, fastmath=fastmath or False)(inspect.unwrap(function))
    compile_loop = loop.compile

    def compile_whole(signature):  # type: ignore[no-untyped-def]
        with _uninterrupted():
            return compile_loop(signature)

    loop.compile = compile_whole
    return loop


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait for the end: inside of LLVM's callbacks Python would say it, and forget it."""
    before, waiting = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *event: waiting.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        before(*waiting[-1])


def side_by_side(task: Callable[[int], None], count: int) -> None:
    """Run tasks 0 to `count` - 1, at once on as many threads as torch uses, and return when all are done."""
    threads = max(1, min(torch.get_num_threads(), count))

    def share(first: int) -> None:
        for number in range(first, count, threads):
            task(number)

    others = [_pool(threads - 1).submit(share, first) for first in range(1, threads)] if threads > 1 else []
    share(0)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="loops")
