"""Per-sample gradients of a mixture of experts, whose weights transformers holds in one tensor, and of its router.

They have biases and are stored turned in some models (GPT-OSS), and have LoRA of their own in others. A token reaches
few experts: a sample's gradient of one is the sum over those of its tokens that were sent there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Integer
from torch import Tensor

from rapidin_vdb.gradient.adapted_experts import Experts
from rapidin_vdb.gradient.contribution import Call, Contribution, Dense, NoRuleError, tokens_of

_Pair = Callable[[Experts, int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(experts, which one, its tokens' states, what comes back to its output) -> what comes back to one of its linear
layers, and what this has read; [tokens, columns] each."""
_Parts = Callable[[Experts, int, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(experts, which one, and what a `_Pair` gives) -> what a sample's gradient of one of its tensors is made of, token by
token: the sum of the outer products of both, or of the first alone."""

# Samples have different numbers of tokens at an expert; filled up to the most, they may be so many times as many, or
# each sample is multiplied by itself.
_FILLED = 4


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
    parts = _matrix if tensor == layer else _bias

    def rule(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
        experts = Experts(module)
        return Dense(_former(experts, pair, parts, tuple(experts.tensor(tensor).shape), call, delta, batch))

    return rule


def _to_gate_up(experts: Experts, expert: int, read: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        gate_up = experts.gate_up(expert, read).requires_grad_(True)
        gated = experts.gate(gate_up)
    (inner,) = torch.autograd.grad(gated, gate_up, delta @ experts.matrix("down_proj", expert))
    return inner, read


def _to_down(experts: Experts, expert: int, read: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return delta, experts.gate(experts.gate_up(expert, read))


def _matrix(experts: Experts, expert: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return (right, left) if experts.turned else (left, right)


def _bias(experts: Experts, expert: int, left: Tensor, right: Tensor) -> tuple[Tensor, None]:
    return left.float(), None


def _factor(
    experts: Experts, layer: str, first: bool, pair: _Pair, call: Call, delta: Tensor, batch: int
) -> Contribution:
    """Return the gradients of A, the first, or B of a layer's adapter, from what comes back to B A and what it read."""

    def parts(experts: Experts, expert: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        factors = experts.factors(layer, expert)
        left, right = (part.to(factors.a.dtype) for part in ((left, right) if factors.a_reads else (right, left)))
        return (factors.scale * (left @ factors.b), right) if first else (left, factors.scale * (right @ factors.a.T))

    count, factors = len(experts.tensor(layer)), experts.factors(layer, 0)
    shape = (count, *(factors.a if first else factors.b).shape)
    form = _former(experts, pair, parts, shape, call, delta, batch)
    if first:
        return Dense(lambda samples: form(samples).flatten(1, 2))
    return Dense(lambda samples: form(samples).permute(0, 2, 3, 1).flatten(2))


def _former(
    experts: Experts,
    pair: _Pair,
    parts: _Parts,
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
        grads = torch.zeros(len(states[samples]), *shape, device=delta.device)
        for expert, sent in _sent(chosen[samples], shape[0]):
            read = states[samples].flatten(0, 1)[sent.places]
            back = delta[samples].flatten(0, 1)[sent.places]
            shares = weights[samples].flatten(0, 1)[sent.places, sent.choices].unsqueeze(1)
            left, right = pair(experts, expert, read, (back * shares).to(read.dtype))
            grads[:, expert] = _summed(*parts(experts, expert, left, right), sent)
        return grads

    return form


@dataclass(frozen=True, eq=False)
class _Sent:
    """The tokens of some samples that one expert was sent, in order."""

    places: Tensor
    """Which they are, of the tokens of all these samples."""
    choices: Tensor
    """As which of its choices each was sent."""
    samples: Tensor
    """Of which sample each is."""
    within: Tensor
    """Which of its sample's tokens here each is."""
    counts: list[int]
    """How many each sample has here."""


def _sent(chosen: Integer[Tensor, "samples tokens choices"], experts: int) -> Iterator[tuple[int, _Sent]]:
    """Yield each expert that tokens were sent to, and these tokens; all counts are waited for at once."""
    some, longest, choices = chosen.shape
    # What is none of them, as experts that pass a token on, comes last.
    flat = torch.where((chosen >= 0) & (chosen < experts), chosen, experts).flatten().long()
    order = torch.argsort(flat, stable=True)
    samples = torch.arange(some, device=flat.device).repeat_interleave(longest * choices)
    counts = torch.zeros((experts + 1) * some, dtype=torch.int64, device=flat.device)
    counts = counts.index_add_(0, flat * some + samples, torch.ones_like(flat)).unflatten(0, (-1, some))
    begins = counts.cumsum(1) - counts
    first = 0
    for expert, mine in enumerate(counts[:experts].tolist()):
        count = sum(mine)
        if count:
            picked = order[first : first + count]
            owners = samples[picked]
            within = torch.arange(count, device=flat.device) - begins[expert][owners]
            yield expert, _Sent(picked // choices, picked % choices, owners, within, mine)
        first += count


def _summed(left: Tensor, right: Tensor | None, sent: _Sent) -> Tensor:
    """Return for each sample the sum over its tokens of the outer products of both, or of `left` alone."""
    some = len(sent.counts)
    if right is None:
        return left.new_zeros(some, left.shape[1]).index_add_(0, sent.samples, left)
    most = max(sent.counts)
    if some * most <= _FILLED * len(left):
        filled = [part.new_zeros(some, most, part.shape[1]) for part in (left, right)]
        for whole, part in zip(filled, (left, right), strict=True):
            whole[sent.samples, sent.within] = part
        return torch.bmm(filled[0].transpose(1, 2), filled[1])
    sums = left.new_zeros(some, left.shape[1], right.shape[1])
    first = 0
    for sample, count in enumerate(sent.counts):
        if count:
            mine = slice(first, first + count)
            torch.mm(left[mine].T, right[mine], out=sums[sample])
        first += count
    return sums
