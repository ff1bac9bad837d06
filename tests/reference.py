"""The obvious slow version of each fast path: numpy and plain autograd, functions only."""

import numpy as np
import torch

from rapidin_vdb.sketch import ShuffleStep, padded_length


def shuffled(vector: np.ndarray, steps: list[ShuffleStep]) -> np.ndarray:
    """Algorithm 1, permutation by permutation."""
    for step in steps:
        rows, columns = step.row_permutation, step.column_permutation
        vector = vector.reshape(len(rows), -1)[rows].reshape(-1)
        vector = vector.reshape(-1, len(columns))[:, columns].reshape(-1)
    return vector


def sketched(
    grad: np.ndarray, *, length: int, steps: list[ShuffleStep], negative: np.ndarray, width: int
) -> np.ndarray:
    """Pad, flip, shuffle, fold, each as a step of its own, in float64."""
    padded = np.zeros(length)
    padded[: len(grad)] = grad
    padded = np.where(negative, -padded, padded)
    return shuffled(padded, steps).reshape(width, -1).sum(1)


def sample_gradient(model, theta: dict, ids: list[int], response_tokens: int) -> list[np.ndarray]:
    """Plain autograd on one sample alone: one loss a token, averaged by hand."""
    tokens = torch.tensor([ids])
    log_probabilities = torch.log_softmax(model(input_ids=tokens).logits[0].double(), -1)
    first = len(ids) - response_tokens
    losses = [-log_probabilities[place - 1, ids[place]] for place in range(first, len(ids))]
    loss = torch.stack(losses).sum() / response_tokens
    grads = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    return [
        np.zeros(tuple(tensor.shape)) if grad is None else grad.detach().double().numpy()
        for grad, tensor in zip(grads, theta.values(), strict=True)
    ]


def normalized(grads: list[np.ndarray]) -> list[np.ndarray]:
    """Layer-wise normalisation; zero stays zero."""
    return [grad / (np.sqrt((grad**2).sum()) or 1.0) for grad in grads]


def top_k(vectors: dict[str, np.ndarray], query: np.ndarray, k: int) -> list[tuple[str, float]]:
    """Brute force in float64, ties by id."""
    scores = {
        name: float((vector.astype(np.float64) * query.astype(np.float64)).sum()) for name, vector in vectors.items()
    }
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k]


def token_gradients(model, theta: dict, ids: list[int], response_tokens: int) -> list[list[np.ndarray]]:
    """One backward pass a token, each through a forward pass of its own."""
    grads = []
    for place in range(len(ids) - response_tokens, len(ids)):
        log_probabilities = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        found = torch.autograd.grad(-log_probabilities[place - 1, ids[place]], list(theta.values()), allow_unused=True)
        grads.append(
            [
                np.zeros(tuple(tensor.shape)) if grad is None else grad.detach().double().numpy()
                for grad, tensor in zip(found, theta.values(), strict=True)
            ]
        )
    return grads


def ids_in(snapshot, where: str | None = None) -> list[str]:
    """The ids of all samples of a version, or of those a filter lets through, row by row."""
    return [stored.sample_id for stored, _, _ in snapshot.each(where)]


def errors_of_sums(queries: np.ndarray, rows: np.ndarray, members: np.ndarray, probes: np.ndarray, fingerprint):
    """Sums of scores over groups, and the standard deviation of the error of each, from rows added up, in float64."""
    added = np.stack([rows[members == group].astype(np.float64).sum(0) for group in range(members.max() + 1)])
    sums = queries.astype(np.float64) @ added.T
    squared_length = ((probes.astype(np.float64) @ added.T) ** 2).mean(0)
    width = fingerprint.sketch.width
    padded = padded_length(fingerprint.gradient_length, width=width)
    shared = (padded // width - 1) / (padded - 1)
    variance = shared * ((queries.astype(np.float64) ** 2).sum(1)[:, None] * squared_length + sums**2)
    return sums, fingerprint.epochs * fingerprint.learning_rate * np.sqrt(variance)
