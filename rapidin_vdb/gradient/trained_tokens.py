"""Some rows of an embedding trained apart from the others (PEFT's `trainable_token_indices`), also where it is tied."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.gradient.contribution import Contribution, Dense, NoRuleError, Rows, tokens_of

ROWS = "trainable_tokens_delta"


def trains_tokens(module: torch.nn.Module) -> bool:
    """Say whether a module is PEFT's embedding, or output layer, with rows of its own."""
    return isinstance(getattr(module, ROWS, None), torch.nn.ParameterDict) and hasattr(module, "token_indices")


def trained_rows(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names and rows, [tokens, columns], of its adapters; see `trains_tokens`."""
    for adapter, rows in module.get_submodule(ROWS).named_parameters():
        yield f"{ROWS}.{adapter}", rows


def rows_rule(module: Any, reads: tuple[Any, ...], delta: Tensor, batch: int) -> Contribution:
    """Return what a call adds to the gradients of these rows, which stand in the place of the embedding's own.

    Raises:
        NoRuleError: they are merged, left out or of several adapters, or the module is of another kind.
    """
    base, active = module.get_base_layer(), [name for name in module.active_adapters if name in module.token_indices]
    if len(active) != 1 or module.merged or module.disable_adapters:
        raise NoRuleError("trained tokens that are not those of one adapter")
    trained = torch.as_tensor(module.token_indices[active[0]], device=delta.device)
    if isinstance(base, torch.nn.Embedding):
        return _looked_up(base, trained, reads[0], delta, batch)
    if isinstance(base, torch.nn.Linear):
        read, delta = tokens_of(reads[0], batch), tokens_of(delta, batch)
        return Dense(lambda samples: torch.bmm(delta[samples][..., trained].transpose(1, 2), read[samples].to(delta)))
    raise NoRuleError(f"trained tokens of a {type(base).__name__}")


def _looked_up(base: torch.nn.Embedding, trained: Tensor, ids: Tensor, delta: Tensor, batch: int) -> Rows:
    if ids.dim() != 2 or ids.shape[0] != batch or delta.shape[0] != batch or base.max_norm is not None:
        raise NoRuleError(f"an embedding of ids of shape {tuple(ids.shape)}, for a batch of {batch}")
    places = torch.full((base.num_embeddings,), -1, device=ids.device)
    places[trained] = torch.arange(len(trained), device=ids.device)
    if base.padding_idx is not None:
        places[base.padding_idx] = -1
    scale = getattr(base, "embed_scale", None)
    return Rows(places[ids], delta if scale is None else delta * scale)
