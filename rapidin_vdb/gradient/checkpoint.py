"""Gradient checkpointing: a layer's activations are computed again in backward instead of being kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed_layers(model: Any) -> Iterator[None]:
    """Checkpoint every decoder layer for as long as the block lasts.

    Not by the model's own switch, which only works in training mode, where dropout would be at work too. In the
    reentrant kind, hooks see the second pass through a layer with its backward, as if it were the only one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = _twice(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes to light again


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        # Only what flows from layer to layer needs a gradient.
        return checkpoint(lambda inner: forward(inner, *arguments, **options), hidden, use_reentrant=True)

    return run
