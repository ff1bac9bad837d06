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
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapidin_vdb.gradient import ExactInfluence, RapidGradMaker, norms_of
from rapidin_vdb.gradient.batch import Receiver
from rapidin_vdb.gradient.sample import token_losses
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded, ParameterShape

Scores = Float64[np.ndarray, "queries samples"]
Numbers = Int64[np.ndarray, " batch"]
Directions = dict[int, Tensor]
"""A row for each query of each tensor of theta, float32 [queries, coordinates]."""


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
        self.dots[mine, :, tensor] = (grads @ self._directions[tensor].T).numpy()
        self.norms[mine, tensor] = norms_of(grads)

    def end(self) -> None:
        """Nothing is left to keep."""


class WeightedSums:
    """For each query the sum over samples of weight times gradient, tensor by tensor."""

    def __init__(
        self, weights: Float64[np.ndarray, "samples queries tensors"], shapes: Sequence[ParameterShape]
    ) -> None:
        self._weights, self._shapes = weights, shapes
        self.sums: Directions = {n: torch.zeros(weights.shape[1], shape.count) for n, shape in enumerate(shapes)}
        """[queries, coordinates] for each tensor."""

    def begin(self, numbers: Numbers) -> Receiver:
        """Return what receives the next batch."""
        self._numbers = numbers
        return _Dense(self._take, self._shapes)

    def _take(self, first: int, tensor: int, grads: Tensor) -> None:
        mine = self._weights[self._numbers[first : first + len(grads)], :, tensor]
        self.sums[tensor] += torch.from_numpy(np.ascontiguousarray(mine.T)).float() @ grads

    def end(self) -> None:
        """Nothing is left to keep."""


class Sketches:
    """Scores of queries by RapidGrads of several widths, folds of the maker's, in half precision as they are stored."""

    def __init__(self, maker: RapidGradMaker, queries: Sequence[Encoded], widths: Sequence[int], samples: int) -> None:
        self._maker = maker
        self._queries = {width: _folded(_made(maker, queries), width).double() for width in widths}
        self.scores = {width: np.zeros((len(queries), samples)) for width in widths}
        """[queries, samples] for each width."""

    def begin(self, numbers: Numbers) -> Receiver:
        """Return what receives the next batch."""
        self._numbers = numbers
        self._sketcher = self._maker.sketcher(len(numbers))
        return self._sketcher

    def end(self) -> None:
        """Keep the batch's scores."""
        for width, queries in self._queries.items():
            stored = _folded(self._sketcher.rapidgrads, width).half().double()
            self.scores[width][:, self._numbers] = (queries @ stored.T).numpy()


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
        self.shapes = maker.loaded.shapes
        """Theta's."""
        self.samples = len(samples)
        """How many."""
        self._progress = progress
        self._batches = list(_cut(samples, batch_tokens))

    def directions(self, queries: Sequence[Encoded]) -> tuple[Directions, Float64[np.ndarray, "queries tensors"]]:
        """Return the gradients of queries as they are, and their norms."""
        rows: list[dict[int, Tensor]] = []
        norms = []
        influence = ExactInfluence(self._maker)
        for query in queries:
            found = influence.direction(query, norms=np.ones(len(self.shapes)))
            rows.append({number: grad.reshape(-1) for number, grad in found.grads.items()})
            norms.append(found.norms)
        empty = [torch.zeros(shape.count) for shape in self.shapes]
        return (
            {n: torch.stack([row.get(n, empty[n]) for row in rows]) for n in range(len(self.shapes))},
            np.stack(norms),
        )

    def run(self, stage: str, takers: dict[str, Taker]) -> dict[str, float]:
        """Give the gradients of all samples to some takers, in one pass.

        Return the seconds of each: those of the gradients, which all share, and its own.
        """
        own = dict.fromkeys(takers, 0.0)
        started, done = time.monotonic(), 0
        for numbers, batch in self._batches:
            self._progress(stage, done, self.samples)
            split = _Split({name: taker.begin(numbers) for name, taker in takers.items()}, own)
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

    def __init__(self, receivers: dict[str, Receiver], seconds: dict[str, float]) -> None:
        self._receivers, self._seconds = receivers, seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - started

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        for name, receiver in self._receivers.items():
            with self.timed(name):
                receiver.dense(number, first, grads)

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        for name, receiver in self._receivers.items():
            with self.timed(name):
                receiver.rows(number, sample, ids, grads)


class _Dense:
    """Hands gradients on as dense rows, with the place in the batch of the first."""

    def __init__(self, take: Callable[[int, int, Tensor], None], shapes: Sequence[ParameterShape]) -> None:
        self._take, self._shapes = take, shapes

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        self._take(first, number, grads.float())

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        whole = torch.zeros(self._shapes[number].shape)
        whole[ids] = grads
        self._take(sample, number, whole.reshape(1, -1))


