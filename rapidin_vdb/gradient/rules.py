"""How a parameter's per-sample gradients follow from what its module read and what came back from the loss.

For a linear layer y = W x the gradient of sample b is the sum over its tokens of delta_t x_t^T, with delta the gradient
of the loss with respect to y: one batched matrix product gives all samples' gradients, at the price of the usual one.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rapidin_vdb.gradient.adapted_embedding import (
    DICTIONARIES,
    first_weight,
    is_adapted_embedding,
    is_first,
    matrices,
    second_weight,
)
from rapidin_vdb.gradient.adapted_experts import is_experts, wrapped_modules, wrapped_parameters
from rapidin_vdb.gradient.adapted_router import is_adapted_router, router_factor_rule
from rapidin_vdb.gradient.contribution import Call, Contribution, Dense, NoRuleError, Rows, ids_of, tokens_of
from rapidin_vdb.gradient.experts import expert_rule, is_router
from rapidin_vdb.gradient.trained_tokens import held_by, rows_rule, trained_rows, trains_tokens

Rule = Callable[[torch.nn.Module, Call, Tensor, int], Contribution]
"""(module, its call, gradient of its output, batch size) -> what that call adds to the parameter's gradients."""


def own_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield names and parameters that a module itself computes with."""
    yield from module.named_parameters(recurse=False)
    if is_adapted_embedding(module):
        yield from matrices(module)
    if trains_tokens(module):
        yield from trained_rows(module)
    if is_experts(module) or is_adapted_router(module):
        yield from wrapped_parameters(module)


def held_modules(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield modules that only hold what a module itself computes with."""
    if is_adapted_embedding(module):
        yield from (module.get_submodule(kind) for kind in DICTIONARIES)
    if trains_tokens(module):
        yield from held_by(module)
    if is_experts(module) or is_adapted_router(module):
        yield from wrapped_modules(module)


def rule_for(module: torch.nn.Module, name: str) -> Rule | None:
    """Return the rule for a module's own parameter of that name, None where there is none."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear | Conv1D):
        if name == "bias":
            return _bias
        if name == "weight":
            return _conv1d_weight if isinstance(module, Conv1D) else _linear_weight
    if isinstance(module, torch.nn.Embedding) and name == "weight":
        return None if module.max_norm is not None or module.scale_grad_by_freq else _embedding_weight
    if isinstance(module, torch.nn.LayerNorm):
        return {"weight": _layer_norm_weight, "bias": _bias}.get(name)
    if type(module).__name__.endswith("RMSNorm") and name == "weight" and module.get_parameter(name).dim() == 1:
        return _rms_norm_weight
    if type(module).__name__.endswith("LayerNorm") and name == "weight" and hasattr(module, "variance_epsilon"):
        return _own_layer_norm_weight if _centres(module) else None
    if is_experts(module):
        return expert_rule(name)
    if is_adapted_router(module) and (rule := router_factor_rule(name)):
        return rule
    if is_router(module) or is_adapted_router(module):
        return _bias if name == "bias" else _linear_weight
    if trains_tokens(module):
        return rows_rule(name)
    if is_adapted_embedding(module):
        return first_weight if is_first(name) else second_weight
    return None


def _linear_weight(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    read, delta = tokens_of(call.read[0], batch), tokens_of(delta, batch)
    return Dense(lambda samples: torch.bmm(delta[samples].transpose(1, 2), read[samples].to(delta.dtype)))


def _conv1d_weight(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    read, delta = tokens_of(call.read[0], batch), tokens_of(delta, batch)
    return Dense(lambda samples: torch.bmm(read[samples].transpose(1, 2).to(delta.dtype), delta[samples]))


def _bias(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    delta = tokens_of(delta, batch)
    return Dense(lambda samples: delta[samples].float().sum(1))


def _layer_norm_weight(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    assert isinstance(module, torch.nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        raise NoRuleError("a layer norm over several dimensions")
    read, delta = tokens_of(call.read[0], batch), tokens_of(delta, batch)

    def form(samples: slice) -> Tensor:
        standardised = F.layer_norm(read[samples].float(), module.normalized_shape, None, None, module.eps)
        return (standardised * delta[samples].float()).sum(1)

    return Dense(form)


@torch.no_grad()
def _centres(module: torch.nn.Module) -> bool:
    """Say whether a norm takes the mean away; T5's, which is called the same, does not."""
    weight = module.get_parameter("weight")
    return not bool(module(torch.ones_like(weight)[None, None]).any())


def _own_layer_norm_weight(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    """Of Cohere's class, which has no bias, and a row of weights for each head where it norms queries and keys."""
    weight = module.get_parameter("weight")
    read, epsilon = call.read[0], cast(float, module.variance_epsilon)
    if weight.dim() == 1:
        read, delta = tokens_of(read, batch), tokens_of(delta, batch)
    if read.shape[0] != batch or read.shape[-weight.dim() :] != weight.shape:
        raise NoRuleError(f"a layer norm of {tuple(weight.shape)} over {tuple(read.shape)}")

    def form(samples: slice) -> Tensor:
        standardised = F.layer_norm(read[samples].float(), weight.shape[-1:], None, None, epsilon)
        return (standardised * delta[samples].float()).flatten(1, -1 - weight.dim()).sum(1)

    return Dense(form)


def _rms_norm_weight(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    read, delta = tokens_of(call.read[0], batch), tokens_of(delta, batch)
    epsilon: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None:
        raise NoRuleError("an RMS norm that hides its epsilon")

    def form(samples: slice) -> Tensor:
        wide = read[samples].float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * delta[samples].float()).sum(1)

    return Dense(form)


def _embedding_weight(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    assert isinstance(module, torch.nn.Embedding)
    read = call.read[0]
    if read.is_floating_point():
        # A subclass that makes its ids itself, as OPT's positions of a mask.
        raise NoRuleError(f"an embedding ({type(module).__name__}) that is not given ids")
    ids = ids_of(read, delta, batch)
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)
    # As of Gemma's, which multiplies what it has looked up.
    scale = getattr(module, "embed_scale", None)
    return Rows(ids, delta if scale is None else delta * scale)


def dense_rows(rows: Rows, samples: slice, count: int) -> Tensor:
    """Return embedding rows as a dense gradient, [samples, count, columns]."""
    ids, delta = rows.ids[samples], rows.delta[samples].float()
    grads = torch.zeros(len(ids), count, delta.shape[-1], device=delta.device)
    kept = (ids >= 0).unsqueeze(-1)
    return grads.scatter_add_(1, ids.clamp(min=0).unsqueeze(-1).expand_as(delta), delta * kept)


def summed_rows(rows: Rows, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return each sample's distinct rows, of `count` in all, and their gradients: [rows] and [rows, columns]."""
    batch, kept = len(rows.ids), rows.ids >= 0
    # All samples at once, as if each had rows of its own: a GPU is asked once a batch how many there are.
    keys = (rows.ids + count * torch.arange(batch, device=rows.ids.device).unsqueeze(1))[kept]
    distinct, places = keys.unique(return_inverse=True)
    delta = rows.delta[kept].float()
    grads = torch.zeros(len(distinct), delta.shape[-1], device=delta.device).index_add_(0, places, delta)
    sizes = torch.bincount(distinct // count, minlength=batch).tolist()
    return list(zip((distinct % count).split(sizes), grads.split(sizes), strict=True))
