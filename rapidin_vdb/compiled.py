"""Loops compiled by numba on first use, and the threads that share them."""

import inspect
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
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


def half_widener() -> Any:
    """Return a compiled function from the bits of a finite float16 number to float32, for use in other loops.

    Processors have an instruction for it, which numba has no word for; elsewhere it is done on the bits.
    """
    from llvmlite import binding, ir
    from numba import types
    from numba.extending import intrinsic

    def by_instruction(context, bits):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            return builder.fpext(builder.bitcast(values[0], ir.HalfType()), ir.FloatType())

        return types.float32(types.uint16), generate

    def on_bits(half):  # type: ignore[no-untyped-def]
        # Exponent and fraction moved to where float32 has them, then the difference of the two exponents' biases.
        bits = np.uint32(half)
        moved = ((bits & np.uint32(0x7FFF)) << np.uint32(13)) | ((bits & np.uint32(0x8000)) << np.uint32(16))
        return np.uint32(moved).view(np.float32) * np.float32(2.0**112)

    # Without the instruction, LLVM would call a library function that need not be there.
    if binding.get_host_cpu_features().get("f16c") or platform.machine() in ("aarch64", "arm64"):
        return intrinsic(inspect.unwrap(by_instruction))
    return compiled(on_bits)


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
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="loops")
