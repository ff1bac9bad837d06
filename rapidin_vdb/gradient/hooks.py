"""The hooks of one forward and one backward, and what they gather until it can be handed on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rapidin_vdb.gradient.contribution import Call, Contribution, Dense, NoRuleError, Rows
from rapidin_vdb.gradient.receivers import Receiver
from rapidin_vdb.gradient.rules import Rule, dense_rows, summed_rows

if TYPE_CHECKING:
    from rapidin_vdb.gradient.batch import BatchedGradients

# Gradients of so many bytes are formed at a time; a larger tensor is done for fewer samples at once. On a CPU they stay
# in its last cache on their way to the sketch; a GPU's sketch takes eight samples at a time, if it can.
_CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 1 << 30}


@dataclass(eq=False)
class Pending:
    """What one backward pass has brought for one parameter so far."""

    expected: int = 0
    contributions: list[Contribution] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Watched:
    """A module, and the rules of the tensors of theta, by their numbers, that its calls tell about."""

    module: torch.nn.Module
    rules: list[tuple[int, Rule]]
    again: bool = False
    """Whether it is repeated, and its output therefore kept to compare."""


class Run:
    """One forward and backward: the hooks, and what they have gathered."""

    def __init__(self, gradients: "BatchedGradients", batch: int, receiver: Receiver) -> None:
        self.gradients = gradients
        self.batch = batch
        self.receiver = receiver
        self.pending: dict[int, Pending] = {}
        self.theta = list(gradients.loaded.theta.values())
        self.counting = True
        """Whether calls of modules are told for the first time; in backward, checkpointed layers repeat theirs."""
        self.called: set[torch.nn.Module] = set()
        """Those of the watched modules that were called."""
        self.ruling = False
        """Whether it is a rule that calls modules."""
        self.late: list[int] = []
        """Tensors of which more came when all had been handed over."""

    @contextmanager
    def hooked(self, modules: list[Watched]) -> Iterator[None]:
        """Watch the modules for as long as the block lasts."""
        # Gradients have to flow down to the first layer, though no parameter asks for any.
        embeddings = self.gradients.loaded.model.get_input_embeddings()
        # A copy, for some models go on to multiply it in place; and before other hooks see it.
        handles = [
            embeddings.register_forward_hook(
                lambda module, read, wrote: wrote.requires_grad_(True).clone(), prepend=True
            )
        ]
        handles += [one.module.register_forward_hook(self._watch(one), with_kwargs=True) for one in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, watched: Watched) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def forward(module: torch.nn.Module, read: tuple[Any, ...], named: dict[str, Any], wrote: Any) -> None:
            if self.ruling:
                return
            self.called.add(module)
            active = [(number, rule) for number, rule in watched.rules if number not in self.gradients.unruled]
            if isinstance(wrote, tuple) and wrote:
                wrote = wrote[0]  # a router of experts: its linear layer's output, then what it chose
            if not isinstance(wrote, Tensor) or not (read or watched.again):
                for number, _ in active:
                    self.gradients.give_up(number, f"{type(module).__name__} is called in an unusual way")
                return
            keeps = torch.is_grad_enabled()
            if keeps and not wrote.requires_grad:
                # Not of an adapter that measures its own matrices, as DoRA's.
                whole = read and isinstance(read[0], Tensor) and not read[0].is_floating_point()
                looked_up = isinstance(module, torch.nn.Embedding) or whole
                if not wrote.is_leaf or not active or not looked_up:
                    return
                wrote.requires_grad_(True)  # a further embedding, as of positions
            if self.counting:
                # Before any backward, all calls of a module that several layers share.
                for number, _ in active:
                    self.pending.setdefault(number, Pending()).expected += 1
            if not keeps:
                return  # the first pass through a checkpointed layer; the second is the one that has a backward
            # Let go of as backward comes by, for the hook itself stays until all of backward is over. Checkpointed, it
            # is over with the layer, and may come by again.
            call = Call(tuple(map(_detached, read)), {name: _detached(value) for name, value in named.items()})
            call.wrote = wrote.detach() if watched.again else None
            kept = [call]

            def backward(delta: Tensor) -> None:
                call, delta = kept[0] if self.gradients.checkpointing else kept.pop(), delta.detach()
                for number, rule in active:
                    self._take(number, rule, module, call, delta)

            if active:
                wrote.register_hook(backward)

        return forward

    def _take(self, number: int, rule: Rule, module: torch.nn.Module, call: Call, delta: Tensor) -> None:
        self.ruling = True
        try:
            contribution = rule(module, call, delta, self.batch)
        except NoRuleError as reason:
            self.gradients.give_up(number, str(reason))
            return
        finally:
            self.ruling = False
        pending = self.pending.get(number)
        if pending is None:
            if number not in self.late:
                self.late.append(number)
                self.gradients.give_up(number, "more of its gradient comes after it is complete")
            return
        pending.contributions.append(contribution)
        if len(pending.contributions) == pending.expected:
            self._hand_over(number, self.pending.pop(number).contributions)

    def finish(self) -> None:
        """Hand over what was called more often than the loss depends on."""
        for number in list(self.pending):
            contributions = self.pending.pop(number).contributions
            if contributions:
                self._hand_over(number, contributions)

    def _hand_over(self, number: int, contributions: list[Contribution]) -> None:
        if number in self.gradients.unruled:
            return
        if len(contributions) == 1 and isinstance(contributions[0], Rows):
            for sample, (ids, grads) in enumerate(summed_rows(contributions[0], len(self.theta[number]))):
                if len(ids):
                    self.receiver.rows(number, sample, ids, grads)
            return
        chunk = self._chunk(number, len(contributions))
        for first in range(0, self.batch, chunk):
            samples = slice(first, min(first + chunk, self.batch))
            grads = self._formed(number, contributions[0], samples)
            if grads[0].numel() != self.theta[number].numel():
                self.gradients.give_up(number, f"its rule makes gradients of shape {tuple(grads.shape[1:])}")
                return
            for further in contributions[1:]:
                grads = grads.float().add_(self._formed(number, further, samples))
            self.receiver.dense(number, first, grads.flatten(1))

    def _chunk(self, number: int, contributions: int) -> int:
        """Return for how many samples at once the gradient of a tensor is formed."""
        kind, tensor = self.gradients.loaded.device.split(":")[0], self.theta[number]
        # Several are summed in float32, loss scaling is divided out there, and a CPU's sketch takes nothing else.
        wide = kind == "cpu" or contributions > 1 or tensor.dtype == torch.float16
        size = 4 if wide else tensor.element_size()
        return max(1, _CHUNK_BYTES[kind] // (size * tensor.numel()))

    def _formed(self, number: int, part: Contribution, samples: slice) -> Tensor:
        return part.form(samples) if isinstance(part, Dense) else dense_rows(part, samples, len(self.theta[number]))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
