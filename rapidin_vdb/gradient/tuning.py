"""Fine-tuning and pre-training that can be interrupted: AdamW, warm-up, cosine decay, seeded, in micro-batches.

The state lies in safetensors and JSON beside what is trained, and is replaced whole: a run that was killed goes on from
its last state, and ends as it would have without.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient.training import padded
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How to train; the defaults are the paper's where it names them (its Table 8)."""

    epochs: float = 5.0
    """How often every sample is seen."""
    batch: int = 128
    """Samples a step."""
    learning_rate: float = 3e-4
    """At its highest."""
    warm_up: float = 0.03
    """Share of the steps in which it rises."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    micro_tokens: int = 8192
    """Tokens that go through the model at once, padding included."""
    seed: int = 42
    """Of the order of the samples."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16; weights, losses and moments stay as they are."""

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

    With `state`, a folder, it goes on from what an interrupted run with the same arguments left there, and empties the
    folder at the end.

    Raises:
        ModelError: the state is of another run, or the loss is not finite.
    """
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    optimizer = torch.optim.AdamW(
        list(trained.values()), lr=tuning.learning_rate, weight_decay=tuning.weight_decay, betas=(0.9, 0.999)
    )
    total = tuning.steps(len(samples))
    plan = {"tuning": asdict(tuning), "samples": len(samples), "parameters": sorted(trained), "total": total}
    losses = _restored(state, plan, trained, optimizer) if state is not None else []
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
        if state is not None and time.monotonic() - saved > save_seconds:
            _save(state, plan, trained, optimizer, losses)
            saved = time.monotonic()
    model.eval()
    if state is not None:
        for path in state.glob("*"):
            path.unlink()
    return losses


@torch.no_grad()
def mean_loss(model: Any, samples: Sequence[Encoded], *, micro_tokens: int = 8192) -> float:
    """Return the mean loss over the tokens of some samples, in nats a token."""
    model.eval()
    total = tokens = 0.0
    for part in _parts(list(samples), micro_tokens):
        total += float(_summed_loss(model, part))
        tokens += sum(sample.response_tokens for sample in part)
    return total / tokens


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
    for part in _parts(batch, tuning.micro_tokens):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=tuning.bfloat16):
            loss = _summed_loss(model, part)
        (loss / tokens).backward()
        total += float(loss.detach())
    return total / tokens


def _parts(batch: list[Encoded], micro_tokens: int) -> Iterator[list[Encoded]]:
    part: list[Encoded] = []
    for sample in sorted(batch, key=lambda sample: (len(sample.input_ids), sample.sample_id)):
        if part and (len(part) + 1) * len(sample.input_ids) > micro_tokens:
            yield part
            part = []
        part.append(sample)
    yield part


def _save(
    state: Path, plan: dict[str, Any], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    from safetensors.torch import save_file

    state.mkdir(parents=True, exist_ok=True)
    name = f"step-{len(losses)}.safetensors"
    tensors = {f"value.{key}": tensor.detach().cpu().contiguous() for key, tensor in trained.items()}
    for key, tensor in trained.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{key}"] = optimizer.state[tensor][moment].cpu().contiguous()
    save_file(tensors, state / name)
    # The small file names the large one: until it is replaced, the state before is in force.
    new = state / "state.json.new"
    new.write_text(json.dumps({"plan": plan, "weights": name, "losses": losses}), "utf-8")
    new.replace(state / "state.json")
    for path in state.glob("step-*.safetensors"):
        if path.name != name:
            path.unlink()


def _restored(
    state: Path, plan: dict[str, Any], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Bring weights and moments to where an interrupted run left them, and return its losses so far."""
    from safetensors.torch import load_file

    if not (state / "state.json").is_file():
        return []
    found = json.loads((state / "state.json").read_text("utf-8"))
    if found["plan"] != plan:
        raise ModelError(f"{state} holds the state of a run with other arguments; remove it, or give another folder")
    tensors = load_file(state / found["weights"])
    steps = len(found["losses"])
    with torch.no_grad():
        for key, tensor in trained.items():
            tensor.copy_(tensors[f"value.{key}"])
            optimizer.state[tensor] = {
                "step": torch.tensor(float(steps)),
                **{moment: tensors[f"{moment}.{key}"].to(tensor.device) for moment in ("exp_avg", "exp_avg_sq")},
            }
    return list(found["losses"])
