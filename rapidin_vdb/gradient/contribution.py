"""What a call of a module adds to the gradients of its parameter, for each sample of a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class Call:
    """What a module was given in the forward pass of a batch."""

    read: tuple[Any, ...]
    """Its positional arguments."""
    named: dict[str, Any]
    """The others."""
    wrote: Tensor | None = None
    """What it returned, or the first of it, where its rules ask for that."""
    made: "tuple[Tensor, dict[str, Tensor] | NoRuleError] | None" = None
    """What its rules share: a gradient of what it wrote, and those of its parameters that follow, or why none do."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Gradients of some samples of a batch, made when asked for."""

    form: Callable[[slice], Tensor]
    """Which samples -> [samples, *shape of the parameter]."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Gradient rows of an embedding, for the tokens that a batch holds; all other rows are zero."""

    ids: Tensor
    """Row of each token, [batch, tokens]; -1 for one that gives no gradient."""
    delta: Tensor
    """Gradient of each token's row, [batch, tokens, columns]."""


Contribution = Dense | Rows


class NoRuleError(Exception):
    """A module was called in a way that no rule covers; its parameters fall back to autograd."""


def ids_of(read: Tensor, delta: Tensor, batch: int) -> Tensor:
    """Return the ids that an embedding was given, [batch, tokens].

    Raises:
        NoRuleError: they, or what comes back to it, are not one row a sample.
    """
    if read.dim() != 2 or read.shape[0] != batch or delta.shape[0] != batch:
        raise NoRuleError(f"an embedding of ids of shape {tuple(read.shape)}, for a batch of {batch}")
    return read


def tokens_of(tensor: Tensor, batch: int) -> Tensor:
    """Return a tensor as [batch, tokens, columns]; some models flatten the first two for their linear layers."""
    if tensor.dim() >= 3 and tensor.shape[0] == batch:
        return tensor.flatten(1, -2)
    if tensor.dim() == 2 and tensor.shape[0] % batch == 0:
        return tensor.unflatten(0, (batch, -1))
    raise NoRuleError(f"a tensor of shape {tuple(tensor.shape)} does not begin with the batch of {batch}")
