"""LoRA of an embedding, whose matrices are no modules of their own: y = E[x] + scale * B A[:, x]."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.gradient.contribution import Call, Contribution, Dense, NoRuleError, ids_of

_A, _B = DICTIONARIES = ("lora_embedding_A", "lora_embedding_B")


def is_adapted_embedding(module: torch.nn.Module) -> bool:
    """Say whether a module is PEFT's LoRA of an embedding."""
    return all(isinstance(getattr(module, name, None), torch.nn.ParameterDict) for name in (_A, _B))


def matrices(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names and matrices of its adapters; see `is_adapted_embedding`."""
    for kind in (_A, _B):
        for adapter, matrix in module.get_submodule(kind).named_parameters():
            yield f"{kind}.{adapter}", matrix


def is_first(name: str) -> bool:
    """Say whether a matrix is the one that is looked up in, [rank, tokens], by its name."""
    return name.startswith(f"{_A}.")


def first_weight(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    """Return what a call adds to the gradients of A: delta B in the column of each token."""
    ids, delta, a, b = _parts(module, call, delta, batch)
    padding = _base(module).padding_idx

    def form(samples: slice) -> Tensor:
        at = delta[samples].float() @ b.float()
        if padding is not None:
            at = at * (ids[samples] != padding).unsqueeze(-1)
        grads = torch.zeros(len(at), a.shape[1], a.shape[0], device=at.device)
        return grads.scatter_add_(1, ids[samples].unsqueeze(-1).expand_as(at), at).transpose(1, 2)

    return Dense(form)


def second_weight(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
    """Return what a call adds to the gradients of B: the sum over tokens of delta A[:, x]^T."""
    ids, delta, a, _ = _parts(module, call, delta, batch)
    return Dense(lambda samples: torch.bmm(delta[samples].float().transpose(1, 2), a.T[ids[samples]].float()))


def _parts(module: Any, call: Call, delta: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids, what comes back to the product of both matrices, and these.

    Raises:
        NoRuleError: it is computed in another way than plain LoRA's.
    """
    active = [name for name in module.active_adapters if name in module.lora_embedding_A]
    base = _base(module)
    unusual = module.merged or module.disable_adapters or base.max_norm is not None or base.scale_grad_by_freq
    if len(active) != 1 or active[0] in module.lora_variant or unusual:
        raise NoRuleError("LoRA of an embedding that is not computed as B A[:, x]")
    (name,), ids = active, ids_of(call.read[0], delta, batch)
    scale = getattr(base, "embed_scale", None)
    factor = module.scaling[name] * (1.0 if scale is None else scale)
    return ids, delta * factor, module.lora_embedding_A[name].detach(), module.lora_embedding_B[name].detach()


def _base(module: Any) -> Any:
    return module.get_base_layer()
