"""A batch of samples through the model, up to the loss at each token."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient.cross_entropy import cross_entropy
from rapidin_vdb.gradient.head import OutputLayer, is_untouched
from rapidin_vdb.gradient.loss_scale import loss_scales
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.records import Encoded

_MOST = 0.75
"""Share of the logits from which all are taken."""


class OutputError(ModelError):
    """A model goes on computing with what its output layer wrote, after all."""


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """The losses of a batch, token by token, those of a sample next to one another."""

    losses: Tensor
    """Cross-entropy at each token that carries loss, in nats, [tokens]."""
    rows: Tensor
    """Which sample of the batch each belongs to, [tokens]."""
    counts: Tensor
    """How many each sample has, [batch]."""

    def means(self) -> Tensor:
        """Return each sample's loss, [batch]."""
        shares = self.losses / self.counts[self.rows]
        return torch.zeros(len(self.counts), device=self.losses.device).index_add(0, self.rows, shares)

    def scales(self, dtype: str) -> Tensor | None:
        """Return what each sample's loss is multiplied by for a model of that type, [batch]; None for nothing."""
        return loss_scales(self.losses, self.rows, self.counts) if dtype == "float16" else None


def batch_losses(loaded: LoadedModel, batch: Sequence[Encoded], *, output: OutputLayer | None = None) -> TokenLosses:
    """Run a batch through the model, and return the loss at each token that carries one.

    Samples are padded on the right without an attention mask: in a causal model no token sees what follows it, and what
    a padding token computes reaches no loss. With the model's output layer, logits are computed at tokens with a loss
    alone, a few hundred at a time.

    Raises:
        OutputError: the output layer was given, and is not the last thing that the model computes.
        ModelError: the model gives other logits than it was asked for.
    """
    longest = max(len(sample.input_ids) for sample in batch)
    # Padded with the sample's own last token: a padding token would make some models look for a mask.
    padded = [list(sample.input_ids) + [sample.input_ids[-1]] * (longest - len(sample.input_ids)) for sample in batch]
    ids = torch.tensor(padded, device=loaded.device)
    counts = torch.tensor([len(sample.loss_tokens) for sample in batch])
    rows = torch.arange(len(batch)).repeat_interleave(counts).to(loaded.device)
    counts = counts.to(loaded.device)
    places = torch.tensor([place for sample in batch for place in sample.loss_places], device=loaded.device)
    known = inspect.signature(loaded.inner.forward).parameters
    options: dict[str, Any] = {}
    first = 0
    if "logits_to_keep" in known:
        # Logits are only needed from the first token that predicts one with a loss.
        first = min(sample.loss_places[0] for sample in batch) - 1
        options["logits_to_keep"] = longest - first
    if "position_ids" in known:
        # One row a sample: an embedding of positions shared by the batch would mix its samples' gradients.
        options["position_ids"] = torch.arange(longest, device=ids.device).expand(len(batch), -1)
    with nullcontext() if output is None else output.set_aside() as read:
        logits = loaded.model(input_ids=ids, use_cache=False, **options).logits
    if read is not None and not is_untouched(read, logits):
        raise OutputError("the model goes on computing with them")
    before = longest - logits.shape[1]
    if not 0 <= before <= first:
        raise ModelError(
            f"the model gave logits at {logits.shape[1]} of {longest} tokens; wanted the last {longest - first}"
        )
    chosen, wanted = rows * logits.shape[1] + places - 1 - before, ids[rows, places]
    if output is None:
        losses = _losses_at(logits.flatten(0, 1), chosen, wanted)
    else:
        losses = output.losses(logits.flatten(0, 1).index_select(0, chosen), wanted, 1 / counts[rows])
    return TokenLosses(losses, rows, counts)


def _losses_at(logits: Tensor, chosen: Tensor, wanted: Tensor) -> Tensor:
    """Return the cross-entropy of the chosen rows of logits, [tokens, vocabulary], with what was wanted there."""
    if len(chosen) < _MOST * len(logits):
        # By one number each: backward adds whole rows then, and not element by element.
        return cross_entropy(logits.index_select(0, chosen), wanted)
    # A copy of nearly all logits, and of their gradient, would take more than the losses that nobody asks for.
    targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device).index_copy(0, chosen, wanted)
    return cross_entropy(logits, targets).index_select(0, chosen)
