"""Forward mode: the influence of every token of every sample of a batch on one direction, in a single forward pass.

For a direction u the score of a token with loss L_i is the directional derivative <dL_i/dtheta, u>. One pass that
carries a tangent beside each activation gives it for all tokens at once: at a linear layer y = W x the tangent of y is
W x' + U x, with x' the tangent of x and U the direction's part for W. Samples of a batch share the direction but not
their layers' norms, so the second term is scaled sample by sample, which a tangent of the parameters could not be.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapidin_vdb.gradient.forward import batch_losses
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.rules import held_modules, own_parameters
from rapidin_vdb.records import Encoded

# A direction has norm 1, and what a layer reads a few at each place: times 2^8, that is far from where float16 ends.
_LARGEST_SCALE = 8
# Torch has one level of forward mode for the whole process: two models in two threads would be within each other's.
_LEVEL = Lock()

TangentRule = Callable[[Any, Tensor, Tensor], Tensor]
"""(module, what it reads, direction of one of its parameters) -> derivative of what it writes in that direction."""


class NoTangentError(Exception):
    """A module was called in a way, or is of a kind, that forward mode does not cover."""


def tangent_rule_for(module: torch.nn.Module, name: str) -> TangentRule | None:
    """Return how a module's output moves with its own parameter of that name; None where no rule is known.

    The counterpart of `rules.rule_for`: these modules are linear in their parameters.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear | Conv1D) and name in ("weight", "bias"):
        if name == "bias":
            return lambda module, read, direction: direction.expand(*read.shape[:-1], -1)
        if isinstance(module, Conv1D):
            return lambda module, read, direction: read @ direction
        return lambda module, read, direction: F.linear(read, direction)
    # Not those that scale what they look up.
    if type(module) is torch.nn.Embedding and name == "weight":
        return _embedding_moves
    if isinstance(module, torch.nn.LayerNorm) and len(module.normalized_shape) == 1:
        if name == "bias":
            return lambda module, read, direction: direction.expand_as(read)
        return lambda module, read, direction: (
            F.layer_norm(read, module.normalized_shape, None, None, module.eps) * direction
        )
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module).__name__.endswith("RMSNorm") and name == "weight" and epsilon is not None:
        return lambda module, read, direction: (
            direction * (read.float() * torch.rsqrt(read.float().pow(2).mean(-1, keepdim=True) + epsilon)).to(read)
        )
    return None


def _embedding_moves(module: torch.nn.Embedding, read: Tensor, direction: Tensor) -> Tensor:
    moved = F.embedding(read, direction)
    # Of a padding token's row no gradient is taken.
    return moved if module.padding_idx is None else moved * (read != module.padding_idx).unsqueeze(-1)


class TangentPass:
    """A model through which tangents flow."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Find the rule of every tensor of theta.

        Raises:
            NoTangentError: one of them has none.
        """
        self.loaded = loaded
        numbers = {id(tensor): number for number, tensor in enumerate(loaded.theta.values())}
        self._rules: list[tuple[torch.nn.Module, list[tuple[int, TangentRule]]]] = []
        found = set()
        modules = list(loaded.model.modules())
        held = {id(part) for module in modules for part in held_modules(module)}
        for module in modules:
            rules = []
            for name, parameter in own_parameters(module) if id(module) not in held else ():
                number = numbers.get(id(parameter))
                if number is None:
                    continue
                rule = tangent_rule_for(module, name)
                if rule is None:
                    raise NoTangentError(f"{type(module).__name__} has no rule for {name}")
                rules.append((number, rule))
                found.add(number)
            if rules:
                self._rules.append((module, rules))
        if len(found) < len(numbers):
            raise NoTangentError("a parameter that no module owns")
        _load_forward_rules()
        self._frozen = [module for module in loaded.model.modules() if _is_four_bit(module)]

    def token_scores(
        self, batch: Sequence[Encoded], direction: dict[int, Tensor], scales: Float[Tensor, "batch tensors"]
    ) -> list[Float[Tensor, " _"]]:
        """Return for each sample the scores of its tokens that carry loss: sum over l of scale_l <dL_i/dtheta_l, u_l>.

        `direction` has the tensors u_l by their numbers, of the parameters' shapes; those left out are zero.

        Raises:
            NoTangentError: an operation of the model has no forward mode.
        """
        lowered = _lowered(scales) if self.loaded.dtype == "float16" else None
        scales = scales if lowered is None else scales * lowered.unsqueeze(1)
        with _LEVEL, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), ExitStack() as hooks:
            for module in self._frozen:
                hooks.enter_context(_linear_in_its_input(module))
            called: set[int] = set()
            for module, rules in self._rules:
                active = [(number, rule) for number, rule in rules if number in direction]
                if active:
                    hooks.enter_context(_moving(module, active, direction, scales, called))
            try:
                found = batch_losses(self.loaded, batch)
                tangents = forward_ad.unpack_dual(found.losses).tangent
            except NotImplementedError as error:
                raise NoTangentError(str(error).split("\n")[0][:200]) from error
        moved = (scales != 0).any(0).tolist()
        for module, rules in self._rules:
            if any(number in direction and moved[number] and number not in called for number, _ in rules):
                raise NoTangentError(f"a {type(module).__name__} is multiplied by elsewhere")
        if tangents is None:
            raise NoTangentError("the loss does not depend on theta")
        tangents = tangents.detach() if lowered is None else tangents.detach() / lowered[found.rows]
        return list(tangents.split(found.counts.tolist()))


