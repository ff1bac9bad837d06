"""TF32 for the products of an adapter: on a GPU, and where its base model is in 16 bits anyway."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapidin_vdb.gradient.contribution import Call, Contribution, Dense
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.rules import Rule
from rapidin_vdb.matmul import under_tf32


def adapter_layers(loaded: LoadedModel) -> list[torch.nn.Linear]:
    """Return the layers whose products may be taken under TF32: float32 LoRA layers on a GPU, over a base in 16 bits.

    Adapters are kept in float32, whose products do without the tensor cores. TF32 rounds factors to 11 significant
    bits; what comes from the base model has no more to lose (8 in bfloat16, 11 in float16). Sums stay in float32.
    """
    if loaded.device == "cpu" or loaded.dtype == "float32":
        return []
    return [
        module
        for name, module in loaded.model.named_modules()
        if "lora_" in name and isinstance(module, torch.nn.Linear) and module.weight.dtype == torch.float32
    ]


@contextmanager
def tf32_products(layers: Sequence[torch.nn.Linear]) -> Iterator[None]:
    """Take these layers' products, forward and backward, under TF32 for as long as the block lasts.

    No others: where a model of 16 bits has further products in float32, as for rotary positions or the router of its
    experts, they are so for a reason. The layers' parameters get no gradient.
    """
    for layer in layers:
        layer.forward = partial(_Product.apply, layer)  # type: ignore[method-assign]
        layer.forward.for_first_run = True  # type: ignore[attr-defined]  # see `repeated`: vmap knows no such function
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes to light again


def tf32_rule(rule: Rule) -> Rule:
    """Return a layer's rule with its products under TF32."""

    def apply(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
        contribution = rule(module, call, delta, batch)
        assert isinstance(contribution, Dense)

        def form(samples: slice) -> Tensor:
            with under_tf32():
                return contribution.form(samples)

        return Dense(form)

    return apply


class _Product(torch.autograd.Function):
    """A linear layer whose parameters stay as they are."""

    @staticmethod
    def forward(ctx: Any, layer: torch.nn.Linear, read: Tensor) -> Tensor:
        ctx.layer = layer
        with under_tf32():
            return F.linear(read, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[None, Tensor]:
        with under_tf32():
            return None, delta @ ctx.layer.weight
