"""The inner loops of the sketch, on CPU and GPU, beside the obvious one."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rapidin_vdb.gradient.receivers import Sketcher
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch import Sketch, lanes, scatter_gpu
from rapidin_vdb.sketch.scatter import scatter_batch, scatter_rows
from rapidin_vdb.sketch.scatter_torch import scatter_batch_torch, scatter_rows_torch


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


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("length", [32_768, 40_000, 300_000])
def test_the_norm_of_one_large_and_many_small_coordinates_keeps_the_small_ones(length, batch):
    buckets = (torch.arange(length) % (1 << 16)).to(torch.uint16)
    grads = torch.full((batch, length), 2e-4)
    grads[:, 0] = 1.0
    rapidgrads = torch.zeros(batch, 1 << 16)
    signs = torch.zeros(length // 8, dtype=torch.uint8)
    scatter_batch(rapidgrads, grads, buckets=buckets, signs=signs, normalize=True)
    norm = np.sqrt(1 + (length - 1) * 2e-4**2)
    np.testing.assert_allclose(rapidgrads[:, 1:100].numpy(), (length + 65_535) // 65_536 * 2e-4 / norm, rtol=2e-6)


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


def test_the_norm_of_rows_keeps_what_is_small_beside_one_that_is_large():
    width, rows = 1 << 16, torch.arange(1 << 11)
    part = torch.full((len(rows), 16), 2e-4)
    part[0, 0] = 1
    _, buckets, signs, _, _ = drawn(part.numel(), width)
    rapidgrad = torch.zeros(width)
    scatter_rows(rapidgrad, part, rows=rows, buckets=buckets, signs=signs, normalize=True)
    sums = torch.zeros(width)
    scatter_rows(sums, part, rows=rows, buckets=buckets, signs=signs, normalize=False)
    found = float(torch.linalg.vector_norm(rapidgrad.double()) / torch.linalg.vector_norm(sums.double()))
    assert found == pytest.approx(1 / float(torch.linalg.vector_norm(part.double())), rel=1e-6)


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


def test_where_the_map_is_kept_follows_the_memory_and_is_said_once(monkeypatch, caplog):
    caplog.set_level("DEBUG", "rapidin_vdb")
    monkeypatch.setattr("rapidin_vdb.sketch.sketch.free_bytes", lambda device: 4000)
    assert Sketch(SketchSpec(width=256), [700, 3000]).keep == "nowhere"
    assert Sketch(SketchSpec(width=256), [700]).keep == "device"
    monkeypatch.setattr("rapidin_vdb.sketch.sketch.free_bytes", lambda device: 90_000)
    assert Sketch(SketchSpec(width=256), [700, 3000]).narrowed(64).keep == "device"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "the sketch's map of 1 MiB is computed again for every batch: no memory has room"),
        ("DEBUG", "the sketch's map of 1 MiB is kept in the memory of cpu"),
        ("DEBUG", "the sketch's map of 1 MiB is kept in the memory of cpu"),
    ]
    sketch = Sketch(SketchSpec(width=256), [700, 3000])
    sketch.device = "cuda:0"
    monkeypatch.setattr("rapidin_vdb.sketch.sketch.free_bytes", lambda device: 0 if device == "cuda:0" else 90_000)
    assert sketch._choose() == "host"
    assert caplog.messages[-1] == "the sketch's map of 1 MiB is kept in host memory: that of cuda:0 has no room"


# Batches beside the 4 and 8 samples that are taken at once, tensors beside multiples of the block, and every type.
_CASES = [
    (batch, length, width, kind, scale)
    for batch, length, width in ((1, 1, 64), (3, 1000, 64), (4, 1024, 64), (5, 5003, 1 << 16), (8, 128, 1), (19, 300, 1 << 17))
    for kind in ("float32", "bfloat16", "float16")
    for scale in ((1.0,) if kind == "float16" else (1.0, 1e-30, 1e-20, 1e20, 1e30))
]  # fmt: skip


def check_batch_loop(scatter, batch, length, width, kind, scale, normalize):
    """Hold a loop against the obvious one in float64: what is there already stays, exactly zero stays zero."""
    grads, buckets, signs, numbers, negative = drawn(length, width, batch=batch)
    grads[batch // 2 : batch // 2 + (batch > 1)] = 0
    grads = torch.from_numpy(grads * np.float32(scale)).to(getattr(torch, kind))
    out = torch.zeros(batch, width)
    out[:, 0] = 0.5
    scatter(out, grads, buckets=buckets, signs=signs, normalize=normalize)
    expected = obvious(grads.float().numpy(), numbers, negative, width, normalize=normalize)
    assert batch == 1 or np.abs(expected).max() > 0.01 * (1 if normalize else scale)
    expected[:, 0] += 0.5
    np.testing.assert_allclose(out.numpy(), expected, rtol=2e-6, atol=3e-6 * np.abs(expected).max())


_INTERPRETED = """
import sys
sys.path.insert(0, {tests!r})
import test_scatter
from rapidin_vdb.sketch import scatter_gpu
scatter_gpu._PROGRAMS = 3  # so that each takes several blocks
assert scatter_gpu.available("cpu")
for number, case in enumerate(test_scatter._CASES):
    for normalize in (False, True):
        test_scatter.check_batch_loop(scatter_gpu.scatter_batch_gpu, *case, normalize)
