"""Ways to score training samples that look at texts or hidden states, not at gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float64

from rapidin_vdb.errors import SpecError
from rapidin_vdb.gradient import LoadedModel
from rapidin_vdb.records import Encoded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Scores = Float64[np.ndarray, "queries samples"]


def random_scores(queries: int, samples: int, *, seed: int) -> Scores:
    """Return scores that mean nothing."""
    return np.random.default_rng(seed).random((queries, samples))


def bm25_scores(documents: Sequence[str], queries: Sequence[str], *, seed: int) -> tuple[Scores, int]:
    """Return BM25 scores of the samples' texts for the queries' texts (bm25s, its defaults), and the index's bytes.

    Texts that share no word with a query have a score of 0 each; here it is a number in (-1, 0], drawn anew for each
    query and text: without it, most of a query of few words would go by place. The bytes are those of the index's
    arrays.
    """
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(documents), show_progress=False), show_progress=False)
    words = bm25s.tokenize(list(queries), show_progress=False, return_ids=False)
    rows = [index.get_scores(query) if query else np.zeros(len(documents)) for query in words]
    size = sum(array.nbytes for array in index.scores.values() if isinstance(array, np.ndarray))
    scores = np.stack(rows).astype(np.float64)
    return np.where(scores == 0, -np.random.default_rng(seed).random(scores.shape), scores), size


def containing_scores(responses: Sequence[str], told: Sequence[Sequence[str]], *, seed: int) -> Scores:
    """Return for each query 1 where a response has any of its told words, as whole words, plus a number below 1.

    That number is drawn anew for each query and sample: without it, ties would go by place.
    """
    scores = np.random.default_rng(seed).random((len(told), len(responses)))
    for row, words in zip(scores, told, strict=True):
        if words:
            wanted = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")
            row += [wanted.search(response) is not None for response in responses]
    return scores


def embedder(model: str, *, device: str = "cpu") -> SentenceTransformer:
    """Return a sentence-embedding model, by its folder or name, on a device.

    Raises:
        SpecError: there is none.
    """
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(model, device=device, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise SpecError(
            f"--embedding-model {model}: no model that sentence-transformers can load ({reason})"
        ) from error


def embedding_scores(encoder: SentenceTransformer, documents: Sequence[str], queries: Sequence[str]) -> Scores:
    """Return cosines of the texts' embeddings."""
    ours, theirs = (
        encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False).astype(np.float64)
        for texts in (queries, documents)
    )
    return ours @ theirs.T


@torch.no_grad()
def hidden_scores(loaded: LoadedModel, samples: Sequence[Encoded], queries: Sequence[Encoded]) -> Scores:
    """Return cosines of the mean last hidden states over the response tokens."""
    ours, theirs = (_hidden(loaded, side) for side in (queries, samples))
    return ours @ theirs.T


def _hidden(loaded: LoadedModel, encoded: Sequence[Encoded], *, batch: int = 32) -> np.ndarray:
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number].input_ids))
    rows = np.empty((len(encoded), loaded.model.config.hidden_size))
    for first in range(0, len(order), batch):
        part = [encoded[number] for number in order[first : first + batch]]
        longest = max(len(sample.input_ids) for sample in part)
        ids = torch.tensor(
            [list(s.input_ids) + [s.input_ids[-1]] * (longest - len(s.input_ids)) for s in part], device=loaded.device
        )
        states = loaded.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        for number, sample, state in zip(order[first : first + batch], part, states, strict=True):
            end = len(sample.input_ids)
            mean = state[end - sample.response_tokens : end].double().mean(0)
            rows[number] = (mean / torch.linalg.vector_norm(mean)).cpu().numpy()
    return rows
