"""Loops are compiled, and give what plain numpy gives, with and without the processor's own instructions."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from llvmlite import binding

from rapidin_vdb.compiled import compiled, side_by_side
from rapidin_vdb.intrinsics import half_widener


@pytest.mark.parametrize("instruction", [True, False])
def test_every_finite_half_precision_number_is_widened(instruction, monkeypatch):
    if not instruction:
        monkeypatch.setattr(binding, "get_host_cpu_features", dict)
        monkeypatch.setattr("platform.machine", lambda: "something else")
    wide = half_widener()
    assert hasattr(wide, "py_func") != instruction or not binding.get_host_cpu_features().get("f16c")

    def loop(halves, out):
        for number in range(len(halves)):
            out[number] = wide(halves[number])

    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    out = np.empty(len(halves), np.float32)
    compiled(loop)(halves, out)
    assert out.tobytes() == halves.view(np.float16).astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("before", "given", "found"),
    [
        ("", {}, "PASSIVE 10000"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ("", {"GOMP_SPINCOUNT": "7"}, "PASSIVE 7"),
        ("torch, ", {}, "None None"),
    ],
)
def test_idle_threads_of_torch_leave_the_processor_to_ours(before, given, found):
    """Unless somebody says otherwise, or it is too late for that."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = f"import os, {before}rapidin_vdb; print(*(os.environ.get(name) for name in {names}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == found, done.stderr


def test_tasks_run_once_each_and_errors_come_out(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    done = []
    side_by_side(done.append, 10)
    assert sorted(done) == list(range(10))

    def fail(number):
        if number == 7:
            raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        side_by_side(fail, 10)


def test_an_interrupt_waits_until_a_loop_is_compiled(monkeypatch):
    """In LLVM's callbacks it would be printed and forgotten, and the command go on."""
    from numba.core.dispatcher import Dispatcher

    compile_loop, done = Dispatcher.compile, []

    def interrupted(self, signature):
        signal.raise_signal(signal.SIGINT)
        done.append(compile_loop(self, signature))
        return done[-1]

    monkeypatch.setattr(Dispatcher, "compile", interrupted)

    def double(values):
        for number in range(len(values)):
            values[number] *= 2

    loop, values = compiled(double), np.ones(3)
    # Not so where the tests run in the background of a shell.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop(values)
        assert len(done) == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        loop(values)
    finally:
        signal.signal(signal.SIGINT, found)
    assert values.tolist() == [2, 2, 2], "compiled, and called once"
