"""Gradient checkpointing: a layer's activations are computed again in backward instead of being kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed_layers(model: Any, *, hooks: bool) -> Iterator[None]:
    """Checkpoint every decoder layer for as long as the block lasts.

    Not by the model's own switch, which only works in training mode, where dropout would be at work too. With `hooks`,
    in the reentrant kind: hooks of modules see the second pass through a layer with its backward, as if it were the
    only one. It brings the gradient of a parameter that layers share in parts, and none at all where the first layer's
    input asks for none; so without hooks, where parameters ask for their own, it is the other kind.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = _twice(layer.forward, reentrant=hooks)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes to light again


def _twice(forward: Callable[..., Any], *, reentrant: bool) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)  # a layer within one that keeps nothing as yet
        named = {name: value for name, value in options.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in options.items() if name not in named}
        if any(_holds_gradients(value) for value in (*arguments, *others.values()) if not isinstance(value, Tensor)):
            return forward(*arguments, **options)

        def again(*given: Any) -> Any:
            return forward(*given[: len(arguments)], **dict(zip(named, given[len(arguments) :], strict=True)), **others)

        # Every tensor is handed in: through one that is only seen from inside, a layer's backward would go on to what
        # made it, once for each layer.
        return checkpoint(again, *arguments, *named.values(), use_reentrant=reentrant)

    run.for_first_run = True  # type: ignore[attr-defined]  # see `repeated`
    return run


def _holds_gradients(value: Any) -> bool:
    """Return whether a tensor in some tuples, lists and dictionaries asks for a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(_holds_gradients, value.values()))
    return isinstance(value, tuple | list) and any(map(_holds_gradients, value))
