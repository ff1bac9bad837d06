"""Fine-tuning and pre-training that can be interrupted: AdamW, warm-up, cosine decay, seeded, in micro-batches.

A run that was killed goes on from its last state, and ends as it would have without.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapidin_vdb.batches import cut
from rapidin_vdb.errors import ModelError, SpecError
from rapidin_vdb.gradient.training import padded
from rapidin_vdb.gradient.tuning_state import plan_of, restored, save_state
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How to train; the defaults are the paper's where it names them (its Table 8), of 52,000 samples and a 7B model.

    A smaller model takes a higher learning rate.
    """

    epochs: float = 5.0
    """How often every sample is seen."""
    batch: int = 128
    """Samples a step."""
    learning_rate: float = 5e-5
    """At its highest."""
    warm_up: float = 0.15
    """Share of the steps in which it rises: 300 of the paper's 2,031."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    micro_tokens: int | None = None
    """Tokens that go through the model at once, padding included; None: 8192 on a GPU, 1024 on a CPU.

    A step's samples go in order of their length, so that fewer at once have less padding, which costs a CPU time.
    """
    seed: int = 42
    """Of the order of the samples."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16; weights, losses and moments stay as they are."""

    def __post_init__(self) -> None:
        """Refuse what makes no training.

        Raises:
            SpecError: a number is out of its range.
        """
        ranges = {
            "epochs": (0 < self.epochs < math.inf, "more than 0"),
            "batch": (self.batch >= 1, "1 or more"),
            "learning_rate": (0 < self.learning_rate < math.inf, "more than 0"),
            "warm_up": (0 <= self.warm_up <= 1, "0 to 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "clip": (self.clip > 0, "more than 0"),
            "micro_tokens": (self.micro_tokens is None or self.micro_tokens >= 1, "1 or more"),
            # Times a million, and a step more, it is still a seed.
            "seed": (0 <= self.seed < 1 << 40, "0 or more, less than 2^40"),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise SpecError(f"{name} is {getattr(self, name)}; wanted {wanted}")

    def steps(self, samples: int) -> int:
        """Return how many steps that makes."""
        return max(1, round(self.epochs * samples / self.batch))


def tune(
    model: Any,
    samples: Sequence[Encoded],
    tuning: Tuning,
    *,
    state: Path | None = None,
    save_seconds: float = 120.0,
    stage: str = "train",
    progress: Progress = silent,
) -> list[float]:
    """Train a model's trainable parameters in place, and return the mean loss of each step, in nats a token.

    With `state`, a folder, it goes on from what an interrupted run with the same arguments left there. The last state
    stays there until the caller has saved the model, and says so by `finished`: until then, a run again trains no step.

    Raises:
        ModelError: the state is of another run, or the loss is not finite.
        SpecError: there are no samples.
    """
    if not samples:
        raise SpecError("there are no samples to train on")
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    optimizer = torch.optim.AdamW(
        list(trained.values()), lr=tuning.learning_rate, weight_decay=tuning.weight_decay, betas=(0.9, 0.999)
    )
    total = tuning.steps(len(samples))
    plan = {"tuning": asdict(tuning), "total": total, **plan_of(model, samples)} if state is not None else {}
    losses = restored(state, plan, trained, optimizer) if state is not None else []
    saved = time.monotonic()
    model.train()
    for step in range(len(losses), total):
        for group in optimizer.param_groups:
            group["lr"] = tuning.learning_rate * _schedule(step, total, tuning.warm_up)
        # Dropout too is the same, wherever a run was interrupted.
        torch.manual_seed(tuning.seed * 1_000_003 + step)
        loss = _step(model, [samples[number] for number in _batch(step, len(samples), tuning)], tuning)
        if not torch.isfinite(torch.tensor(loss)):
            raise ModelError(f"the loss is {loss} at step {step + 1} of {total}; try a lower learning rate")
        torch.nn.utils.clip_grad_norm_(list(trained.values()), tuning.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        progress(stage, step + 1, total)
        if state is not None and (step + 1 == total or time.monotonic() - saved > save_seconds):
            save_state(state, plan, trained, optimizer, losses)
            saved = time.monotonic()
    model.eval()
    return losses


@torch.no_grad()
def mean_loss(model: Any, samples: Sequence[Encoded]) -> float:
    """Return the mean loss over the tokens of some samples, in nats a token."""
    model.eval()
    total = tokens = 0.0
    for part in _cut(samples, _micro_tokens(model)):
        total += float(_summed_loss(model, part))
        tokens += sum(sample.response_tokens for sample in part)
    return total / tokens


def _cut(samples: Sequence[Encoded], tokens: int) -> Iterator[list[Encoded]]:
    ordered = sorted(samples, key=lambda sample: sample.sample_id)
    return cut(ordered, lambda sample: len(sample.input_ids), tokens=tokens)


def _micro_tokens(model: Any) -> int:
    return 8192 if model.device.type == "cuda" else 1024


def _summed_loss(model: Any, part: Sequence[Encoded]) -> Tensor:
    ids, mask, labels = (tensor.to(model.device) for tensor in padded(part))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def _schedule(step: int, total: int, warm_up: float) -> float:
    """Return the share of the learning rate at a step: linear warm-up, then half a cosine down to zero."""
    warm = max(1, round(warm_up * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warm) / max(1, total - warm)))))


def _batch(step: int, samples: int, tuning: Tuning) -> Iterator[int]:
    """Yield the numbers of a step's samples: every epoch is an order of its own."""
    orders: dict[int, list[int]] = {}
    for place in range(step * tuning.batch, (step + 1) * tuning.batch):
        epoch, number = divmod(place, samples)
        if epoch not in orders:
            draw = torch.Generator().manual_seed(tuning.seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(samples, generator=draw).tolist()
        yield orders[epoch][number]


def _step(model: Any, batch: list[Encoded], tuning: Tuning) -> float:
    """Add up the gradient of the mean loss over the tokens of a batch; return that loss."""
    tokens = sum(sample.response_tokens for sample in batch)
    total = 0.0
    for part in _cut(batch, tuning.micro_tokens or _micro_tokens(model)):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=tuning.bfloat16):
            loss = _summed_loss(model, part)
        (loss / tokens).backward()
        total += float(loss.detach())
    return total / tokens
