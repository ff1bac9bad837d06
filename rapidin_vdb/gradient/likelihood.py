"""How likely a model makes some texts: the loss at each token, without a gradient."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from rapidin_vdb.batches import cut
from rapidin_vdb.errors import GradientError, ModelError
from rapidin_vdb.gradient.forward import batch_losses
from rapidin_vdb.gradient.memory import default_batch_tokens, if_it_fits, in_parts
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.rapidgrad import apart
from rapidin_vdb.gradient.sample import cut_behind_loss
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded


def evaluate_losses(
    loaded: LoadedModel, samples: Sequence[Encoded], *, batch_tokens: int | None = None, stage: str = "losses",
    progress: Progress = silent,
) -> list[np.ndarray]:  # fmt: skip
    """Return the cross-entropy at each token that carries a loss, in nats, float32 [tokens] for each sample.

    The mean of a sample's is the loss whose gradient a database is made of. It does not depend on the batch that the
    sample is in, but for rounding, which int8 products make a good deal of: with the same `batch_tokens`, padding
    included, and room for them, batches are the same. By default these follow free memory.

    Raises:
        ModelError: the model knows less tokens or positions than there are, or gives a loss that is not finite.
        GradientError: a sample does not fit the memory, even alone.
    """
    known, positions = loaded.known_tokens, loaded.learned_positions
    samples = [cut_behind_loss(sample) for sample in samples]
    for sample in samples:
        if positions is not None and len(sample.input_ids) > positions:
            raise ModelError(
                f"{sample.sample_id} has {len(sample.input_ids)} tokens, and the model {loaded.spec.model} knows only "
                f"{positions} positions; give one that knows as many as the database's"
            )
        if max(sample.input_ids) >= known:
            raise ModelError(
                f"{sample.sample_id}: token id {max(sample.input_ids)}, but the model {loaded.spec.model} knows only "
                f"{known} tokens; give the one whose tokenizer wrote it"
            )
    tokens = batch_tokens or batch_tokens_for(loaded)
    found: dict[int, np.ndarray] = {}
    for batch in cut(range(len(samples)), lambda place: len(samples[place].input_ids), tokens=tokens):
        progress(stage, len(found), len(samples))
        for together in apart([samples[place] for place in batch], loaded.rotary_limit):
            places = [batch[number] for number in together]
            found |= zip(places, in_parts(partial(_losses, loaded), [samples[place] for place in places]), strict=True)
    progress(stage, len(samples), len(samples))
    return [found[place] for place in range(len(samples))]


def batch_tokens_for(loaded: LoadedModel) -> int:
    """Return how many tokens a batch can have in the memory that is free beside a model."""
    return default_batch_tokens(loaded.model.config, dtype=loaded.dtype, device=loaded.device)


@torch.no_grad()
def _losses(loaded: LoadedModel, batch: Sequence[Encoded]) -> list[np.ndarray]:
    work = partial(batch_losses, loaded, batch)
    made = work() if len(batch) > 1 else if_it_fits(work)  # of several, whoever asked halves them
    if made is None:
        raise GradientError(
            f"{batch[0].sample_id} does not fit the memory, even alone: it takes another device, or a database with a "
            "smaller --max-tokens"
        )
    losses = made.losses.float().cpu().numpy()
    parts = np.split(losses, np.cumsum(made.counts.tolist())[:-1])
    for sample, part in zip(batch, parts, strict=True):
        if not np.isfinite(part).all():
            raise ModelError(
                f"{sample.sample_id}: the loss of the model {loaded.spec.model} is not finite; look at its weights, or "
                "at those of its adapter"
            )
    return parts
