"""The self-check of batches computed in 16 bits, where rounding alone may be larger than what is looked for."""

import dataclasses

import pytest
import torch
from conftest import tiny_model
from test_batch import SKETCH, _Doubled, assert_close, loaded_from, samples, slow, small_opt

from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient import RapidGradMaker
from rapidin_vdb.gradient import head as head_module
from rapidin_vdb.gradient.probe import Prober, near, to_compare
from rapidin_vdb.gradient.training import with_lora
from rapidin_vdb.sketch import Sketch

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def maker_in(dtype: torch.dtype, *, wrong: int | None = None, lora: bool = False) -> RapidGradMaker:
    """A model in 16 bits; one layer of it computes something else than its rule believes."""
    model = tiny_model("llama")
    if wrong is not None:
        layer = _Doubled(16, 16, bias=False)
        layer.weight = model.model.layers[wrong].self_attn.q_proj.weight
        model.model.layers[wrong].self_attn.q_proj = layer
    model = model.to(dtype)
    if lora:
        model = with_lora(model, rank=2, modules=MODULES, seed=0)
    loaded = dataclasses.replace(loaded_from(model), dtype=str(dtype).removeprefix("torch."))
    if lora:
        loaded = dataclasses.replace(loaded, theta={n: t for n, t in loaded.theta.items() if t.requires_grad})
    return RapidGradMaker(loaded, spec=SKETCH, normalize="layer")


@pytest.fixture
def rounding(monkeypatch):
    """As in a deep model on a GPU: whatever is not computed by the very same products differs by an eighth."""
    original, draw = RapidGradMaker.add_alone, torch.Generator().manual_seed(0)

    def coarse(maker, rapidgrad, sample, **options):
        loss = original(maker, rapidgrad, sample, **options)
        noise = torch.randn(rapidgrad.shape, generator=draw)
        rapidgrad += 0.12 * rapidgrad.norm() * noise / noise.norm()
        return loss

    monkeypatch.setattr(RapidGradMaker, "add_alone", coarse)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_gives_nothing_up(dtype, lora, rounding, caplog):
    caplog.set_level("INFO")
    maker = maker_in(dtype, lora=lora)
    maker.make_batch(samples())
    assert not maker._gradients.unruled and "by rounding alone" in caplog.text
    assert (maker._gradients.output is not None) == lora  # in theta it is computed by the model itself


@pytest.mark.parametrize("coarse", [False, True])
def test_a_wrong_rule_is_found_under_rounding_as_without(coarse, request):
    if coarse:
        request.getfixturevalue("rounding")
    maker = maker_in(torch.bfloat16, wrong=1)
    maker.make_batch(samples())
    (number,) = maker._gradients.unruled
    assert list(maker.loaded.theta)[number] == "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("coarse", [False, True])
def test_samples_that_disturb_one_another_are_found_under_rounding_as_without(coarse, request, caplog):
    if coarse:
        request.getfixturevalue("rounding")
    maker = maker_in(torch.bfloat16)

    def mix(module, read, wrote):
        return wrote + 0.7 * wrote.flip(0)

    maker.loaded.model.model.norm.register_forward_hook(mix)
    maker.make_batch(samples())
    assert len(maker._gradients.unruled) == len(maker.loaded.theta)
    assert "not independent of one another" in caplog.text


def test_what_padding_rounds_otherwise_gives_nothing_up(caplog):
    """In float16 a padded batch of this model is 0.06 away from the sample alone, by other orders of additions."""
    caplog.set_level("INFO")
    maker = RapidGradMaker(loaded_from(small_opt().half(), "float16"), spec=SKETCH, normalize="layer")
    maker.make_batch(samples())
    assert list(maker._gradients.unruled.values()) == [
        "an embedding (OPTLearnedPositionalEmbedding) that is not given ids"
    ]
    assert "by rounding alone" in caplog.text