def _cut(samples: Sequence[Encoded], batch_tokens: int) -> Iterator[tuple[np.ndarray, list[Encoded]]]:
    order = sorted(range(len(samples)), key=lambda number: len(samples[number].input_ids))
    part: list[int] = []
    for number in order:
        if part and (len(part) + 1) * len(samples[number].input_ids) > batch_tokens:
            yield np.array(part), [samples[place] for place in part]
            part = []
        part.append(number)
    if part:
        yield np.array(part), [samples[place] for place in part]


def tracin(dots: np.ndarray) -> Scores:
    """Return TracIn's scores at the last checkpoint: inner products of full gradients."""
    return dots.sum(2, dtype=np.float64).T


def tracin_normalised(dots: np.ndarray, norms: np.ndarray, query_norms: np.ndarray) -> Scores:
    """Return TracIn's scores with layer-wise normalisation: what RapidGrads estimate (paper, section 3.1)."""
    scales = norms[:, None, :] * query_norms[None, :, :]
    return np.divide(dots, scales, out=np.zeros(dots.shape), where=scales > 0).sum(2).T


def datainf_weights(
    dots: np.ndarray, norms: np.ndarray, lengths: Sequence[int]
) -> tuple[Float64[np.ndarray, "samples queries tensors"], Float64[np.ndarray, " tensors"]]:
    """Return the weights of the samples' gradients in DataInf's correction, and its damping.

    DataInf (Kwon et al., ICLR 2024) takes the inverse of a layer's damped second moment as the mean of the inverses of
    its rank-one parts: 1/lambda (v - 1/n sum_i <g_i, v> / (lambda + |g_i|^2) g_i), with lambda = 0.1 times the mean of
    |g_i|^2 / d.
    """
    squares = norms**2
    damping = np.maximum(0.1 * squares.mean(0) / np.asarray(lengths), 1e-30)
    return dots / (damping + squares)[:, None, :] / len(norms), damping


def datainf(dots: np.ndarray, again: np.ndarray, damping: np.ndarray) -> Scores:
    """Return DataInf's closed form of the influence function; `again` are the products with the weighted sums."""
    return ((dots - again) / damping).sum(2).T


def lissa(
    maker: RapidGradMaker, samples: Sequence[Encoded], directions: Directions, *, depth: int, batch: int,
    damping: float, seed: int, progress: Progress = silent,
) -> Directions:  # fmt: skip
    """Return the inverse Hessian times each query's gradient, by LiSSA's recursion; times the samples', the scores.

    v <- g + (1 - damping) v - H v / scale, with the Hessian H of the loss on a few samples, drawn anew each step, and a
    scale above its largest eigenvalue.
    """
    draw = np.random.default_rng(seed)
    theta = list(maker.loaded.theta.values())
    current = {number: rows.clone() for number, rows in directions.items()}
    queries = len(directions[0])

    def products(vectors: Directions, count: int) -> Directions:
        """Multiply the Hessian of the mean loss of some samples with each query's vector."""
        chosen = [samples[number] for number in draw.choice(len(samples), batch, replace=False)]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = torch.stack([token_losses(maker.loaded, sample).mean() for sample in chosen]).mean()
            grads = torch.autograd.grad(loss, theta, create_graph=True)
            found: list[tuple[Tensor, ...]] = []
            for query in range(count):
                inner = torch.stack([(g.reshape(-1) * vectors[n][query]).sum() for n, g in enumerate(grads)]).sum()
                found.append(torch.autograd.grad(inner, theta, retain_graph=True))
        return {n: torch.stack([one[n].reshape(-1) for one in found]) for n in range(len(theta))}

    probe = {number: torch.randn(1, rows.shape[1]) for number, rows in directions.items()}
    largest = 0.0
    for _ in range(8):
        length = float(torch.sqrt(torch.stack([(rows**2).sum() for rows in probe.values()]).sum()))
        probe = products({number: rows / length for number, rows in probe.items()}, 1)
        largest = max(largest, float(torch.sqrt(torch.stack([(rows**2).sum() for rows in probe.values()]).sum())))
    scale = 2 * largest
    for step in range(depth):
        progress("LiSSA", step, depth)
        moved = products(current, queries)
        current = {n: directions[n] + (1 - damping) * rows - moved[n] / scale for n, rows in current.items()}
    progress("LiSSA", depth, depth)
    return {number: rows / scale for number, rows in current.items()}


def _made(maker: RapidGradMaker, queries: Sequence[Encoded]) -> Tensor:
    return torch.from_numpy(np.stack([maker.make(query)[0] for query in queries]))


def _folded(vectors: Tensor, width: int) -> Tensor:
    return vectors.unflatten(1, (width, -1)).sum(2)
