"""Models in float16: what they have learned well has gradients that half precision cannot tell from nothing."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rapidin_vdb.gradient import ExactInfluence, RapidGradMaker, load_model
from rapidin_vdb.gradient.loss_scale import loss_scales
from rapidin_vdb.records import Encoded, ModelSpec, SketchSpec

LENGTHS = (40, 25, 12)


def sample(name, length, seed):
    ids = torch.randint(5, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    answer = length - 4
    return Encoded(sample_id=name, input_ids=tuple(ids), offsets=((0, 1),) * answer, truncated=False)


LEARNED = [sample(f"learned {length}", length, length) for length in LENGTHS]
SURPRISE = sample("surprise", 18, 5)


@pytest.fixture(scope="module")
def sure(models, tmp_path_factory):
    """The tiny Llama, having learned three samples by heart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(400):
        for one in LEARNED:
            ids = torch.tensor([one.input_ids])
            (model(input_ids=ids, labels=ids).loss / len(LEARNED)).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("sure") / "llama"
    model.save_pretrained(folder)
    for file in models["llama"].glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def maker_of(folder, parameters, dtype, normalize="layer"):
    loaded = load_model(ModelSpec(model=folder, parameters=parameters, dtype=dtype), device="cpu")
    return RapidGradMaker(loaded, spec=SketchSpec(width=256), normalize=normalize)


@pytest.mark.parametrize("parameters", ["all", "layers"])  # logits of the model, and those of its output layer alone
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_what_was_learned_has_its_gradient_in_float16_too(parameters, together, normalize, sure):
    """Without loss scaling the cosines with float32 are 0.3 to 0.6, for most entries vanish."""
    samples = [*LEARNED, SURPRISE]
    made = {}
    for dtype in ("float32", "float16"):
        maker = maker_of(sure, parameters, dtype, normalize)
        made[dtype] = maker.make_batch(samples) if together else [maker.make(one) for one in samples]
        assert (maker._gradients.output is None) == (parameters == "all")
    for one, (wanted, loss), (found, _) in zip(samples, made["float32"], made["float16"], strict=True):
        assert loss > 5 if one is SURPRISE else 1e-5 < loss < 2e-3
        cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
        # What remains is that half precision computes other logits, not only other gradients of them.
        assert cosine > (0.9999 if one is SURPRISE else 0.97), (one.sample_id, cosine)
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(wanted), rel=0.3 if normalize == "none" else 0.05)


@pytest.mark.parametrize("twice", [False, True])
def test_token_scores_of_what_was_learned_are_right_in_float16_too(twice, sure):
    """In forward mode, whose scales are one over norms, and by double differentiation."""
    found = {}
    for dtype in ("float32", "float16"):
        influence = ExactInfluence(maker_of(sure, "all", dtype))
        influence._twice = twice
        direction = influence.direction(SURPRISE)
        exact = influence.exact(direction, LEARNED)
        found[dtype] = exact, influence.token_scores(direction, LEARNED, exact)
        assert influence._twice == twice  # its sums needed no other way
    (exact, tokens), (half, half_tokens) = found["float32"], found["float16"]
    np.testing.assert_allclose(half.norms, exact.norms, rtol=0.3)
    size = np.abs(exact.parts).sum(1)
    # Rounding of sixteen numbers a token: of thousands, as models have, it averages out.
    assert (np.abs(half.scores - exact.scores) < 0.12 * size).all()
    for place, (ours, theirs) in enumerate(zip(half_tokens, tokens, strict=True)):
        assert ours @ theirs > 0.95 * np.linalg.norm(ours) * np.linalg.norm(theirs), place


def test_the_scale_brings_the_largest_derivative_near_a_sixteenth():
    losses = torch.tensor([np.log(2.0), 0.0, 1e-6, 5.0, 20.0, float("nan")])
    rows = torch.tensor([0, 0, 1, 2, 3, 4])
    counts = torch.tensor([64, 1, 8, 1, 1])
    # Derivatives of 1/128, 1e-6, 1/8 and 1; where a loss is not finite there is nothing to scale.
    assert loss_scales(losses, rows, counts).tolist() == [8, 2**15, 1, 1, 1]
    assert loss_scales(torch.zeros(2), torch.tensor([0, 0]), torch.tensor([2])).tolist() == [2**30]
