"""Loops compiled by numba on first use, and the threads that share them."""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Any:
    """Return a function compiled, and free of Python's lock while it runs; it takes arrays and numbers only."""
    import numba

    # Where types are checked, as in the tests, what is compiled is what stands inside the check.
    return numba.njit(nogil=True)(inspect.unwrap(function))


def side_by_side(task: Callable[[int], None], count: int) -> None:
    """Run tasks 0 to `count` - 1, at once on as many threads as torch uses, and return when all are done."""
    threads = min(torch.get_num_threads(), count)

    def share(first: int) -> None:
        for number in range(first, count, threads):
            task(number)

    others = [_pool(threads - 1).submit(share, first) for first in range(1, threads)] if threads > 1 else []
    share(0)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="sketch")
