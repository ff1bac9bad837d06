"""Per-sample gradients of a mixture of experts, whose weights transformers holds in one tensor, and of its router.

A token reaches few experts: a sample's gradient of one is the sum over those of its tokens that were sent there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.gradient.contribution import Contribution, Dense, NoRuleError, tokens_of


def is_experts(module: torch.nn.Module) -> bool:
    """Say whether a module is experts as transformers lays them out: gate and up in one tensor, down, no biases."""
    return {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)} == {
        "gate_up_proj": 3,
        "down_proj": 3,
    } and not getattr(module, "is_transposed", False)


def is_router(module: torch.nn.Module) -> bool:
    """Say whether a module sends tokens to experts; the first that it returns should be its linear layer's output.

    Where it is something else, the self-check on the first batch finds out.
    """
    return type(module).__name__.endswith("Router") and [
        (name, parameter.dim()) for name, parameter in module.named_parameters(recurse=False)
    ] == [("weight", 2)]


def gate_up_weight(module: torch.nn.Module, reads: tuple[Any, ...], delta: Tensor, batch: int) -> Contribution:
    """Return the gradients of `gate_up_proj`, [samples, experts, 2 * inner, hidden]."""

    def pair(expert: int, read: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            gate_up = (read @ module.get_parameter("gate_up_proj")[expert].detach().T).requires_grad_(True)
            gated = _gate(module, gate_up)
        (inner,) = torch.autograd.grad(gated, gate_up, delta @ module.get_parameter("down_proj")[expert].detach())
        return inner, read

    return _experts(module.get_parameter("gate_up_proj"), reads, delta, batch, pair)


def down_weight(module: torch.nn.Module, reads: tuple[Any, ...], delta: Tensor, batch: int) -> Contribution:
    """Return the gradients of `down_proj`, [samples, experts, hidden, inner]."""

    def pair(expert: int, read: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return delta, _gate(module, read @ module.get_parameter("gate_up_proj")[expert].detach().T)

    return _experts(module.get_parameter("down_proj"), reads, delta, batch, pair)


def _gate(module: Any, gate_up: Tensor) -> Any:
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _experts(
    weight: Tensor,
    reads: tuple[Any, ...],
    delta: Tensor,
    batch: int,
    pair: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Contribution:
    """Sum, for each sample and expert, the outer products of what `pair` gives for the tokens sent there."""
    if len(reads) != 3 or not all(isinstance(part, Tensor) for part in reads):
        raise NoRuleError("experts that are called with something else than states, their experts and weights")
    states, chosen, weights = (tokens_of(part, batch) for part in reads)
    delta = tokens_of(delta, batch)

    def form(samples: slice) -> Tensor:
        count, longest = states[samples].shape[:2]
        grads = torch.zeros(count, *weight.shape, device=delta.device)
        for expert, places, choices in _sent(chosen[samples].flatten(0, 1), len(weight)):
            read = states[samples].flatten(0, 1)[places]
            back = delta[samples].flatten(0, 1)[places]
            shares = weights[samples].flatten(0, 1)[places, choices].unsqueeze(1)
            left, right = pair(expert, read, (back * shares).to(read.dtype))
            # Tokens are in order, so those of a sample stand together.
            ends = torch.searchsorted(places, torch.arange(1, count + 1, device=places.device) * longest).tolist()
            for sample, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if end > begin:
                    grads[sample, expert] = left[begin:end].T @ right[begin:end]
        return grads

    return Dense(form)


def _sent(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that tokens were sent to, these tokens, and as which of their choices."""
    for expert in range(experts):
        places, choices = torch.where(chosen == expert)
        if len(places):
            yield expert, places, choices
