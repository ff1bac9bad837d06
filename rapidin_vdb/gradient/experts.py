"""Per-sample gradients of a mixture of experts, whose weights transformers holds in one tensor, and of its router.

They have biases and are stored turned in some models (GPT-OSS), and have LoRA of their own in others. A token reaches
few experts: a sample's gradient of one is the sum over those of its tokens that were sent there.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rapidin_vdb.gradient.adapted_experts import Experts
from rapidin_vdb.gradient.contribution import Call, Contribution, Dense, NoRuleError, tokens_of

_Pair = Callable[[Experts, int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(experts, which one, its tokens' states, what comes back to its output) -> what comes back to one of its linear
layers, and what this has read; [tokens, columns] each."""
_Sum = Callable[[Experts, int, Tensor, Tensor], Tensor]
"""(experts, which one, and what a `_Pair` gives, of one sample) -> the gradient of one of its tensors."""


def is_router(module: torch.nn.Module) -> bool:
    """Say whether a module sends tokens to experts; the first that it returns should be its linear layer's output.

    Where it is something else, the self-check on the first batch finds out.
    """
    held = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return type(module).__name__.endswith("Router") and held in ({"weight": 2}, {"weight": 2, "bias": 1})


def expert_rule(name: str) -> Callable[[torch.nn.Module, Call, Tensor, int], Contribution]:
    """Return the rule for one of their tensors, or of those of its adapter, by its name.

    `gate_up_proj` is [experts, 2 * inner, hidden], `down_proj` [experts, hidden, inner], or the last two exchanged;
    their adapters' factors are as in `adapted_experts`.
    """
    tensor, _, factor = name.partition(".lora_")
    layer = tensor.removesuffix("_bias")
    pair = {"gate_up_proj": _to_gate_up, "down_proj": _to_down}[layer]
    if factor:
        kind, _, adapter = factor.partition(".")

        def factor_rule(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
            experts = Experts(module)
            if experts.adapter(layer) != adapter:
                raise NoRuleError("an adapter of experts that is not active")
            return _factor(experts, layer, kind == "A", pair, call, delta, batch)

        return factor_rule
    summed = _matrix if tensor == layer else _bias

    def rule(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
        experts = Experts(module)
        return Dense(_former(experts, pair, summed, tuple(experts.tensor(tensor).shape), call, delta, batch))

    return rule


def _to_gate_up(experts: Experts, expert: int, read: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        gate_up = experts.gate_up(expert, read).requires_grad_(True)
        gated = experts.gate(gate_up)
    (inner,) = torch.autograd.grad(gated, gate_up, delta @ experts.matrix("down_proj", expert))
    return inner, read


def _to_down(experts: Experts, expert: int, read: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return delta, experts.gate(experts.gate_up(expert, read))


def _matrix(experts: Experts, expert: int, left: Tensor, right: Tensor) -> Tensor:
    return right.T @ left if experts.turned else left.T @ right


def _bias(experts: Experts, expert: int, left: Tensor, right: Tensor) -> Tensor:
    return left.float().sum(0)


def _factor(
    experts: Experts, layer: str, first: bool, pair: _Pair, call: Call, delta: Tensor, batch: int
) -> Contribution:
    """Return the gradients of A, the first, or B of a layer's adapter, from what comes back to B A and what it read."""

    def summed(experts: Experts, expert: int, left: Tensor, right: Tensor) -> Tensor:
        factors = experts.factors(layer, expert)
        left, right = (part.to(factors.a.dtype) for part in ((left, right) if factors.a_reads else (right, left)))
        if first:
            return factors.scale * ((left @ factors.b).T @ right)
        return factors.scale * (left.T @ (right @ factors.a.T))

    count, factors = len(experts.tensor(layer)), experts.factors(layer, 0)
    shape = (count, *(factors.a if first else factors.b).shape)
    form = _former(experts, pair, summed, shape, call, delta, batch)
    if first:
        return Dense(lambda samples: form(samples).flatten(1, 2))
    return Dense(lambda samples: form(samples).permute(0, 2, 3, 1).flatten(2))


def _former(
    experts: Experts,
    pair: _Pair,
    summed: _Sum,
    shape: tuple[int, ...],
    call: Call,
    delta: Tensor,
    batch: int,
) -> Callable[[slice], Tensor]:
    """Return what makes some samples' gradients, [samples, *shape], whose shape begins with the experts."""
    if len(call.read) != 3 or not all(isinstance(part, Tensor) for part in call.read):
        raise NoRuleError("experts that are called with something else than states, their experts and weights")
    states, chosen, weights = (tokens_of(part, batch) for part in call.read)
    delta = tokens_of(delta, batch)

    def form(samples: slice) -> Tensor:
        some, longest = states[samples].shape[:2]
        grads = torch.zeros(some, *shape, device=delta.device)
        for expert, places, choices in _sent(chosen[samples].flatten(0, 1), shape[0]):
            read = states[samples].flatten(0, 1)[places]
            back = delta[samples].flatten(0, 1)[places]
            shares = weights[samples].flatten(0, 1)[places, choices].unsqueeze(1)
            left, right = pair(experts, expert, read, (back * shares).to(read.dtype))
            # Tokens are in order, so those of a sample stand together.
            ends = torch.searchsorted(places, torch.arange(1, some + 1, device=places.device) * longest).tolist()
            for sample, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if end > begin:
                    grads[sample, expert] = summed(experts, expert, left[begin:end], right[begin:end])
        return grads

    return form


def _sent(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that tokens were sent to, these tokens, and as which of their choices."""
    for expert in range(experts):
        places, choices = torch.where(chosen == expert)
        if len(places):
            yield expert, places, choices
