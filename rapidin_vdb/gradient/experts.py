"""Per-sample gradients of a mixture of experts, whose weights transformers holds in one tensor, and of its router.

They have biases and are stored turned in some models (GPT-OSS). A token reaches few experts: a sample's gradient of one
is the sum over those of its tokens that were sent there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.gradient.contribution import Contribution, Dense, NoRuleError, tokens_of


def is_experts(module: torch.nn.Module) -> bool:
    """Say whether a module is experts as transformers lays them out: gate and up in one tensor, down, their biases."""
    weights = {"gate_up_proj": 3, "down_proj": 3}
    biases = {f"{name}_bias": 2 for name in weights}
    held = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return held in (weights, weights | biases)


def expert_rule(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...], Tensor, int], Contribution] | None:
    """Return the rule for one of their tensors, by its name."""
    return {
        "gate_up_proj": _gate_up_weight,
        "gate_up_proj_bias": _gate_up_bias,
        "down_proj": _down_weight,
        "down_proj_bias": _down_bias,
    }.get(name)


def is_router(module: torch.nn.Module) -> bool:
    """Say whether a module sends tokens to experts; the first that it returns should be its linear layer's output.

    Where it is something else, the self-check on the first batch finds out.
    """
    held = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return type(module).__name__.endswith("Router") and held in ({"weight": 2}, {"weight": 2, "bias": 1})


def _gate_up_weight(module: torch.nn.Module, reads: tuple[Any, ...], delta: Tensor, batch: int) -> Contribution:
    """Return the gradients of `gate_up_proj`, [samples, experts, 2 * inner, hidden], or the last two exchanged."""
    return _weight(module, "gate_up_proj", reads, delta, batch, _to_gate_up)


def _gate_up_bias(module: torch.nn.Module, reads: tuple[Any, ...], delta: Tensor, batch: int) -> Contribution:
    """Return the gradients of `gate_up_proj_bias`, [samples, experts, 2 * inner]."""
    return _bias(module, "gate_up_proj_bias", reads, delta, batch, _to_gate_up)


def _down_weight(module: torch.nn.Module, reads: tuple[Any, ...], delta: Tensor, batch: int) -> Contribution:
    """Return the gradients of `down_proj`, [samples, experts, hidden, inner], or the last two exchanged."""
    return _weight(module, "down_proj", reads, delta, batch, _to_down)


def _down_bias(module: torch.nn.Module, reads: tuple[Any, ...], delta: Tensor, batch: int) -> Contribution:
    """Return the gradients of `down_proj_bias`, [samples, experts, hidden]."""
    return _bias(module, "down_proj_bias", reads, delta, batch, lambda module, expert, read, delta: (delta, read))


_Pair = Callable[[torch.nn.Module, int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(module, expert, its tokens' states, what comes back to its output) -> what comes back to one of its linear layers,
and what this has read; [tokens, columns] each."""


def _to_gate_up(module: torch.nn.Module, expert: int, read: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    down = _matrix(module, "down_proj", expert)
    with torch.enable_grad():
        gate_up = _gate_up(module, expert, read).requires_grad_(True)
        gated = _gate(module, gate_up)
    (inner,) = torch.autograd.grad(gated, gate_up, delta @ down)
    return inner, read


def _to_down(module: torch.nn.Module, expert: int, read: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return delta, _gate(module, _gate_up(module, expert, read))


def _gate_up(module: torch.nn.Module, expert: int, read: Tensor) -> Tensor:
    written = read @ _matrix(module, "gate_up_proj", expert).T
    bias = getattr(module, "gate_up_proj_bias", None)
    return written if bias is None else written + bias[expert].detach()


def _matrix(module: torch.nn.Module, name: str, expert: int) -> Tensor:
    """Return one expert's matrix, [written, read]."""
    matrix = module.get_parameter(name)[expert].detach()
    return matrix.T if getattr(module, "is_transposed", False) else matrix


def _gate(module: Any, gate_up: Tensor) -> Any:
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _weight(
    module: torch.nn.Module, name: str, reads: tuple[Any, ...], delta: Tensor, batch: int, pair: _Pair
) -> Contribution:
    """Sum, for each sample and expert, the outer products of what `pair` gives for the tokens sent there."""
    turned = getattr(module, "is_transposed", False)

    def summed(left: Tensor, right: Tensor) -> Tensor:
        return right.T @ left if turned else left.T @ right

    return _experts(module, name, reads, delta, batch, pair, summed)


def _bias(
    module: torch.nn.Module, name: str, reads: tuple[Any, ...], delta: Tensor, batch: int, pair: _Pair
) -> Contribution:
    return _experts(module, name, reads, delta, batch, pair, lambda left, right: left.float().sum(0))


def _experts(
    module: torch.nn.Module,
    name: str,
    reads: tuple[Any, ...],
    delta: Tensor,
    batch: int,
    pair: _Pair,
    summed: Callable[[Tensor, Tensor], Tensor],
) -> Contribution:
    weight = module.get_parameter(name)
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
            left, right = pair(module, expert, read, (back * shares).to(read.dtype))
            # Tokens are in order, so those of a sample stand together.
            ends = torch.searchsorted(places, torch.arange(1, count + 1, device=places.device) * longest).tolist()
            for sample, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if end > begin:
                    grads[sample, expert] = summed(left[begin:end], right[begin:end])
        return grads

    return Dense(form)


def _sent(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that tokens were sent to, these tokens, and as which of their choices."""
    for expert in range(experts):
        places, choices = torch.where(chosen == expert)
        if len(places):
            yield expert, places, choices
