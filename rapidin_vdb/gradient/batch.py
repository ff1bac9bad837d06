"""Per-sample gradients of a whole batch from one forward and one backward, handed on as backward reaches each layer."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient.checkpoint import checkpointed_layers
from rapidin_vdb.gradient.contribution import Contribution, Dense, NoRuleError, Rows
from rapidin_vdb.gradient.forward import OutputError, TokenLosses, batch_losses
from rapidin_vdb.gradient.head import OutputLayer, find_output_layer
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.precision import adapter_layers, tf32_products, tf32_rule
from rapidin_vdb.gradient.rules import Rule, dense_rows, held_modules, own_parameters, rule_for, summed_rows
from rapidin_vdb.records import Encoded

logger = logging.getLogger(__name__)

# Gradients of so many bytes are formed at a time; a larger tensor is done for fewer samples at once. On a CPU they stay
# in its last cache on their way to the sketch; a GPU's sketch takes eight samples at a time, if it can.
_CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 1 << 30}


@runtime_checkable
class Receiver(Protocol):
    """Takes per-sample gradients as they come; each tensor of theta comes once for every sample that it touches."""

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Take tensor `number` for the samples from `first` on, [samples, coordinates], in whatever type they come."""
        ...

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Take some rows of tensor `number` for one sample, [rows] and float32 [rows, columns]; all others are zero."""
        ...


class LateGradientError(ModelError):
    """A tensor's gradient was handed on before all of it had come."""


@dataclass(eq=False)
class _Pending:
    """What one backward pass has brought for one parameter so far."""

    expected: int = 0
    contributions: list[Contribution] = field(default_factory=list)


class BatchedGradients:
    """A model whose modules report what their parameters' gradients are made of."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Find the rule of every tensor of theta; those without one are announced, and done by autograd.

        On a GPU, float32 LoRA adapters of a base in 16 bits are computed under TF32 (`precision.adapter_layers`).
        """
        self.loaded = loaded
        self.unruled: dict[int, str] = {}
        """Why a tensor has no batched rule, by its number; `sample.stream_gradient` gives its gradients."""
        self.checkpointing = False
        """Whether layers are computed twice, so that their activations need not be kept."""
        self.output: OutputLayer | None = None
        """What computes the losses, once the first batch has come; None where logits are had from the model."""
        self._looked = False
        self._tf32_layers = adapter_layers(loaded)
        self._rules = self._find_rules()

    def _find_rules(self) -> list[tuple[torch.nn.Module, list[tuple[int, Rule]]]]:
        numbers = {id(tensor): number for number, tensor in enumerate(self.loaded.theta.values())}
        found: list[tuple[torch.nn.Module, list[tuple[int, Rule]]]] = []
        homes: set[int] = set()
        modules = list(self.loaded.model.modules())
        held = {id(part) for module in modules for part in held_modules(module)}
        for module in modules:
            rules = []
            for name, parameter in own_parameters(module) if id(module) not in held else ():
                number = numbers.get(id(parameter))
                if number is None:
                    continue
                homes.add(number)
                rule = rule_for(module, name)
                if rule is None:
                    self.give_up(number, f"{type(module).__name__} has no rule for {name}")
                else:
                    rules.append((number, tf32_rule(rule) if module in self._tf32_layers else rule))
            if rules:
                found.append((module, rules))
        for number in numbers.values():
            if number not in homes:
                self.give_up(number, "no module owns it")
        return found

    def give_up(self, number: int, reason: str) -> None:
        """Leave a tensor to autograd from now on, and say so once."""
        if number not in self.unruled:
            self.unruled[number] = reason
            name = list(self.loaded.theta)[number]
            logger.warning("%s: gradients one sample at a time, which is slower (%s)", name, reason)

    def give_up_all(self, reason: str) -> None:
        """Leave every tensor to autograd from now on, and say so once."""
        self.unruled |= {number: reason for number in range(len(self.loaded.theta)) if number not in self.unruled}
        logger.warning("%s: all gradients one sample at a time, which is slower (%s)", self.loaded.spec.model, reason)

    def look(self, sample: Encoded) -> None:
        """Find the model's output layer, if that has not been done."""
        if not self._looked:
            self.output = find_output_layer(self.loaded, sample.input_ids[:2])
            self._looked = True

    def stream(self, batch: Sequence[Encoded], receiver: Receiver) -> Tensor:
        """Hand the gradients of every ruled tensor to the receiver, and return each sample's loss, [batch].

        Raises:
            LateGradientError: the receiver was given a part of a gradient for the whole; its tensor is given up.
        """
        self.look(batch[0])
        run = _Run(self, len(batch), receiver)
        layers = checkpointed_layers(self.loaded.model, hooks=True) if self.checkpointing else nullcontext()
        products = tf32_products(self._tf32_layers)
        with self._frozen(), layers, products, run.hooked(self._rules), torch.enable_grad():
            losses = self._losses(batch, run).means()
            run.counting = False
            losses.sum().backward()
            run.finish()
        if run.late:
            names = list(self.loaded.theta)
            raise LateGradientError(
                f"{self.loaded.spec.model}: more of the gradient of {', '.join(names[number] for number in run.late)} "
                "came after it had been complete; --parameters can leave it out"
            )
        return losses.detach()

    def _losses(self, batch: Sequence[Encoded], run: "_Run") -> TokenLosses:
        try:
            return batch_losses(self.loaded, batch, output=self.output)
        except OutputError as reason:
            self.leave_output_layer(str(reason))
        run.pending.clear()  # of calls that have no backward
        return batch_losses(self.loaded, batch)

    @contextmanager
    def without_output_layer(self) -> Iterator[None]:
        """Take all logits from the model itself for as long as the block lasts."""
        output, self.output = self.output, None
        try:
            yield
        finally:
            self.output = output

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Compute losses and adapters as the model itself does for as long as the block lasts."""
        layers, self._tf32_layers = self._tf32_layers, []
        try:
            with self.without_output_layer():
                yield
        finally:
            self._tf32_layers = layers

    def leave_output_layer(self, reason: str) -> None:
        """Take all logits from the model itself from now on, and say so."""
        self.output = None
        name = self.loaded.spec.model
        logger.warning("%s: logits are held for a whole batch, which takes more memory (%s)", name, reason)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Let no parameter ask for a gradient of its own: only what flows between the layers is computed."""
        asking = [tensor for tensor in self.loaded.theta.values() if tensor.requires_grad]
        for tensor in asking:
            tensor.requires_grad_(False)
        try:
            yield
        finally:
            for tensor in asking:
                tensor.requires_grad_(True)


