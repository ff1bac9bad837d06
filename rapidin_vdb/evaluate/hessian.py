"""Influence functions by full gradients: DataInf's closed form and LiSSA's recursion."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapidin_vdb.evaluate.gradients import Directions, Scores
from rapidin_vdb.gradient import RapidGradMaker
from rapidin_vdb.gradient.sample import token_losses
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded


def datainf_damping(norms: np.ndarray, lengths: Sequence[int]) -> Float64[np.ndarray, " tensors"]:
    """Return DataInf's damping of each tensor: 0.1 times the mean of |g_i|^2 / d.

    `norms` are |g_i|, [samples, tensors], and `lengths` the tensors' d.
    """
    return np.maximum(0.1 * (norms**2).mean(0) / np.asarray(lengths), 1e-30)


def datainf(dots: np.ndarray, again: np.ndarray, damping: np.ndarray) -> Scores:
    """Return DataInf's closed form of the influence function.

    DataInf (Kwon et al., ICLR 2024) takes the inverse of a layer's damped second moment as the mean of the inverses of
    its rank-one parts: 1/lambda (v - 1/n sum_i <g_i, v> / (lambda + |g_i|^2) g_i), of which the sums are
    `gradients.WeightedSums`. `dots` are the samples' products with v, and `again` with these sums, [samples, queries,
    tensors].
    """
    return ((dots - again / len(dots)) / damping).sum(2).T


def lissa(
    maker: RapidGradMaker, samples: Sequence[Encoded], directions: Directions, *, depth: int, batch: int,
    damping: float, seed: int, progress: Progress = silent,
) -> Directions:  # fmt: skip
    """Return the inverse Hessian times each query's gradient, by LiSSA's recursion; times the samples', the scores.

    v <- g + (1 - damping) v - H v / scale, with the Hessian H of the loss on a few samples, drawn anew each step, and a
    scale above its largest eigenvalue, which is sought from a vector drawn from the seed.
    """
    draw = np.random.default_rng(seed)
    # On the CPU: the same numbers wherever the model is.
    normal = torch.Generator().manual_seed(seed)
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

    probe = {
        number: torch.randn(1, rows.shape[1], generator=normal).to(rows.device) for number, rows in directions.items()
    }
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