@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wrong", [None, 1])
def test_a_sample_that_is_not_finite_hides_no_wrong_rule(wrong, dtype, length):
    """Of four tokens it is a neighbour, of eight the one that would be compared."""
    maker, bad = maker_in(dtype, wrong=wrong), samples((length,))[0]
    with torch.no_grad():
        maker.loaded.model.model.embed_tokens.weight[200] = float("nan")
    bad = dataclasses.replace(bad, sample_id="bad", input_ids=(*bad.input_ids[:1], 200, *bad.input_ids[2:]))
    assert (to_compare([*samples(), bad]) == 5) == (length == 8)
    made = maker.make_batch([*samples()[:2], bad, *samples()[2:]])
    assert [isinstance(one, GradientError) for one in made] == [False, False, True, False, False, False]
    assert len(maker._gradients.unruled) == (wrong is not None)


def test_what_is_no_number_is_near_nothing():
    one, none = torch.ones(3), torch.tensor([1.0, 1.0, float("nan")])
    assert near(one, one, 0.0) and not near(one, none, 1e9) and not near(none, none, 1e9)
    assert not near(torch.tensor([2.0, 1.0, 1.0]), one, 0.9) and not near(one, torch.tensor([1.0, 3.0, 1.0]), 1.9)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_wrong_direction_is_told_by_many_projections(sign):
    """One would be right by chance now and then: of fifteen sign flips one, to a tenth."""
    draw, same = torch.Generator().manual_seed(0), 0
    prober = Prober(Sketch(SKETCH, [1000]), 0)
    for _ in range(200):
        grad = torch.randn(1, 1000, generator=draw)
        right, other = prober.probe(0, grad), prober.probe(0, sign * grad)
        assert right[0] == other[0] == grad.norm()
        same += int((right - other)[1:].norm() <= 0.5 * grad.norm())
    assert same == (200 if sign > 0 else 0)


class _Twice(torch.nn.Linear):
    """A rule for linear layers is half of what is right here, or off by another factor."""

    factor = 2.0

    def forward(self, hidden):
        return super().forward(hidden) * self.factor


@pytest.mark.parametrize(
    ("dtype", "factor", "found"),
    [("float32", 2.0, True), ("float32", 1.01, True), ("float32", 1 + 2**-14, False), ("bfloat16", 1.5, True)],
)
@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_a_rule_that_is_wrong_by_a_factor_is_found(normalize, dtype, factor, found):
    """Normalised, RapidGrads would be right; token scores are divided by the norms."""
    model = tiny_model("llama").to(getattr(torch, dtype))
    layer = _Twice(16, 16, bias=False)
    layer.factor = factor
    layer.weight = model.model.layers[1].self_attn.q_proj.weight
    model.model.layers[1].self_attn.q_proj = layer
    loaded = loaded_from(model, dtype)
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize=normalize)
    maker.make_batch(samples())
    wrong = ["model.layers.1.self_attn.q_proj.weight"] if found else []
    assert [list(loaded.theta)[n] for n in maker._gradients.unruled] == wrong


class _Grouped(torch.nn.Linear):
    """Some models' layer whose matrix has only the blocks on its diagonal."""

    def forward(self, hidden):
        read = hidden.unflatten(-1, (4, -1)).unbind(-2)
        blocks = self.weight.unflatten(0, (4, -1))
        return torch.cat([part @ block.T for part, block in zip(read, blocks, strict=True)], -1)


def test_a_rule_that_makes_gradients_of_another_shape_is_found():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj = _Grouped(4, 16, bias=False)
    loaded = loaded_from(model)
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
        assert_close(vector, slow(loaded, sample))
    assert [list(loaded.theta)[n] for n in maker._gradients.unruled] == ["model.layers.1.self_attn.q_proj.weight"]


