"""Some rows of an embedding trained apart from the others (PEFT's `trainable_token_indices`), also where it is tied."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.gradient.contribution import Call, Contribution, Dense, NoRuleError, Rows, ids_of, tokens_of

ROWS = "trainable_tokens_delta"


def trains_tokens(module: torch.nn.Module) -> bool:
    """Say whether a module is PEFT's embedding, or output layer, with rows of its own."""
    return isinstance(getattr(module, ROWS, None), torch.nn.ParameterDict) and hasattr(module, "token_indices")


def trained_rows(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names and rows, [tokens, columns], of its adapters, and what they stand in; see `trains_tokens`."""
    for adapter, rows in module.get_submodule(ROWS).named_parameters():
        yield f"{ROWS}.{adapter}", rows
    # The module itself multiplies by it, and calls nobody who would report that.
    for name, parameter in module.get_submodule("base_layer").named_parameters(recurse=False):
        yield f"base_layer.{name}", parameter


def held_by(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the modules whose parameters `trained_rows` yields."""
    return module.get_submodule(ROWS), module.get_submodule("base_layer")


def rows_rule(name: str) -> Callable[[Any, Call, Tensor, int], Contribution] | None:
    """Return the rule for the rows of an adapter, by their name: they stand in the place of the embedding's own."""
    kind, _, adapter = name.partition(".")
    if kind != ROWS:
        return None

    def rule(module: Any, call: Call, delta: Tensor, batch: int) -> Contribution:
        base, places = module.get_base_layer(), module.token_indices[adapter]
        active = [name for name in module.active_adapters if name in module.token_indices]
        if active != [adapter] or module.merged or module.disable_adapters or len({*places}) < len(places):
            raise NoRuleError("trained tokens that are not those of one adapter, each once")
        trained = torch.as_tensor(places, device=delta.device)
        if isinstance(base, torch.nn.Embedding):
            return _looked_up(base, trained, call.read[0], delta, batch)
        if isinstance(base, torch.nn.Linear):
            # Of all the logits' derivatives no more is kept, until the embedding's part has come at last.
            read, delta = tokens_of(call.read[0], batch), tokens_of(delta, batch)[..., trained]
            return Dense(lambda samples: torch.bmm(delta[samples].transpose(1, 2), read[samples].to(delta)))
        raise NoRuleError(f"trained tokens of a {type(base).__name__}")

    return rule


def _looked_up(base: torch.nn.Embedding, trained: Tensor, ids: Tensor, delta: Tensor, batch: int) -> Rows:
    if base.max_norm is not None or base.scale_grad_by_freq:
        raise NoRuleError("an embedding that scales its rows, or their gradients")
    places = torch.full((base.num_embeddings,), -1, device=ids.device)
    places[trained] = torch.arange(len(trained), device=ids.device)
    if base.padding_idx is not None:
        places[base.padding_idx] = -1
    scale = getattr(base, "embed_scale", None)
    return Rows(places[ids_of(ids, delta, batch)], delta if scale is None else delta * scale)
