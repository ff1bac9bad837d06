"""Per-sample gradients of a whole batch from one forward and one backward, handed on as backward reaches each layer."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient.checkpoint import checkpointed_layers
from rapidin_vdb.gradient.forward import OutputError, TokenLosses, batch_losses
from rapidin_vdb.gradient.head import OutputLayer, find_output_layer
from rapidin_vdb.gradient.hooks import Run, Watched
from rapidin_vdb.gradient.loss_scale import Unscaled
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.parameters import without_part
from rapidin_vdb.gradient.precision import adapter_layers, tf32_products, tf32_rule
from rapidin_vdb.gradient.receivers import Receiver
from rapidin_vdb.gradient.repeated import Repeated, only_read, repeating_module
from rapidin_vdb.gradient.rules import held_modules, own_parameters, rule_for
from rapidin_vdb.records import Encoded

logger = logging.getLogger(__name__)


class LateGradientError(ModelError):
    """A tensor's gradient was handed on before all of it had come."""


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

    def _find_rules(self) -> list[Watched]:
        model = self.loaded.model
        numbers = {id(tensor): number for number, tensor in enumerate(self.loaded.theta.values())}
        self._leave_out(numbers)
        found: list[Watched] = []
        homes: Counter[int] = Counter()
        left: list[tuple[int, str, str]] = []
        modules = list(model.modules())
        held = {id(part) for module in modules for part in held_modules(module)}
        never_called = {id(part) for module in modules for part in only_read(module)}
        for owner, module in model.named_modules():
            rules = []
            for name, parameter in own_parameters(module) if id(module) not in held else ():
                number = numbers.get(id(parameter))
                if number is None:
                    continue
                homes[number] += 1
                rule = rule_for(module, name) if id(module) not in never_called else None
                if rule is None:
                    left.append((number, owner, name))
                else:
                    rules.append((number, tf32_rule(rule) if module in self._tf32_layers else rule))
            if rules:
                found.append(Watched(module, rules))
        for number in numbers.values():
            if number not in homes:
                self.give_up(number, "no module owns it")
        for number, owner, name in left:
            if homes[number] > 1:
                self.give_up(number, f"{type(model.get_submodule(owner)).__name__} has no rule for {name}")
        return found + self._find_repeated([one for one in left if one[0] not in self.unruled])

    def _leave_out(self, numbers: dict[int, int]) -> None:
        """Take from the numbers of tensors, by their ids, those that no text has a part in, and say so once."""
        apart = without_part(self.loaded.inner)
        if idle := [one for one in numbers if one in apart]:
            parts = ", ".join(dict.fromkeys(apart[one] for one in idle))
            name = self.loaded.spec.model
            logger.warning("%s: %d tensors have no part in a text's loss, and no gradient (%s)", name, len(idle), parts)
        for one in idle:
            del numbers[one]

    def _find_repeated(self, left: list[tuple[int, str, str]]) -> list[Watched]:
        """Return the modules that are repeated for tensors without a rule: of each number, owner, and name there."""
        model, theta = self.loaded.model, list(self.loaded.theta.values())
        places: dict[str, dict[str, int]] = {}
        for number, owner, name in left:
            place = repeating_module(model, owner, theta[number])
            if place is None:
                self.give_up(number, f"{type(model.get_submodule(owner)).__name__} has no rule for {name}")
            else:
                inner = f"{owner}.{name}".removeprefix(f"{place}.")
                places.setdefault(place, {})[inner] = number
        found, told = [], set[str]()
        for place, names in places.items():
            repeated = Repeated(list(names), told=told)
            rules = [(number, repeated.rule(name)) for name, number in names.items()]
            found.append(Watched(model.get_submodule(place), rules, again=True))
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
        run = Run(self, len(batch), receiver)
        layers = checkpointed_layers(self.loaded.model, hooks=True) if self.checkpointing else nullcontext()
        products = tf32_products(self._tf32_layers)
        with self._frozen(), layers, products, run.hooked(self._rules), torch.enable_grad():
            found = self._losses(batch, run)
            losses, scales = found.means(), found.scales(self.loaded.dtype)
            run.counting = False
            for watched in self._rules:
                if watched.again and watched.module not in run.called:
                    for number, _ in watched.rules:
                        self.give_up(number, f"{type(watched.module).__name__} is not called")
            if scales is not None:
                run.receiver = Unscaled(receiver, scales)
            (losses if scales is None else losses * scales).sum().backward()
            run.finish()
        if run.late:
            names = list(self.loaded.theta)
            raise LateGradientError(
                f"{self.loaded.spec.model}: more of the gradient of {', '.join(names[number] for number in run.late)} "
                "came after it had been complete; --parameters can leave it out"
            )
        return losses.detach()

    def _losses(self, batch: Sequence[Encoded], run: Run) -> TokenLosses:
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