print("same")
"""


def test_without_a_compiler_triton_is_done_without(monkeypatch, caplog):
    """As in an image with torch and without gcc; said once a device."""

    def missing(*arguments, **options):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(scatter_gpu, "_kernel", lambda: {(1,): missing})
    scatter_gpu.available.cache_clear()
    assert [scatter_gpu.available("cpu") for _ in range(2)] == [False, False]
    (record,) = caplog.records
    assert "cannot compile for cpu (Failed to find C compiler." in record.message and "python3-dev" in record.message
    monkeypatch.setattr(scatter_gpu, "_kernel", lambda: None)
    scatter_gpu.available.cache_clear()
    assert not scatter_gpu.available("cpu") and len(caplog.records) == 1, "nothing to say where it is not installed"
    scatter_gpu.available.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_gpu_loop_in_tritons_interpreter():
    """Triton runs its kernels in Python where it is told to: right here is right there, if not fast."""
    from pathlib import Path

    code = _INTERPRETED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stderr


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_the_loop_in_plain_torch(case, normalize):
    check_batch_loop(scatter_batch_torch, *case, normalize)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("width", [3, 60, 64, 1 << 12])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9, 11, 16, 19])
def test_the_cpu_loop_for_many_samples_on_several_threads(batch, width, count, normalize, threads):
    """Lanes full and not, samples that are left over, tensors in parts, and ends of blocks, vectors and bytes."""
    threads(count)
    for length in (64, 255, 5003, 70_013)[: 3 if width == 3 else 4]:  # not more in a bucket than float32 can sum
        check_batch_loop(scatter_batch, batch, length, width, "float32", 1.0, normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", [case for case in _CASES if case[3] == "float32"], ids=str)
def test_the_cpu_loop_for_small_and_large_numbers(case, normalize):
    check_batch_loop(scatter_batch, *case, normalize)


def test_the_buckets_of_lanes_are_used_again_and_begin_as_zero():
    """Also where a batch before them did not come to its end."""
    lanes.Buckets._spare.clear()
    for _ in range(3):
        check_batch_loop(scatter_batch, 8, 5003, 64, "float32", 1.0, True)
    assert [len(spare) for spare in lanes.Buckets._spare.values()] == [1]
    grads, buckets, signs, _, _ = drawn(5003, 64, batch=8)
    lanes.Buckets(64).add(grads, buckets.numpy(), signs.numpy(), 0, 5003)
    check_batch_loop(scatter_batch, 8, 5003, 64, "float32", 1.0, True)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("most", [None, 1])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 10, 16, 19])
def test_small_tensors_wait_in_lanes_whatever_parts_of_a_batch_they_come_in(batch, most, normalize, monkeypatch):
    """Parts of a batch, small tensors among large ones, and sums that are looked at before the last of them."""
    width, lengths = 4096, [1000, 64, 70_001, 255, 2048]
    if most:
        monkeypatch.setattr(lanes, "_SPARE_BYTES", most * 4 * 8 * width)
    sketch, draw = Sketch(SketchSpec(width=width), lengths), torch.Generator().manual_seed(batch)
    sketcher, expected = Sketcher(sketch, torch.zeros(batch, width), normalize), torch.zeros(batch, width)
    for step in (3, batch, 8, 1, 5, 16):
        for number, length in enumerate(lengths):
            grads = torch.randn(batch, length, generator=draw)
            grads[batch // 2 : batch // 2 + (batch > 1)] = 0
            for first in range(0, batch, step):
                sketcher.dense(number, first, grads[first : first + step])
            for sample, grad in enumerate(grads):
                norm = float(grad.double().norm()) if normalize and grad.any() else 1.0
                sketch.add(expected[sample], number, grad / norm)
        np.testing.assert_allclose(
            sketcher.rapidgrads.numpy(), expected.numpy(), atol=3e-6 * float(expected.abs().max())
        )
    assert float(expected.abs().max()) > 0.1 or batch == 1


def test_lanes_are_taken_where_they_are_worth_it(monkeypatch):
    rapidgrads = torch.zeros(19, 64)
    of = lanes.BatchLanes(rapidgrads).of
    assert [len(of(*part)) for part in ((0, 19), (0, 16), (8, 11), (16, 3))] == [3, 2, 2, 1]
    assert [len(of(*part)) for part in ((0, 3), (0, 9), (1, 16), (4, 15), (0, 1))] == [0, 1, 0, 0, 0]
    assert [one is other for one, other in zip(of(8, 8), of(0, 19)[1:2], strict=True)] == [True]
    assert len(lanes.BatchLanes(rapidgrads[:18]).of(0, 18)) == 2  # two more are done one after the other
    monkeypatch.setattr(lanes, "_SPARE_BYTES", 2 * 4 * 8 * 64)
    most = lanes.BatchLanes(rapidgrads)
    assert [len(most.of(0, 19)), len(most.of(8, 11)), len(most.of(16, 3))] == [2, 1, 0]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("width", [64, 1 << 16, 1 << 17])
def test_plain_torch_and_the_cpu_loop_agree(width, normalize):
    grads, buckets, signs, _, _ = drawn(40 * 13, width)
    found = torch.zeros(2, 4, width)
    rows = torch.tensor([2, 0, 30])
    for out, batch_loop, rows_loop in zip(
        found, (scatter_batch, scatter_batch_torch), (scatter_rows, scatter_rows_torch), strict=True
    ):
        options = {"buckets": buckets, "signs": signs, "normalize": normalize}
        batch_loop(out[:3], torch.from_numpy(grads), **options)
        rows_loop(out[3], torch.from_numpy(grads[:, :13].copy()), rows=rows, **options)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert (found.abs().amax(2) > 0.1).all()


@pytest.mark.parametrize(("keep", "composed"), [("device", 0), ("host", 0), ("nowhere", 3)])
def test_the_map_of_a_tensor_is_fetched_once_a_batch(keep, composed, monkeypatch):
    """A batch may come in parts, and embedding rows come sample by sample."""
    sketch, rapidgrads = Sketch(SketchSpec(width=256), [700, 3000], keep=keep), torch.zeros(2, 256)
    asked, original = [], sketch._compose
    monkeypatch.setattr(sketch, "_compose", lambda number: asked.append(number) or original(number))
    for number, length in ((0, 700), (1, 3000), (0, 700)):
        maps = []
        for _ in range(2):
            sketch.add_batch(rapidgrads, number, torch.randn(2, length), normalize=True)
            sketch.add_rows(rapidgrads[0], number, torch.tensor([3]), torch.randn(1, 10), normalize=True)
            maps.append(sketch._tensor(number))
        assert maps[0][0] is maps[1][0]
        assert torch.equal(maps[0][0], original(number)[0])
    assert len(asked) == composed


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["device", "host", "nowhere"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [256, 1 << 17])
def test_the_gpu_gives_what_the_cpu_gives(width, kind, keep):
    lengths, grads = [700, 300_000, 41], torch.randn(11, 300_741).to(getattr(torch, kind))
    found = []
    for device in ("cpu", "cuda:0"):
        sketch = Sketch(SketchSpec(width=width), lengths, device=device, keep=keep)
        rapidgrads = torch.zeros(11, width, device=device)
        for number, part in enumerate(grads.to(device).split(lengths, dim=1)):
            sketch.add_batch(rapidgrads, number, part, normalize=True)
        rows = torch.tensor([0, 3], device=device)
        sketch.add_rows(rapidgrads[0], 0, rows, grads[:2, :7].float().to(device), normalize=True)
        found.append(rapidgrads.cpu())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
