"""Exact token scores against one backward pass a token, by plain autograd in float64."""

import numpy as np
import pytest
from conftest import ARCHITECTURES
from reference import token_gradients

from rapidin_vdb.gradient import ExactInfluence, RapidGradMaker, load_model
from rapidin_vdb.records import Encoded, ModelSpec, SketchSpec

SKETCH = SketchSpec(width=64, shuffles=3, seed=7)


def encoded(name: str, ids: list[int], response_tokens: int) -> Encoded:
    return Encoded(
        sample_id=name,
        input_ids=tuple(ids),
        offsets=tuple((place, place + 1) for place in range(response_tokens)),
        truncated=False,
    )


SAMPLES = [
    encoded("a", [1, 70, 71, 72, 73, 74, 75, 2], 4),
    encoded("b", [1, 90, 91, 90, 92], 2),
    encoded("c", [1, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 2], 11),
]
QUERY = encoded("query", [1, 80, 81, 71, 72, 60, 61, 2], 5)


def load(models, adapters, architecture: str, kind: str):
    spec = ModelSpec(
        model=str(models[architecture]),
        adapter=None if kind == "full" else str(adapters[architecture]),
        quantization={"nf4": "nf4", "int8": "int8"}.get(kind, "none"),
        parameters="all" if kind == "full" else "trainable",
    )
    return load_model(spec, device="cpu")


def slow_matrix(loaded, sample: Encoded, query: Encoded, normalize: str) -> np.ndarray:
    """Eq. 8 from G and T separate backward passes, both sides with the norms of the whole."""
    theirs = token_gradients(loaded.model, loaded.theta, list(sample.input_ids), sample.response_tokens)
    ours = token_gradients(loaded.model, loaded.theta, list(query.input_ids), query.response_tokens)
    matrix = np.zeros((len(theirs), len(ours)))
    for layer in range(len(loaded.theta)):
        rows, columns = ([grads[layer].ravel() for grads in side] for side in (theirs, ours))
        product = np.stack(rows) @ np.stack(columns).T / (len(rows) * len(columns))
        norms = [np.linalg.norm(np.mean(side, 0)) for side in (rows, columns)] if normalize == "layer" else [1.0, 1.0]
        if all(norms):
            matrix += product / (norms[0] * norms[1])
    return matrix


def close(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_four_forms_equal_separate_backward_passes(models, adapters, architecture, kind, normalize, caplog):
    loaded = load(models, adapters, architecture, kind)
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize=normalize))
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, SAMPLES)
    scores = influence.token_scores(direction, SAMPLES, exact)
    (matrices,) = influence.matrix(QUERY, direction.norms, [SAMPLES], [exact])
    for place, sample in enumerate(SAMPLES):
        wanted = slow_matrix(loaded, sample, QUERY, normalize)
        close(matrices[place], wanted)
        close(scores[place], wanted.sum(1))
        close(exact.scores[place], wanted.sum())
    assert not caplog.records  # in forward mode, nothing given up


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_models(models, adapters, kind, caplog):
    pytest.importorskip("bitsandbytes")
    loaded = load(models, adapters, "llama", kind)
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, SAMPLES)
    scores = influence.token_scores(direction, SAMPLES, exact)
    for place, sample in enumerate(SAMPLES):
        wanted = slow_matrix(loaded, sample, QUERY, "layer")
        close(scores[place], wanted.sum(1), 1e-4)
        close(exact.scores[place], wanted.sum(), 1e-4)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("rapidin_vdb")]
    assert len(ours) == (kind == "int8") and all("double differentiation" in message for message in ours)