class _Rooted(torch.nn.Module):
    """Adds nothing, of which the derivative at zero is no number."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) + 0 * hidden.abs().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("wrong", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_that_is_not_finite_is_no_fault_of_the_rules(dtype, wrong):
    """Of the sample that would be compared, whose loss is finite; it hides no wrong rule either."""
    maker, bad = maker_in(dtype, wrong=wrong), samples((8,))[0]
    model = maker.loaded.model.model
    with torch.no_grad():
        model.embed_tokens.weight[200] = 0
    model.layers[0].input_layernorm = _Rooted(model.layers[0].input_layernorm)
    bad = dataclasses.replace(bad, sample_id="bad", input_ids=(*bad.input_ids[:1], 200, *bad.input_ids[2:]))
    batch = [*samples(), bad]
    assert to_compare(batch) == 5
    made = maker.make_batch(batch)
    assert [isinstance(one, GradientError) for one in made] == [False] * 5 + [True]
    assert len(maker._gradients.unruled) == (wrong is not None)


def test_samples_that_a_wrong_one_spreads_to_are_computed_alone():
    maker, bad = maker_in(torch.bfloat16), samples((4,))[0]
    with torch.no_grad():
        maker.loaded.model.model.embed_tokens.weight[200] = float("nan")
    maker.loaded.model.model.norm.register_forward_hook(lambda module, read, wrote: wrote + wrote.mean(0))
    bad = dataclasses.replace(bad, sample_id="bad", input_ids=(*bad.input_ids[:1], 200, *bad.input_ids[2:]))
    made = maker.make_batch([*samples()[:2], bad, *samples()[2:]])
    assert [isinstance(one, GradientError) for one in made] == [False, False, True, False, False, False]


def test_an_output_layer_that_is_wrong_is_left_under_rounding_too(rounding, monkeypatch):
    backward = head_module._Losses.backward

    def wrong(ctx, delta):
        hidden, *others = backward(ctx, delta)
        hidden[:, ::3] *= 0.2
        return hidden, *others

    monkeypatch.setattr(head_module._Losses, "backward", wrong)
    maker = maker_in(torch.bfloat16, lora=True)
    maker.make_batch(samples())
    assert maker._gradients.output is None and not maker._gradients.unruled


def test_a_model_without_rules_runs_no_batch_to_be_checked():
    maker, shapes = maker_in(torch.bfloat16), []
    maker._gradients.give_up_all("asked for")
    maker.loaded.model.register_forward_pre_hook(
        lambda module, given, named: shapes.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    maker.make_batch(samples())
    assert set(shapes) == {1}


def test_what_a_model_does_to_batches_alone_is_not_taken_for_rounding():
    """Though it does it to copies of a sample as well, without any derivative by another."""
    maker = maker_in(torch.bfloat16)
    maker.loaded.model.model.norm.register_forward_hook(
        lambda module, read, wrote: wrote.roll(1, -1) if len(wrote) > 1 else wrote
    )
    maker.make_batch(samples())
    assert len(maker._gradients.unruled) == len(maker.loaded.theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_where_memory_is_short_the_check_computes_layers_twice_too(dtype, lora, monkeypatch):
    """Else a model that fits with checkpointing alone would end the ingest in its check."""
    maker = maker_in(dtype, lora=lora)
    layers = maker.loaded.inner.model.layers
    kept = []

    def watch(module, given):
        if torch.is_grad_enabled() and not getattr(module.forward, "for_first_run", False):
            kept.append(module)

    for layer in layers:
        layer.register_forward_pre_hook(watch)
    plain = maker.make_batch(samples())
    assert kept, "as it is without"
    assert maker.save_memory() and maker.checkpointing
    kept.clear()
    again = maker.make_batch(samples())
    assert kept == [] and not maker._gradients.unruled
    for (one, loss), (other, before) in zip(again, plain, strict=True):
        assert loss == pytest.approx(before, rel=0.02)
        assert abs(one - other).max() < (1e-5 if dtype == torch.float32 else 0.1) * abs(other).max()
