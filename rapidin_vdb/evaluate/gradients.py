"""Ways to score training samples by full gradients, beside which RapidGrads are judged.

Each is a few passes over the samples, whose gradients are taken in batches and never kept: they are multiplied with the
queries' directions as they come, tensor by tensor.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from rapidin_vdb.batches import cut
from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient import ExactInfluence, RapidGradMaker, norms_of
from rapidin_vdb.gradient.receivers import Receiver
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded, ParameterShape
from rapidin_vdb.sketch import fold

Scores = Float64[np.ndarray, "queries samples"]
Numbers = Int64[np.ndarray, " batch"]
Directions = dict[int, Tensor]
"""A row for each query of each tensor of theta, float32 [queries, coordinates], on the model's device."""


@runtime_checkable
class Taker(Protocol):
    """Takes the gradients of all samples, batch by batch."""

    def begin(self, numbers: Numbers) -> Receiver:
        """Return what receives the next batch, of the samples of these numbers."""
        ...

    def end(self) -> None:
        """Keep what came of the batch."""
        ...


class Products:
    """Inner products of every sample's tensors with some directions, and the samples' norms."""

    def __init__(self, directions: Directions, shapes: Sequence[ParameterShape], samples: int) -> None:
        self._directions, self._shapes = directions, shapes
        self.dots = np.zeros((samples, len(directions[0]), len(shapes)), np.float32)
        """[samples, queries, tensors]."""
        self.norms = np.zeros((samples, len(shapes)))
        """[samples, tensors]."""

    def begin(self, numbers: Numbers) -> Receiver:
        """Return what receives the next batch."""
        self._numbers = numbers
        return _Dense(self._take, self._shapes)

    def _take(self, first: int, tensor: int, grads: Tensor) -> None:
        mine = self._numbers[first : first + len(grads)]
        self.dots[mine, :, tensor] = (grads @ self._directions[tensor].T).cpu().numpy()
        self.norms[mine, tensor] = norms_of(grads)

    def end(self) -> None:
        """Nothing is left to keep."""


class WeightedSums:
    """For each query v the sum over samples of <g_i, v> / (damping + |g_i|^2) g_i, tensor by tensor."""

    def __init__(
        self, directions: Directions, damping: Float64[np.ndarray, " tensors"], shapes: Sequence[ParameterShape]
    ) -> None:
        self._directions, self._shapes = directions, shapes
        self._damping = damping
        self.sums: Directions = {number: torch.zeros_like(rows) for number, rows in directions.items()}
        """[queries, coordinates] for each tensor, on the model's device."""

    def begin(self, numbers: Numbers) -> Receiver:
        """Return what receives the next batch."""
        return _Dense(self._take, self._shapes)

    def _take(self, first: int, tensor: int, grads: Tensor) -> None:
        # Divided in double precision: squares of single precision may vanish.
        scale = 1 / (self._damping[tensor] + norms_of(grads) ** 2)
        dots = (self._directions[tensor] @ grads.T).double() * torch.from_numpy(scale).to(grads.device)
        self.sums[tensor] += dots.float() @ grads

    def end(self) -> None:
        """Nothing is left to keep."""


class Sketches:
    """Scores of queries by RapidGrads of several widths, folds of the maker's, in half precision as they are stored."""

    def __init__(self, maker: RapidGradMaker, queries: Sequence[Encoded], widths: Sequence[int], samples: int) -> None:
        self._maker, self._samples = maker, samples
        self._queries: dict[tuple[str, int], Tensor] = {}
        self.scores: dict[tuple[str, int], Scores] = {}
        """[queries, samples] for each kind of queries, "" for those that it was made with, and width."""
        self.ask("", queries, widths)

    def ask(self, kind: str, queries: Sequence[Encoded], widths: Sequence[int]) -> None:
        """Score other queries by the same RapidGrads too; before the first batch."""
        made = _made(self._maker, queries).to(self._maker.loaded.device)
        for width in widths:
            self._queries[kind, width] = fold(made, width)
            self.scores[kind, width] = np.zeros((len(queries), self._samples))

    def begin(self, numbers: Numbers) -> Receiver:
        """Return what receives the next batch."""
        self._numbers = numbers
        self._sketcher = self._maker.sketcher(len(numbers))
        return self._sketcher

    def end(self) -> None:
        """Keep the batch's scores."""
        stored: dict[int, Tensor] = {}
        for (kind, width), queries in self._queries.items():
            if width not in stored:
                stored[width] = fold(self._sketcher.rapidgrads, width).half().float()
            self.scores[kind, width][:, self._numbers] = _inner(queries, stored[width])


