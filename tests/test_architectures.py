"""Batched gradients of many architectures against plain autograd, one sample at a time; tiny models with random weights."""

import dataclasses
import logging
import re

import numpy as np
import pytest
import torch
import transformers
from test_batch import SKETCH, loaded_from, samples, slow

from rapidin_vdb.gradient import RapidGradMaker

_LLAMA = {
    "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_SHORT = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "Bloom": {"vocab_size": 259, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "Cohere": _LLAMA | {"use_qk_norm": True},
    "Falcon": _SHORT | {"alibi": False},
    "GPTJ": {"vocab_size": 259, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "GPTNeoX": _SHORT | {"intermediate_size": 24, "max_position_embeddings": 64},
    "Gemma": _LLAMA | {"head_dim": 4, "pad_token_id": 0},
    "Gemma2": _LLAMA | {"head_dim": 4, "sliding_window": 8},
    "Granite": _LLAMA,
    "Mamba": {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "Mistral": _LLAMA | {"sliding_window": 6},
    "OPT": _SHORT | {"ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "dropout": 0.0},
    "Olmo2": _LLAMA,
    "Phi": _LLAMA,
    "Phi3": _LLAMA | {"pad_token_id": 0},
    "Qwen3": _LLAMA | {"head_dim": 4},
    "StableLm": _LLAMA,
}
# What is done by autograd; all else is batched. A rule that is wrong would be found out, and autograd take its place.
BY_AUTOGRAD = {
    "OPT": {"decoder.embed_positions.weight"},  # their ids are made within
}
# These go on computing with what their output layer wrote.
LOGITS_OF_THEIR_OWN = {"Cohere", "Gemma2", "Granite"}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:  # norms and biases begin as ones and zeros, which hide mistakes
                tensor.add_(0.1 * torch.randn_like(tensor))
    # What a bias adds to all keys alike changes no attention, unless they are turned by their places: its gradient is
    # rounding, which normalisation makes as long as others.
    if name == "OPT":
        for layer in model.model.decoder.layers:
            layer.self_attn.k_proj.bias = None
    return loaded_from(model)


def compare(loaded) -> RapidGradMaker:
    """Compare also without normalisation, which hides a gradient that is wrong by a factor."""
    makers = [RapidGradMaker(loaded, spec=SKETCH, normalize=normalize) for normalize in ("none", "layer")]
    for maker in makers:
        for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
            expected = slow(loaded, sample, maker.normalize)
            assert np.linalg.norm(vector - expected) <= 2e-5 * np.linalg.norm(expected)
    # Else one was found out, and autograd took its place.
    assert makers[0]._gradients.unruled.keys() == makers[1]._gradients.unruled.keys()
    return makers[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_autograd(name, caplog):
    caplog.set_level(logging.ERROR, logger="transformers")
    loaded = made(name)
    maker, names = compare(loaded), list(loaded.theta)
    unruled = {re.sub(r"^.*layers\.\d+\.|^model\.", "", names[number]) for number in maker._gradients.unruled}
    assert unruled == BY_AUTOGRAD.get(name, set())
    assert maker._gradients.output is None, "its layer is in theta"


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_below_a_frozen_output_layer_are_those_of_autograd(name, caplog):
    caplog.set_level(logging.ERROR, logger="transformers")
    loaded = made(name)
    frozen = {id(tensor) for tensor in loaded.model.get_output_embeddings().parameters()}
    for tensor in loaded.theta.values():
        tensor.requires_grad_(id(tensor) not in frozen)
    loaded = dataclasses.replace(loaded, theta={n: t for n, t in loaded.theta.items() if id(t) not in frozen})
    assert (compare(loaded)._gradients.output is None) == (name in LOGITS_OF_THEIR_OWN)


def test_what_reads_images_has_no_part_in_a_text(caplog):
    """It stays in theta, so that databases that have it there go on; but no sample has a pass of its own for it."""
    text = _LLAMA | {"head_dim": 4, "sliding_window": 8}
    sees = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=sees | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=258, boi_token_index=257, eoi_token_index=256,
    )  # fmt: skip
    torch.manual_seed(0)
    loaded = loaded_from(transformers.AutoModelForCausalLM.from_config(config).eval())
    beside = [name for name in loaded.theta if "vision_tower" in name or "multi_modal_projector" in name]
    maker = compare(loaded)
    assert maker._gradients.unruled == {} and 0 < len(beside) < len(loaded.theta)
    told = (
        f"{len(beside)} tensors have no part in a text's loss, and no gradient (model.vision_tower, model.multi_modal"
    )
    assert told in caplog.text and "one sample at a time" not in caplog.text