class _Run:
    """One forward and backward: the hooks, and what they have gathered."""

    def __init__(self, gradients: BatchedGradients, batch: int, receiver: Receiver) -> None:
        self.gradients = gradients
        self.batch = batch
        self.receiver = receiver
        self.pending: dict[int, _Pending] = {}
        self.theta = list(gradients.loaded.theta.values())
        self.counting = True
        """Whether calls of modules are told for the first time; in backward, checkpointed layers repeat theirs."""
        self.late: list[int] = []
        """Tensors of which more came when all had been handed over."""

    @contextmanager
    def hooked(self, modules: list[tuple[torch.nn.Module, list[tuple[int, Rule]]]]) -> Iterator[None]:
        """Watch the modules for as long as the block lasts."""
        # Gradients have to flow down to the first layer, though no parameter asks for any.
        embeddings = self.gradients.loaded.model.get_input_embeddings()
        # A copy, for some models go on to multiply it in place; and before other hooks see it.
        handles = [
            embeddings.register_forward_hook(
                lambda module, read, wrote: wrote.requires_grad_(True).clone(), prepend=True
            )
        ]
        handles += [module.register_forward_hook(self._watch(rules)) for module, rules in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, rules: list[tuple[int, Rule]]) -> Callable[[torch.nn.Module, tuple[Any, ...], Any], None]:
        def forward(module: torch.nn.Module, read: tuple[Any, ...], wrote: Any) -> None:
            active = [(number, rule) for number, rule in rules if number not in self.gradients.unruled]
            if isinstance(wrote, tuple) and wrote:
                wrote = wrote[0]  # a router of experts: its linear layer's output, then what it chose
            if not isinstance(wrote, Tensor) or not read:
                for number, _ in active:
                    self.gradients.give_up(number, f"{type(module).__name__} is called in an unusual way")
                return
            keeps = torch.is_grad_enabled()
            if keeps and not wrote.requires_grad:
                # Not of an adapter that measures its own matrices, as DoRA's.
                looked_up = isinstance(module, torch.nn.Embedding) or not torch.is_floating_point(read[0])
                if not wrote.is_leaf or not active or not looked_up:
                    return
                wrote.requires_grad_(True)  # a further embedding, as of positions
            if self.counting:
                # Before any backward, all calls of a module that several layers share.
                for number, _ in active:
                    self.pending.setdefault(number, _Pending()).expected += 1
            if not keeps:
                return  # the first pass through a checkpointed layer; the second is the one that has a backward
            # Let go of as backward comes by, for the hook itself stays until all of backward is over. Checkpointed, it
            # is over with the layer, and may come by again.
            kept = [tuple(part.detach() if isinstance(part, Tensor) else part for part in read)]

            def backward(delta: Tensor) -> None:
                sources = kept[0] if self.gradients.checkpointing else kept.pop()
                for number, rule in active:
                    self._take(number, rule, module, sources, delta.detach())

            if active:
                wrote.register_hook(backward)

        return forward

    def _take(self, number: int, rule: Rule, module: torch.nn.Module, sources: tuple[Any, ...], delta: Tensor) -> None:
        try:
            contribution = rule(module, sources, delta, self.batch)
        except NoRuleError as reason:
            self.gradients.give_up(number, str(reason))
            return
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
            for further in contributions[1:]:
                grads = grads.float().add_(self._formed(number, further, samples))
            self.receiver.dense(number, first, grads.flatten(1))

    def _chunk(self, number: int, contributions: int) -> int:
        """Return for how many samples at once the gradient of a tensor is formed."""
        kind, tensor = self.gradients.loaded.device.split(":")[0], self.theta[number]
        # Several are summed in float32, and a CPU's sketch takes nothing else.
        size = 4 if kind == "cpu" or contributions > 1 else tensor.element_size()
        return max(1, _CHUNK_BYTES[kind] // (size * tensor.numel()))

    def _formed(self, number: int, part: Contribution, samples: slice) -> Tensor:
        return part.form(samples) if isinstance(part, Dense) else dense_rows(part, samples, len(self.theta[number]))
