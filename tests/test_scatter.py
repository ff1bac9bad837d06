"""The inner loops of the sketch, on CPU and GPU, beside the obvious one."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch import Sketch
from rapidin_vdb.sketch.scatter import scatter_batch, scatter_rows


def drawn(length: int, width: int, *, batch: int = 3):
    draw = np.random.default_rng(length)
    buckets = draw.integers(0, width, length)
    negative = draw.integers(0, 2, length)
    grads = draw.standard_normal((batch, length)).astype(np.float32)
    kind = torch.uint16 if width <= 1 << 16 else torch.int32
    return (
        grads,
        torch.from_numpy(buckets).to(kind),
        torch.from_numpy(np.packbits(negative.astype(np.uint8), bitorder="little")),
        buckets,
        negative,
    )


def obvious(grads, buckets, negative, width, *, normalize):
    result = np.zeros((len(grads), width))
    for sample, grad in enumerate(grads.astype(np.float64)):
        scale = 1 / np.sqrt((grad**2).sum()) if normalize and grad.any() else 1.0
        np.add.at(result[sample], buckets, scale * np.where(negative, -grad, grad))
    return result


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 1000, 5003, 300_001])
@pytest.mark.parametrize("width", [64, 1 << 16, 1 << 17])
def test_the_cpu_loop(length, width, normalize):
    grads, buckets, signs, numbers, negative = drawn(length, width)
    grads[1] = 0  # exactly zero stays zero
    rapidgrads = torch.zeros(3, width)
    scatter_batch(rapidgrads, torch.from_numpy(grads), buckets=buckets, signs=signs, normalize=normalize)
    expected = obvious(grads, numbers, negative, width, normalize=normalize)
    np.testing.assert_allclose(rapidgrads.numpy(), expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20])
def test_norms_of_very_small_and_very_large_gradients(scale):
    grads, buckets, signs, numbers, negative = drawn(5000, 64)
    grads = (grads.astype(np.float64) * scale).astype(np.float32)
    rapidgrads = torch.zeros(3, 64)
    scatter_batch(rapidgrads, torch.from_numpy(grads), buckets=buckets, signs=signs, normalize=True)
    np.testing.assert_allclose(rapidgrads.numpy(), obvious(grads, numbers, negative, 64, normalize=True), atol=1e-5)


def test_the_norm_of_millions_of_coordinates_keeps_the_small_ones():
    length, width = 1 << 22, 1 << 16
    buckets = (torch.arange(length) % width).to(torch.uint16)
    rapidgrads = torch.zeros(1, width)
    signs = torch.zeros(length // 8, dtype=torch.uint8)
    scatter_batch(rapidgrads, torch.full((1, length), 1e-3), buckets=buckets, signs=signs, normalize=True)
    np.testing.assert_allclose(rapidgrads.numpy(), length / width / np.sqrt(length), rtol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_are_a_gradient_whose_other_rows_are_zero(normalize):
    columns, rows = 13, torch.tensor([2, 0, 30])
    _, buckets, signs, numbers, negative = drawn(40 * columns, 64)
    part = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(40, columns)
    whole[rows] = part
    rapidgrad = torch.zeros(64)
    scatter_rows(rapidgrad, part, rows=rows, buckets=buckets, signs=signs, normalize=normalize)
    expected = obvious(whole.reshape(1, -1).numpy(), numbers, negative, 64, normalize=normalize)[0]
    np.testing.assert_allclose(rapidgrad.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("keep", ["device", "host", "nowhere"])
def test_where_the_map_is_kept_changes_nothing(keep):
    lengths, grads = [700, 3000, 41], torch.randn(2, 3741, generator=torch.Generator().manual_seed(1))
    found = []
    for where in ("device", keep):
        sketch, rapidgrads = Sketch(SketchSpec(width=256), lengths, keep=where), torch.zeros(2, 256)
        for number, part in enumerate(grads.split(lengths, dim=1)):
            sketch.add_batch(rapidgrads, number, part, normalize=True)
        found.append(rapidgrads)
    assert torch.equal(*found)
    assert float(found[0].abs().max()) > 0


def test_too_large_a_map_is_computed_again_and_said_so(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("rapidin_vdb.sketch.sketch.free_bytes", lambda device: 4000)
    assert Sketch(SketchSpec(width=256), [700, 3000]).keep == "nowhere"
    assert "computed again for every batch" in caplog.text
    assert Sketch(SketchSpec(width=256), [700]).keep == "device"


_INTERPRETED = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, torch
from test_scatter import drawn, obvious
from rapidin_vdb.sketch import scatter_gpu
for length, width in ((1, 64), (1000, 64), (5003, 1 << 16), (3000, 1 << 17)):
    grads, buckets, signs, numbers, negative = drawn(length, width)
    scales = 1 / np.linalg.norm(grads, axis=1)
    out = torch.zeros(3, width)
    scatter_gpu.scatter_batch_gpu(out, torch.from_numpy(grads), torch.from_numpy(scales), buckets=buckets, signs=signs)
    np.testing.assert_allclose(out.numpy(), obvious(grads, numbers, negative, width, normalize=True), atol=1e-5)
print("same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_gpu_loop_in_tritons_interpreter():
    """Triton runs its kernels in Python where it is told to: right here is right there, if not fast."""
    from pathlib import Path

    code = _INTERPRETED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stderr


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives():
    lengths, grads = [700, 3000, 41], torch.randn(2, 3741)
    found = []
    for device in ("cpu", "cuda:0"):
        sketch, rapidgrads = Sketch(SketchSpec(width=256), lengths, device=device), torch.zeros(2, 256, device=device)
        for number, part in enumerate(grads.to(device).split(lengths, dim=1)):
            sketch.add_batch(rapidgrads, number, part, normalize=True)
        rows = torch.tensor([0, 3], device=device)
        sketch.add_rows(rapidgrads[0], 0, rows, grads[:, :7].to(device).contiguous(), normalize=True)
        found.append(rapidgrads.cpu())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
