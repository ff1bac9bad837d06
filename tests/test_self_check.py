"""The self-check of batches computed in 16 bits, where rounding alone may be larger than what is looked for."""

import dataclasses

import pytest
import torch
from conftest import tiny_model
from test_batch import SKETCH, _Doubled, loaded_from, samples

from rapidin_vdb.gradient import RapidGradMaker
from rapidin_vdb.gradient.training import with_lora

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
    original, draw = RapidGradMaker._add_alone, torch.Generator().manual_seed(0)

    def coarse(maker, rapidgrad, sample, **options):
        loss = original(maker, rapidgrad, sample, **options)
        noise = torch.randn(rapidgrad.shape, generator=draw)
        rapidgrad += 0.12 * rapidgrad.norm() * noise / noise.norm()
        return loss

    monkeypatch.setattr(RapidGradMaker, "_add_alone", coarse)


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
