"""How a parameter's per-sample gradients follow from what its module read and what came back from the loss.

For a linear layer y = W x the gradient of sample b is the sum over its tokens of delta_t x_t^T, with delta the gradient
of the loss with respect to y: one batched matrix product gives all samples' gradients, at the price of the usual one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dense:
    """Gradients of some samples of a batch, made when asked for."""

    form: Callable[[slice], Tensor]
    """Which samples -> [samples, *shape of the parameter]."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Gradient rows of an embedding, for the tokens that a batch holds; all other rows are zero."""

    ids: Tensor
    """Row of each token, [batch, tokens]; -1 for one that gives no gradient."""
    delta: Tensor
    """Gradient of each token's row, [batch, tokens, columns]."""


Contribution = Dense | Rows
Rule = Callable[[torch.nn.Module, Tensor, Tensor, int], Contribution]
"""(module, its input, gradient of its output, batch size) -> what that call adds to the parameter's gradients."""


class NoRuleError(Exception):
    """A module was called in a way that no rule covers; its parameters fall back to autograd."""


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
    return None


def _tokens(tensor: Tensor, batch: int) -> Tensor:
    """Return a tensor as [batch, tokens, columns]; some models flatten the first two for their linear layers."""
    if tensor.dim() >= 3 and tensor.shape[0] == batch:
        return tensor.flatten(1, -2)
    if tensor.dim() == 2 and tensor.shape[0] % batch == 0:
        return tensor.unflatten(0, (batch, -1))
    raise NoRuleError(f"a tensor of shape {tuple(tensor.shape)} does not begin with the batch of {batch}")


def _linear_weight(module: torch.nn.Module, read: Tensor, delta: Tensor, batch: int) -> Contribution:
    read, delta = _tokens(read, batch), _tokens(delta, batch)
    return Dense(lambda samples: torch.bmm(delta[samples].transpose(1, 2), read[samples].to(delta.dtype)))


def _conv1d_weight(module: torch.nn.Module, read: Tensor, delta: Tensor, batch: int) -> Contribution:
    read, delta = _tokens(read, batch), _tokens(delta, batch)
    return Dense(lambda samples: torch.bmm(read[samples].transpose(1, 2).to(delta.dtype), delta[samples]))


def _bias(module: torch.nn.Module, read: Tensor, delta: Tensor, batch: int) -> Contribution:
    delta = _tokens(delta, batch)
    return Dense(lambda samples: delta[samples].float().sum(1))


def _layer_norm_weight(module: torch.nn.Module, read: Tensor, delta: Tensor, batch: int) -> Contribution:
    assert isinstance(module, torch.nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        raise NoRuleError("a layer norm over several dimensions")
    read, delta = _tokens(read, batch), _tokens(delta, batch)

    def form(samples: slice) -> Tensor:
        standardised = F.layer_norm(read[samples].float(), module.normalized_shape, None, None, module.eps)
        return (standardised * delta[samples].float()).sum(1)

    return Dense(form)


def _rms_norm_weight(module: torch.nn.Module, read: Tensor, delta: Tensor, batch: int) -> Contribution:
    read, delta = _tokens(read, batch), _tokens(delta, batch)
    epsilon: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None:
        raise NoRuleError("an RMS norm that hides its epsilon")

    def form(samples: slice) -> Tensor:
        wide = read[samples].float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * delta[samples].float()).sum(1)

    return Dense(form)


def _embedding_weight(module: torch.nn.Module, read: Tensor, delta: Tensor, batch: int) -> Contribution:
    assert isinstance(module, torch.nn.Embedding)
    if read.dim() != 2 or read.shape[0] != batch or delta.shape[0] != batch:
        raise NoRuleError(f"an embedding of ids of shape {tuple(read.shape)}, for a batch of {batch}")
    ids = read if module.padding_idx is None else read.masked_fill(read == module.padding_idx, -1)
    return Rows(ids, delta)


def dense_rows(rows: Rows, samples: slice, count: int) -> Tensor:
    """Return embedding rows as a dense gradient, [samples, count, columns]."""
    ids, delta = rows.ids[samples], rows.delta[samples].float()
    grads = torch.zeros(len(ids), count, delta.shape[-1], device=delta.device)
    kept = (ids >= 0).unsqueeze(-1)
    return grads.scatter_add_(1, ids.clamp(min=0).unsqueeze(-1).expand_as(delta), delta * kept)


def summed_rows(rows: Rows, sample: int) -> tuple[Tensor, Tensor]:
    """Return one sample's distinct rows and their gradients, [rows] and [rows, columns]."""
    ids, delta = rows.ids[sample], rows.delta[sample].float()
    ids, delta = ids[ids >= 0], delta[ids >= 0]
    distinct, places = ids.unique(return_inverse=True)
    return distinct, torch.zeros(len(distinct), delta.shape[-1], device=delta.device).index_add_(0, places, delta)
