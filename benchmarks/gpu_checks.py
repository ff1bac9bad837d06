"""What `gpu.py` makes sure of before it measures, and where a batch's time goes."""

import statistics
from typing import Any


class Compare:
    """A receiver that holds the gradients of some tensors of one sample against those that autograd gave."""

    def __init__(self, alone: dict[int, Any], place: int) -> None:
        self.alone, self.place = alone, place
        self.differences: dict[int, float] = {}

    def dense(self, number: int, first: int, grads: Any) -> None:
        """Compare one tensor."""
        if number in self.alone and first <= self.place < first + len(grads):
            expected = self.alone[number]
            found = grads[self.place - first]
            self.differences[number] = float((found - expected).norm() / expected.norm())

    def rows(self, number: int, sample: int, ids: Any, grads: Any) -> None:
        """Take no notice: an embedding has no matrix product that could go wrong."""


def check_gradients(maker: Any, batch: list[Any]) -> dict[str, Any]:
    """Hold one sample's RapidGrad, taken in a batch, against the same sample alone by autograd; and single tensors.

    In 16 bits any other order of additions changes all roundings behind it. `nothing_in_the_batch` is how far the same
    code is from autograd with the sample alone, `rounding` what the self-check takes rounding to do to it; and
    `batched_against_autograd_in_the_batch` compares the two ways in the same batch, where roundings are the same.
    """
    import torch

    from rapidin_vdb.gradient import stream_gradient
    from rapidin_vdb.gradient.self_check import _rounding

    place = min(range(len(batch)), key=lambda number: len(batch[number].input_ids))
    names = list(maker.loaded.theta)
    last = maker.loaded.model.config.num_hidden_layers - 1
    some = {n for n, name in enumerate(names) if any(f"layers.{layer}." in name for layer in (0, last // 2, last))}
    alone: dict[int, Any] = {}

    def receive(number: int, grad: Any) -> None:
        if number in some:
            alone[number] = grad.reshape(-1).float()

    expected = torch.zeros(maker.spec.width, device=maker.loaded.device)
    maker.add_alone(expected, batch[place])
    stream_gradient(maker.loaded, batch[place], receive)
    compare = Compare(alone, place)
    maker._gradients.stream(batch, compare)
    together, single = (
        torch.from_numpy(maker.make_batch(part)[n][0]) for part, n in ((batch, place), ([batch[place]], 0))
    )
    rounding, there = _rounding(maker, batch, place, expected), torch.zeros_like(expected)
    with maker._gradients.plainly():
        maker.add_alone(there, batch[place], among=batch)
        here = torch.from_numpy(maker.make_batch(batch)[place][0])
    expected, there = expected.cpu(), there.cpu()
    worst = sorted(compare.differences.items(), key=lambda item: -item[1])
    return {
        "batched_against_autograd": float((together - expected).norm() / expected.norm()),
        "nothing_in_the_batch": float((single - expected).norm() / expected.norm()),
        "rounding": rounding,
        "batched_against_autograd_in_the_batch": float((here - there).norm() / there.norm()),
        "batch_samples": len(batch),
        "tensors_median": statistics.median(compare.differences.values()),
        "tensors_worst": {names[number]: value for number, value in worst[:3]},
    }


def check_scatter(maker: Any) -> float:
    """Return how far the sketch's loop is from `index_add` in float64 on the same device, relative to the largest."""
    import torch

    from rapidin_vdb.gradient.rapidgrad import normalized
    from rapidin_vdb.sketch.scatter_torch import numbers, unpacked

    sketch, device = maker.sketch, maker.loaded.device
    counts = [shape.count for shape in maker.loaded.shapes]
    number = max(range(len(counts)), key=lambda n: counts[n] if counts[n] <= 1 << 26 else 0)
    grads = torch.randn(5, counts[number], device=device)
    found = torch.zeros(5, maker.spec.width, device=device)
    sketch.add_batch(found, number, grads, normalize=True)
    buckets, signs = sketch._tensor(number)
    worst = 0.0
    for row in range(5):
        signed = normalized(grads[row]).double() * unpacked(signs, grads.shape[1]).double()
        expected = torch.zeros(maker.spec.width, dtype=torch.float64, device=device)
        expected.index_add_(0, numbers(buckets), signed)
        worst = max(worst, float((found[row].double() - expected).abs().max() / expected.abs().max()))
    return worst


def check_map(maker: Any) -> bool:
    """Say whether the device composes the map that the CPU composes, at its beginning, middle and end."""
    import torch

    composed, length = maker.sketch._map, sum(shape.count for shape in maker.loaded.shapes)
    same = True
    for start in (0, length // 2, max(length - (1 << 20), 0)):
        stop = min(start + (1 << 20), length)
        there = composed.buckets(start, stop, device=maker.loaded.device).to("cpu")
        same = same and torch.equal(there, composed.buckets(start, stop))
    return same


def profiled(maker: Any, batch: list[Any]) -> list[dict[str, Any]]:
    """Return what takes a batch's time, by kernel (by operation on a CPU), the longest first."""
    from torch.profiler import ProfilerActivity, profile

    cpu = maker.loaded.device == "cpu"
    with profile(activities=[ProfilerActivity.CPU if cpu else ProfilerActivity.CUDA]) as record:
        maker.make_batch(batch)
    key = "self_cpu_time_total" if cpu else "self_device_time_total"
    events = sorted(record.key_averages(), key=lambda event: -getattr(event, key))
    return [
        {"name": event.key[:90], "calls": event.count, "milliseconds": round(getattr(event, key) / 1000, 3)}
        for event in events[:15]
    ]