class FullGradients:
    """The full gradients of some samples, and of some queries' generations."""

    def __init__(
        self,
        maker: RapidGradMaker,
        samples: Sequence[Encoded],
        *,
        batch_tokens: int = 4096,
        progress: Progress = silent,
    ) -> None:
        self._maker = maker
        self.device = maker.loaded.device
        """Where gradients are taken."""
        self.shapes = maker.loaded.shapes
        """Theta's."""
        self.samples = len(samples)
        """How many."""
        self._progress = progress
        parts = cut(range(len(samples)), lambda number: len(samples[number].input_ids), tokens=batch_tokens)
        self._batches = [(np.array(numbers), [samples[number] for number in numbers]) for numbers in parts]

    def directions(self, queries: Sequence[Encoded]) -> tuple[Directions, Float64[np.ndarray, "queries tensors"]]:
        """Return the gradients of queries as they are, and their norms."""
        # Row by row into its place: rows that are stacked at the end would be kept twice.
        rows = {n: torch.zeros(len(queries), shape.count, device=self.device) for n, shape in enumerate(self.shapes)}
        norms = []
        influence = ExactInfluence(self._maker)
        for row, query in enumerate(queries):
            found = influence.direction(query, norms=np.ones(len(self.shapes)))
            for number, grad in found.grads.items():
                rows[number][row] = grad.reshape(-1)
            norms.append(found.norms)
        return rows, np.stack(norms)

    def run(self, stage: str, takers: dict[str, Taker]) -> dict[str, float]:
        """Give the gradients of all samples to some takers, in one pass.

        Return the seconds of each: those of the gradients, which all share, and its own.
        """
        own = dict.fromkeys(takers, 0.0)
        started, done = time.monotonic(), 0
        for numbers, batch in self._batches:
            self._progress(stage, done, self.samples)
            split = _Split(own, self.device)
            for name, taker in takers.items():
                with split.timed(name):
                    split.receivers[name] = taker.begin(numbers)
            self._maker.stream(batch, split)
            for name, taker in takers.items():
                with split.timed(name):
                    taker.end()
            done += len(batch)
        self._progress(stage, done, self.samples)
        shared = time.monotonic() - started - sum(own.values())
        return {name: shared + seconds for name, seconds in own.items()}

    def products(self, directions: Directions) -> Products:
        """Return the products with some directions; one pass."""
        products = Products(directions, self.shapes, self.samples)
        self.run("products", {"products": products})
        return products


class _Split:
    """Hands gradients to several receivers, and keeps the time of each."""

    def __init__(self, seconds: dict[str, float], device: str) -> None:
        self.receivers: dict[str, Receiver] = {}
        """By name, filled before the first gradient."""
        self._seconds, self._device = seconds, device

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = self._settled()
        yield
        self._seconds[name] += self._settled() - started

    def _settled(self) -> float:
        """Return the time at which a GPU has done what it was told: the gradients' work is not the next taker's."""
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
        return time.monotonic()

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        for name, receiver in self.receivers.items():
            with self.timed(name):
                receiver.dense(number, first, grads)

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        for name, receiver in self.receivers.items():
            with self.timed(name):
                receiver.rows(number, sample, ids, grads)


class _Dense:
    """Hands gradients on as dense rows, with the place in the batch of the first."""

    def __init__(self, take: Callable[[int, int, Tensor], None], shapes: Sequence[ParameterShape]) -> None:
        self._take, self._shapes = take, shapes

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        self._take(first, number, grads.float())

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        whole = torch.zeros(self._shapes[number].shape, device=grads.device)
        whole[ids] = grads.float()
        self._take(sample, number, whole.reshape(1, -1))


def tracin(dots: np.ndarray) -> Scores:
    """Return TracIn's scores at the last checkpoint: inner products of full gradients."""
    return dots.sum(2, dtype=np.float64).T


def tracin_normalised(dots: np.ndarray, norms: np.ndarray, query_norms: np.ndarray) -> Scores:
    """Return TracIn's scores with layer-wise normalisation: what RapidGrads estimate (paper, section 3.1)."""
    ours, theirs = (np.divide(1.0, side, out=np.zeros(side.shape), where=side > 0) for side in (query_norms, norms))
    # Query by query: all at once takes three times the memory of the products.
    return np.stack([(dots[:, number] * theirs * row).sum(1) for number, row in enumerate(ours)])


def ranked_again(
    scores: Float64[np.ndarray, " samples"], exact: Float64[np.ndarray, " samples"], count: int
) -> Float64[np.ndarray, " samples"]:
    """Return scores that rank the `count` highest among themselves, and the lowest too, by exact ones.

    So does `query --both --refine COUNT`. They are places from the end, for scores and exact ones are not compared. Of
    fewer than 2 `count` samples, each half is ranked again. Ties go by place.

    >>> ranked_again(np.array([9.0, 8.0, 5.0, 1.0, 0.0]), np.array([1.0, 2.0, 9.0, 3.0, 4.0]), 2)
    array([4., 5., 3., 1., 2.])
    """
    count = min(count, len(scores) // 2)
    order = np.argsort(-scores, kind="stable")
    for part in (slice(0, count), slice(len(scores) - count, None)):
        order[part] = order[part][np.argsort(-exact[order[part]], kind="stable")]
    found = np.empty(len(scores))
    found[order] = np.arange(len(scores), 0, -1)
    return found


def _made(maker: RapidGradMaker, queries: Sequence[Encoded], *, batch: int = 16) -> Tensor:
    rows = torch.empty(len(queries), maker.spec.width)
    for first in range(0, len(queries), batch):
        for number, result in enumerate(maker.make_batch(queries[first : first + batch]), start=first):
            if isinstance(result, GradientError):
                raise result
            rows[number] = torch.from_numpy(result[0])
    return rows


def _inner(queries: Tensor, samples: Tensor, *, block: int = 1 << 12) -> np.ndarray:
    """Return inner products, in single precision within blocks of coordinates and in double precision across them."""
    found = torch.zeros(len(queries), len(samples), dtype=torch.float64, device=queries.device)
    for first in range(0, queries.shape[1], block):
        found += queries[:, first : first + block] @ samples[:, first : first + block].T
    return found.cpu().numpy()
