"""Exact token scores against one backward pass a token, by plain autograd in float64."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from reference import token_gradients
from test_batch import _Unused, loaded_from, mixture_of_experts

from rapidin_vdb.gradient import ExactInfluence, RapidGradMaker, load_model, norms_of, tangent
from rapidin_vdb.gradient.tangent import NoTangentError, TangentPass, tangent_rule_for
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
    model, theta = loaded.model, loaded.theta
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        # A whole score is a sum that cancels: in single precision it is the reference that is wrong.
        model, theta = copy.deepcopy((model, theta))
        model.double()
        if "Experts" in str(model):
            model.set_experts_implementation("eager")  # the other knows no double precision
    theirs = token_gradients(model, theta, list(sample.input_ids), sample.response_tokens)
    ours = token_gradients(model, theta, list(query.input_ids), query.response_tokens)
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


def assert_all_forms(loaded, normalize: str, tolerance=2e-5):
    """Scores of samples and of tokens, and the matrix, are those of separate backward passes."""
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize=normalize))
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, SAMPLES)
    scores = influence.token_scores(direction, SAMPLES, exact)
    (matrices,) = influence.matrix(QUERY, direction, [SAMPLES], [exact])
    for place, sample in enumerate(SAMPLES):
        wanted = slow_matrix(loaded, sample, QUERY, normalize)
        close(matrices[place], wanted, tolerance)
        close(scores[place], wanted.sum(1), tolerance)
        # Tensors' parts may cancel: of Qwen2's there is a ninth left, not normalised.
        added = np.abs(exact.parts[place]).sum()
        assert exact.scores[place] == pytest.approx(wanted.sum(), rel=0, abs=tolerance * added)


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_four_forms_equal_separate_backward_passes(models, adapters, architecture, kind, normalize, caplog):
    loaded = load(models, adapters, architecture, kind)
    assert_all_forms(loaded, normalize)
    assert not caplog.records  # in forward mode, nothing given up


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize(("kind", "architecture"), [("nf4", "llama"), ("nf4", "gpt2"), ("int8", "llama")])
def test_quantised_models(models, adapters, kind, architecture, normalize, caplog):
    pytest.importorskip("bitsandbytes")
    loaded = load(models, adapters, architecture, kind)
    assert_all_forms(loaded, normalize, 1e-4)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("rapidin_vdb")]
    assert len(ours) == (kind == "int8") and all("double differentiation" in message for message in ours)


@pytest.mark.parametrize("kind", ["lora", "full", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_double_differentiation_gives_the_same(models, adapters, architecture, kind):
    loaded = load(models, adapters, architecture, kind)
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, SAMPLES)
    forward = influence.token_scores(direction, SAMPLES, exact)
    influence._give_up_tangents("for this test")
    for one, other in zip(forward, influence.token_scores(direction, SAMPLES, exact), strict=True):
        close(other, one)


def test_a_wrong_forward_rule_is_found_and_made_up_for(models, adapters, monkeypatch, caplog):
    def wrong(module, name):
        rule = tangent_rule_for(module, name)
        return None if rule is None else lambda *args: rule(*args) * (1.01 if module.weight.shape[0] == 2 else 1)

    monkeypatch.setattr("rapidin_vdb.gradient.tangent.tangent_rule_for", wrong)
    loaded = load(models, adapters, "llama", "lora")
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, SAMPLES)
    for sample, scores in zip(SAMPLES, influence.token_scores(direction, SAMPLES, exact), strict=True):
        close(scores, slow_matrix(loaded, sample, QUERY, "layer").sum(1))
    (record,) = caplog.records
    assert "in forward mode they did not sum to the samples' scores" in record.getMessage()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_is_never_called_is_found_in_forward_mode(dtype, caplog):
    """Its part would be missing, and in 16 bits the sums would not tell."""
    model = tiny_model("llama")
    layer = _Unused(16, 16, bias=False)
    layer.weight = model.model.layers[1].self_attn.o_proj.weight
    model.model.layers[1].self_attn.o_proj = layer
    loaded = dataclasses.replace(loaded_from(model.to(getattr(torch, dtype))), dtype=dtype)
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, SAMPLES)
    scores = influence.token_scores(direction, SAMPLES, exact)
    assert "(a _Unused is multiplied by elsewhere)" in caplog.text
    if dtype == "float32":
        for sample, found in zip(SAMPLES, scores, strict=True):
            close(found, slow_matrix(loaded, sample, QUERY, "layer").sum(1))


def test_a_layer_that_no_token_reaches_is_no_reason_to_leave_forward_mode():
    """As an expert: what has no gradient of a sample is scaled by zero, normalised or not."""
    model = tiny_model("llama")
    layer = _Unused(16, 16, bias=False)
    layer.weight = model.model.layers[1].self_attn.o_proj.weight
    model.model.layers[1].self_attn.o_proj = layer
    loaded = loaded_from(model)
    number = list(loaded.theta).index("model.layers.1.self_attn.o_proj.weight")
    norms = np.ones((len(SAMPLES), len(loaded.theta)))
    direction = {n: torch.ones(shape.shape) for n, shape in enumerate(loaded.shapes)}
    for normalize in ("none", "layer"):
        maker = RapidGradMaker(loaded, spec=SKETCH, normalize=normalize)
        norms[:, number] = 1
        with pytest.raises(NoTangentError, match="multiplied by elsewhere"):
            TangentPass(loaded).token_scores(SAMPLES, direction, torch.from_numpy(maker.scales(norms)).float())
        norms[:, number] = 0
        scores = TangentPass(loaded).token_scores(SAMPLES, direction, torch.from_numpy(maker.scales(norms)).float())
        assert [len(one) for one in scores] == [len(sample.loss_tokens) for sample in SAMPLES]


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts(kind, experts, caplog):
    model = mixture_of_experts(kind)
    model.set_experts_implementation(experts)
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            torch.nn.init.normal_(parameter)
    loaded = loaded_from(model)
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, SAMPLES)
    for sample, scores in zip(SAMPLES, influence.token_scores(direction, SAMPLES, exact), strict=True):
        close(scores, slow_matrix(loaded, sample, QUERY, "layer").sum(1))
    (record,) = caplog.records
    assert "by double differentiation" in record.getMessage()


def test_a_tensor_without_gradient_has_no_part(models, adapters):
    """A fresh LoRA A: its gradient is zero, and stays so."""
    loaded = load(models, adapters, "llama", "lora")
    with torch.no_grad():
        for name, tensor in loaded.theta.items():
            if "lora_B" in name:
                tensor.zero_()
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(QUERY)
    assert len(direction.grads) == len(loaded.theta) // 2
    exact = influence.exact(direction, SAMPLES)
    for sample, scores in zip(SAMPLES, influence.token_scores(direction, SAMPLES, exact), strict=True):
        close(scores, slow_matrix(loaded, sample, QUERY, "layer").sum(1))
    assert (exact.scores > -len(loaded.theta) // 2).all() and np.isfinite(exact.scores).all()


def test_a_focus_is_a_loss_of_its_own(models, adapters):
    loaded = load(models, adapters, "llama", "lora")
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(dataclasses.replace(QUERY, focus=(1, 3)))
    grads = token_gradients(loaded.model, loaded.theta, list(QUERY.input_ids), QUERY.response_tokens)
    for layer in range(len(loaded.theta)):
        wanted = (grads[1][layer] + grads[3][layer]) / 2
        close(direction.grads[layer].numpy(), wanted / np.linalg.norm(wanted))
        assert direction.norms[layer] == pytest.approx(np.linalg.norm(wanted), rel=1e-5)


def test_the_padding_token_has_no_part(models, adapters):
    """Its row of a (tied) embedding gets no gradient where it is read, and does where it is predicted."""
    loaded = load(models, adapters, "qwen2", "full")
    sample = Encoded(sample_id="p", input_ids=(1, 70, 0, 71, 0, 2), offsets=((0, 1),) * 4, truncated=False)
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(sample)
    exact = influence.exact(direction, [sample])
    (scores,) = influence.token_scores(direction, [sample], exact)
    close(scores, slow_matrix(loaded, sample, sample, "layer").sum(1))
    assert not influence._twice


def test_a_matrix_that_does_not_sum_is_made_anew(models, adapters, monkeypatch, caplog):
    loaded = load(models, adapters, "llama", "lora")
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, SAMPLES)
    original = type(influence._tangents).token_scores
    monkeypatch.setattr(type(influence._tangents), "token_scores", lambda *args: [1.01 * s for s in original(*args)])
    (matrices,) = influence.matrix(QUERY, direction, [SAMPLES], [exact])
    for sample, matrix in zip(SAMPLES, matrices, strict=True):
        close(matrix, slow_matrix(loaded, sample, QUERY, "layer"))
    assert "did not sum" in caplog.text


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25, 0.0])
@pytest.mark.parametrize("length", [3, 4096, 5000, 3_000_001])
def test_norms_of_any_length_and_size(length, scale):
    grads = torch.randn(2, length, generator=torch.Generator().manual_seed(1)) * scale
    wanted = np.linalg.norm(grads.double().numpy(), axis=1)
    np.testing.assert_allclose(norms_of(grads), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        norms_of(grads.bfloat16()), np.linalg.norm(grads.bfloat16().double().numpy(), axis=1), rtol=1e-6
    )


def _has_nothing_to_choose(loaded, norms):
    """Behind one token the gradients of queries and keys are zero, and not rounding, which would be made 1 long."""
    names = list(loaded.theta)
    chosen = [number for number, name in enumerate(names) if "q_proj" in name or "k_proj" in name]
    assert chosen and (norms[chosen] == 0).all() and (np.delete(norms, chosen) > 0).any()


def test_a_focus_on_the_first_token_leaves_no_rounding(models, adapters):
    """As RapidGrads: what stands behind the focus is cut off."""
    loaded = load(models, adapters, "llama", "full")
    long = encoded("query", [1, *np.random.default_rng(0).integers(5, 250, 90).tolist()], 90)
    focused = dataclasses.replace(long, focus=(0,))
    _has_nothing_to_choose(
        loaded, ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer")).direction(focused).norms
    )


def test_a_sample_of_two_tokens_has_no_rounding_beside_longer_ones(models, adapters):
    loaded = load(models, adapters, "llama", "full")
    influence = ExactInfluence(RapidGradMaker(loaded, spec=SKETCH, normalize="layer"))
    draw = np.random.default_rng(0)
    batch = [encoded(f"s{length}", draw.integers(5, 250, length).tolist(), 1) for length in (90, 2, 60)]
    direction = influence.direction(QUERY)
    exact = influence.exact(direction, batch)
    _has_nothing_to_choose(loaded, exact.norms[1])
    for place, sample in enumerate(batch):  # and all are in their places
        np.testing.assert_allclose(exact.parts[place], influence.exact(direction, [sample]).parts[0], atol=1e-4)
    assert [len(scores) for scores in influence.token_scores(direction, batch, exact)] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_a_large_bias_of_a_four_bit_layer_takes_no_digits_of_its_tangent():
    """The layer adds it within its product, in 16 bits: it must not be in what a tangent goes through."""
    import bitsandbytes

    torch.manual_seed(1)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.bias.data.fill_(100.0)
    layer = layer.to("cpu").requires_grad_(False)
    layer(torch.zeros(1, 64, dtype=torch.bfloat16))  # which quantises
    read, moved = torch.randn(4, 64).bfloat16(), (torch.randn(4, 64) / 64).bfloat16()
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    with tangent.forward_ad.dual_level(), tangent._linear_in_its_input(layer):
        wrote = layer(tangent.forward_ad.make_dual(read, moved))
        primal, found = tangent.forward_ad.unpack_dual(wrote)
    wanted = moved.double() @ weight.T
    assert (found.double() - wanted).norm() < 0.02 * wanted.norm()
    assert layer.bias is not None and (primal.float().mean() - 100).abs() < 2
