"""Per-sample gradients of parameters without a rule of their own, from repeating nothing but the module they are in.

As of a state space model's decay and convolution, or attention's sinks: what they do to the module's output is known to
the module alone. When the gradient of its output has come, it runs again on what it read, each sample with parameters
of its own, all at once (`torch.func.vmap`) or, where it does not bear that, one after the other; one backward through
that gives their gradients. The rest of the model runs once.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from rapidin_vdb.gradient.contribution import Call, Contribution, Dense, NoRuleError
from rapidin_vdb.gradient.memory import is_out_of_memory

logger = logging.getLogger(__name__)

# How far what a module writes may be from what it wrote the first time, relative to its norm: it is the same arithmetic
# but for the shapes of products, whereas another input, or a state that it keeps, would change it throughout.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_OF_HALF = 0.05
# Parameters of so many bytes are given to samples at a time.
_PARAMETER_BYTES = 256 << 20
# All samples' gradients of a parameter are held at once, until they are handed over: it may have so many numbers.
_LARGEST = 1 << 20

_Gradients = dict[str, Tensor]
"""By the parameter's name within the module, [batch, *shape]."""


def only_read(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield linear layers of a module that it multiplies by without calling them: Mamba's, of its steps' sizes."""
    steps = getattr(module, "dt_proj", None)
    if isinstance(getattr(module, "A_log", None), torch.nn.Parameter) and isinstance(steps, torch.nn.Linear):
        yield steps


def repeating_module(model: torch.nn.Module, owner: str, parameter: Tensor) -> str | None:
    """Return the name of the module that is to be repeated for a parameter of `owner`; None where none is.

    One without modules of its own is repeated with what it stands in: a convolution may be read instead of called, and
    a norm may be given all samples' tokens in one row. Each sample has the parameter's gradient, so it should not be
    large, and what embeds is too much of the model.
    """
    if parameter.numel() > _LARGEST:
        return None
    containers = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.ParameterList)
    if not any(True for _ in model.get_submodule(owner).children()):
        owner = owner.rpartition(".")[0]
    while isinstance(model.get_submodule(owner), containers):
        owner = owner.rpartition(".")[0]  # which nobody calls
    parts = model.get_submodule(owner).modules()
    return None if not owner or any(isinstance(part, torch.nn.Embedding) for part in parts) else owner


class Repeated:
    """A module that is repeated for some of the parameters within."""

    def __init__(self, names: Sequence[str], *, told: set[str]) -> None:
        """Name the parameters, as they are called within the module; `told` is what has been said of others."""
        self._names = names
        self._told = told
        self._one_by_one = False

    def rule(self, name: str) -> Callable[[torch.nn.Module, Call, Tensor, int], Contribution]:
        """Return the rule of one of the parameters; for each call, the module is repeated once for all of them."""

        def apply(module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> Contribution:
            if call.made is None or call.made[0] is not delta:
                try:
                    call.made = delta, self._made(module, call, delta, batch)
                except NoRuleError as reason:
                    call.made = delta, reason
            made = call.made[1]
            if isinstance(made, NoRuleError):
                raise made
            found = made[name]
            return Dense(lambda samples: found[samples])

        return apply

    def _made(self, module: torch.nn.Module, call: Call, delta: Tensor, batch: int) -> _Gradients:
        """Return the gradients of all samples.

        Raises:
            NoRuleError: the module cannot be repeated, or does not write the same again.
        """
        if delta.dim() < 2 or len(delta) != batch:
            raise NoRuleError(f"{type(module).__name__} writes {tuple(delta.shape)} for a batch of {batch}")
        parameters = {name: module.get_parameter(name).detach() for name in self._names}
        size = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
        most = max(1, _PARAMETER_BYTES // max(size, 1))
        inputs = _inputs(call, batch)
        made = {name: tensor.new_empty(batch, *tensor.shape) for name, tensor in parameters.items()}
        with _left_as_it_was(module), torch.enable_grad():
            for first in range(0, batch, most):
                samples = slice(first, min(first + most, batch))
                for name, grads in self._some(module, parameters, inputs.of(samples), delta[samples]).items():
                    made[name][samples] = grads
        return made

    def _some(
        self, module: torch.nn.Module, parameters: dict[str, Tensor], inputs: "_Inputs", delta: Tensor
    ) -> _Gradients:
        if not self._one_by_one and len(delta) > 1:
            try:
                return _gradients(module, parameters, inputs, delta)
            except NoRuleError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # Whatever the module's code is: it asks for a number, say, or is a kernel's.
                self._one_by_one = True
                what = f"{type(module).__name__}: repeated one sample at a time for the gradients of "
                what += ", ".join(self._names)
                if what not in self._told:
                    self._told.add(what)
                    logger.warning("%s, which is slower (%s)", what, str(error).partition("\n")[0])
        try:
            each = [
                _gradients(module, parameters, inputs.of(slice(number, number + 1)), delta[number : number + 1])
                for number in range(len(delta))
            ]
        except NoRuleError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise NoRuleError(f"{type(module).__name__} cannot be repeated: {error}") from error
        return {name: torch.cat([one[name] for one in each]) for name in parameters}


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What some samples' part of a call read and wrote."""

    read: tuple[Any, ...]
    named: dict[str, Any]
    wrote: Tensor
    own: list[Tensor]
    """Those of the tensors among the arguments of which each sample has a part, [samples, ...]."""

    def of(self, samples: slice) -> "_Inputs":
        """Return those of some samples."""
        own = [tensor[samples] for tensor in self.own]
        return _Inputs(*self.given(own), self.wrote[samples], own)

    def given(self, own: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments with others in the place of `own`."""
        others = {id(tensor): other for tensor, other in zip(self.own, own, strict=True)}
        args, named = _changed((self.read, self.named), lambda tensor: others.get(id(tensor), tensor))
        return args, named


def _inputs(call: Call, batch: int) -> _Inputs:
    own: dict[int, Tensor] = {}

    def tell(tensor: Tensor) -> Tensor:
        # A matrix of numbers may be a table of positions, and one of integers or truth values tells tokens apart. Where
        # this is wrong, the module does not write the same again.
        if len(tensor.shape) > (1 if not tensor.is_floating_point() else 2) and len(tensor) == batch:
            own[id(tensor)] = tensor
        return tensor

    _changed((call.read, call.named), tell)
    assert call.wrote is not None
    return _Inputs(call.read, call.named, call.wrote, list(own.values()))


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments with every tensor changed.

    Raises:
        NoRuleError: they hold something that may keep a state.
    """
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_changed(part, change) for part in value)
    if isinstance(value, dict):
        return {name: _changed(part, change) for name, part in value.items()}
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise NoRuleError(f"a module that is given a {type(value).__name__}")


def _gradients(module: torch.nn.Module, parameters: dict[str, Tensor], inputs: _Inputs, delta: Tensor) -> _Gradients:
    """Run the module again on some samples, each with parameters of its own, and return their gradients.

    Raises:
        NoRuleError: it does not write what it wrote.
    """

    def one(parameters: dict[str, Tensor], *parts: Tensor) -> Tensor:
        wrote = functional_call(module, parameters, *inputs.given([part.unsqueeze(0) for part in parts]))
        first: Tensor = wrote[0] if isinstance(wrote, tuple) else wrote
        return first.squeeze(0)

    own = {name: tensor.repeat(len(delta), *[1] * tensor.dim()).requires_grad_() for name, tensor in parameters.items()}
    if len(delta) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of operations that it does one after the other
            wrote = vmap(one)(own, *inputs.own)
    else:
        wrote = one({name: tensor[0] for name, tensor in own.items()}, *(part[0] for part in inputs.own)).unsqueeze(0)
    if not _the_same(wrote.detach(), inputs.wrote):
        raise NoRuleError(f"{type(module).__name__} does not write the same when it is repeated")
    if not wrote.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    grads = torch.autograd.grad(wrote, list(own.values()), delta, allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(own.items(), grads, strict=True)
    }


def _the_same(wrote: Tensor, before: Tensor) -> bool:
    if wrote.shape != before.shape:
        return False
    tolerance = _TOLERANCE.get(before.dtype, _TOLERANCE_OF_HALF)
    # A sample that is not finite has no gradient anyway, and says nothing of the others.
    difference, before = (tensor.float().nan_to_num(0.0, 0.0, 0.0) for tensor in (wrote - before, before))
    return bool(difference.norm() <= tolerance * before.norm())


@contextmanager
def _left_as_it_was(module: torch.nn.Module) -> Iterator[None]:
    """Take back what the block makes the module remember: some keep the states they have come to.

    In the block it computes without what only its first run needs, as checkpoints.
    """
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    for part, attributes, _ in before:
        if getattr(attributes.get("forward"), "for_first_run", False):
            del part.forward
    try:
        yield
    finally:
        for part, attributes, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)