def _lowered(scales: Float[Tensor, "batch tensors"]) -> Float[Tensor, " batch"]:
    """Return what keeps the tangents of a sample that has been learned well, whose norms are small, in float16."""
    largest = scales.amax(1).clamp(min=1e-30)
    return torch.exp2((_LARGEST_SCALE - torch.log2(largest)).floor().clamp(max=0))


def _load_forward_rules() -> None:
    """Let torch load its forward rules, which it does when first asked, by means that it deprecates itself."""
    with _LEVEL, warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def _moving(
    module: torch.nn.Module,
    rules: list[tuple[int, TangentRule]],
    direction: dict[int, Tensor],
    scales: Tensor,
    called: set[int],
) -> Iterator[None]:
    """Add to the tangent of what a module writes what comes of its own parameters' directions; tell whose it was."""

    def hook(module: torch.nn.Module, reads: tuple[Any, ...], wrote: Any) -> Tensor:
        if not reads or not isinstance(wrote, Tensor) or not isinstance(reads[0], Tensor):
            raise NoTangentError(f"{type(module).__name__} is called in an unusual way")
        read = forward_ad.unpack_dual(reads[0]).primal if reads[0].is_floating_point() else reads[0]
        primal, tangent = forward_ad.unpack_dual(wrote)
        called.update(number for number, _ in rules)
        for number, rule in rules:
            moved = rule(module, read, direction[number].to(wrote.dtype)).float()
            # In single precision: a scale is one over a norm, which may be small.
            added = (moved * _by_sample(scales[:, number], wrote)).to(wrote.dtype)
            tangent = added if tangent is None else tangent + added
        assert tangent is not None
        return forward_ad.make_dual(primal, tangent.to(primal.dtype))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _by_sample(scales: Tensor, wrote: Tensor) -> Tensor:
    """Return a factor for each sample, to be multiplied with what begins with the batch, flattened or not."""
    if len(wrote) % len(scales):
        raise NoTangentError(f"a tensor of shape {tuple(wrote.shape)} does not begin with the batch of {len(scales)}")
    each = scales.repeat_interleave(len(wrote) // len(scales))
    return each.view(-1, *[1] * (wrote.dim() - 1))


@contextmanager
def _linear_in_its_input(module: Any) -> Iterator[None]:
    """Carry tangents through a frozen 4-bit layer, whose product has no forward mode, by a second product."""
    waiting: list[Tensor | None] = []

    def before(module: torch.nn.Module, reads: tuple[Any, ...]) -> tuple[Any, ...] | None:
        primal, tangent = forward_ad.unpack_dual(reads[0])
        waiting.append(tangent)
        return (primal, *reads[1:])

    def after(module: Any, reads: tuple[Any, ...], wrote: Tensor) -> Tensor | None:
        tangent = waiting.pop()
        if tangent is None:
            return None
        # Without the bias, which the layer adds within its product: rounded beside a large one, little is left.
        bias, module.bias = module.bias, None
        try:
            moved = module.forward(tangent.contiguous())
        finally:
            module.bias = bias
        return forward_ad.make_dual(wrote, moved.to(wrote.dtype))

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_four_bit(module: torch.nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes")
