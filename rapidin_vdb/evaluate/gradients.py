"""Ways to score training samples by full gradients, beside which RapidGrads are judged.

Each is a few passes over the samples, whose gradients are taken in batches and never kept: they are multiplied with the
queries' directions as they come, tensor by tensor.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapidin_vdb.gradient import ExactInfluence, RapidGradMaker, norms_of
from rapidin_vdb.gradient.sample import token_losses
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded

Scores = Float64[np.ndarray, "queries samples"]
Directions = dict[int, Tensor]
"""A row for each query of each tensor of theta, float32 [queries, coordinates]."""


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
        self._samples = samples
        self._progress = progress
        self._batches = list(_cut(samples, batch_tokens))
        self._tensors = len(maker.loaded.theta)

    def directions(self, queries: Sequence[Encoded]) -> tuple[Directions, Float64[np.ndarray, "queries tensors"]]:
        """Return the gradients of queries as they are, and their norms."""
        rows: list[dict[int, Tensor]] = []
        norms = []
        influence = ExactInfluence(self._maker)
        for query in queries:
            found = influence.direction(query, norms=np.ones(self._tensors))
            rows.append({number: grad.reshape(-1) for number, grad in found.grads.items()})
            norms.append(found.norms)
        lengths = [shape.count for shape in self._maker.loaded.shapes]
        empty = [torch.zeros(length) for length in lengths]
        return (
            {n: torch.stack([row.get(n, empty[n]) for row in rows]) for n in range(self._tensors)},
            np.stack(norms),
        )

    def products(
        self, directions: Directions
    ) -> tuple[Float64[np.ndarray, "samples queries tensors"], Float64[np.ndarray, "samples tensors"]]:
        """Return inner products of every sample's tensors with the directions, and the samples' norms; one pass."""
        queries = len(directions[0])
        dots = np.zeros((len(self._samples), queries, self._tensors))
        norms = np.zeros((len(self._samples), self._tensors))

        def take(numbers: np.ndarray, tensor: int, grads: Tensor) -> None:
            dots[numbers, :, tensor] = (grads @ directions[tensor].T).double().numpy()
            norms[numbers, tensor] = norms_of(grads)

        self._pass(take, "products")
        return dots, norms

    def weighted_sums(self, weights: Float64[np.ndarray, "samples queries tensors"]) -> Directions:
        """Return for each query the sum over samples of weight times gradient, tensor by tensor; one pass."""
        lengths = [shape.count for shape in self._maker.loaded.shapes]
        sums = {number: torch.zeros(weights.shape[1], length) for number, length in enumerate(lengths)}

        def take(numbers: np.ndarray, tensor: int, grads: Tensor) -> None:
            sums[tensor] += torch.from_numpy(weights[numbers, :, tensor].T.copy()).float() @ grads

        self._pass(take, "weighted sums")
        return sums

    def _pass(self, take: Callable[[np.ndarray, int, Tensor], None], stage: str) -> None:
        done = 0
        for numbers, batch in self._batches:
            self._progress(stage, done, len(self._samples))
            self._maker.stream(batch, _Taker(numbers, take, self._maker))
            done += len(batch)
        self._progress(stage, done, len(self._samples))


class _Taker:
    """Hands gradients on as dense rows, with the numbers of their samples."""

    def __init__(
        self, numbers: np.ndarray, take: Callable[[np.ndarray, int, Tensor], None], maker: RapidGradMaker
    ) -> None:
        self._numbers = numbers
        self._take = take
        self._shapes = maker.loaded.shapes

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        self._take(self._numbers[first : first + len(grads)], number, grads.float())

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        whole = torch.zeros(self._shapes[number].shape)
        whole[ids] = grads
        self._take(self._numbers[sample : sample + 1], number, whole.reshape(1, -1))


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
    return dots.sum(2).T


def tracin_normalised(dots: np.ndarray, norms: np.ndarray, query_norms: np.ndarray) -> Scores:
    """Return TracIn's scores with layer-wise normalisation: what RapidGrads estimate (paper, section 3.1)."""
    scales = norms[:, None, :] * query_norms[None, :, :]
    return np.divide(dots, scales, out=np.zeros_like(dots), where=scales > 0).sum(2).T


def datainf(full: FullGradients, dots: np.ndarray, norms: np.ndarray, lengths: Sequence[int]) -> Scores:
    """Return DataInf's closed form of the influence function (Kwon et al., ICLR 2024), layer by layer; two passes.

    The inverse of a layer's (damped) second moment is taken as the mean of the inverses of its rank-one parts:
    1/lambda (v - 1/n sum_i <g_i, v> / (lambda + |g_i|^2) g_i), with lambda = 0.1 times the mean of |g_i|^2 / d.
    """
    squares = norms**2
    damping = np.maximum(0.1 * squares.mean(0) / np.asarray(lengths), 1e-30)
    weights = dots / (damping + squares)[:, None, :] / len(norms)
    again, _ = full.products(full.weighted_sums(weights))
    return ((dots - again) / damping).sum(2).T


def lissa(
    full: FullGradients, maker: RapidGradMaker, samples: Sequence[Encoded], directions: Directions, *, depth: int,
    batch: int, damping: float, seed: int, progress: Progress = silent,
) -> Scores:  # fmt: skip
    """Return the influence function's scores by LiSSA: the inverse Hessian times each query's gradient, by recursion.

    v <- g + (1 - damping) v - H v / scale, with the Hessian H of the loss on a few samples, drawn anew each step, and a
    scale above its largest eigenvalue. One pass over the samples follows.
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
    dots, _ = full.products(current)
    return dots.sum(2).T / scale


def sketched(
    maker: RapidGradMaker, samples: Sequence[Encoded], queries: Sequence[Encoded], widths: Sequence[int], *,
    batch_tokens: int = 4096, progress: Progress = silent,
) -> dict[int, Scores]:  # fmt: skip
    """Return scores by RapidGrads of several widths, folds of the maker's, in half precision as they are stored."""
    asked = torch.from_numpy(np.stack([maker.make(query)[0] for query in queries]))
    folds = {width: _folded(asked, width).double() for width in widths}
    scores = {width: np.zeros((len(queries), len(samples))) for width in widths}
    done = 0
    for numbers, batch in _cut(samples, batch_tokens):
        progress("RapidGrads", done, len(samples))
        made = torch.from_numpy(np.stack([result[0] for result in _good(maker.make_batch(batch))]))
        for width in widths:
            stored = _folded(made, width).half().double()
            scores[width][:, numbers] = (folds[width] @ stored.T).numpy()
        done += len(batch)
    progress("RapidGrads", done, len(samples))
    return scores


def _good(results: list) -> list:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _folded(vectors: Tensor, width: int) -> Tensor:
    return vectors.unflatten(1, (width, -1)).sum(2)
