"""Where a training stands, in safetensors and JSON: it is replaced whole, and taken up by the same training alone."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.errors import ModelError
from rapidin_vdb.records import Encoded

_SAMPLED_BYTES = 1 << 16


def plan_of(model: Any, samples: Sequence[Encoded]) -> dict[str, Any]:
    """Return what makes two trainings the same, beside their settings: what is trained, from where, on what.

    It is to be asked for before the first step.
    """
    tokens = hashlib.sha256()
    for sample in samples:
        # The id too: within a step it has a say in the order.
        line = json.dumps([sample.sample_id, sample.input_ids, sample.response_tokens])
        tokens.update(f"{line}\n".encode())
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return {
        "samples": len(samples),
        "tokens": tokens.hexdigest(),
        "parameters": {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(trained.items())},
        "beginning": _beginning(model),
    }


def _beginning(model: Any) -> str:
    """Hash a model's tensors, the long ones at both ends only, and how its adapters are scaled."""
    digest = hashlib.sha256()
    # The first holds what quantised weights stand for, the second what is computed from the configuration.
    for name, tensor in (model.state_dict() | dict(model.named_buffers())).items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().reshape(-1)
        most = _SAMPLED_BYTES // flat.element_size()
        for part in (flat,) if len(flat) <= 2 * most else (flat[:most], flat[-most:]):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        if hasattr(module, "scaling"):
            digest.update(f"{name}\0{module.scaling}\0".encode())
    return digest.hexdigest()


def save_state(
    state: Path, plan: dict[str, Any], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Write values, moments and losses so far to a folder, in the place of what it held of them."""
    from safetensors.torch import save_file

    state.mkdir(parents=True, exist_ok=True)
    name = f"step-{len(losses)}.safetensors"
    tensors = {f"value.{key}": tensor.detach().cpu().contiguous() for key, tensor in trained.items()}
    for key, tensor in trained.items():
        # Of a tensor that had no gradient so far there is nothing; where it came late, its count of steps is its own.
        for what, value in optimizer.state.get(tensor, {}).items():
            tensors[f"{what}.{key}"] = value.cpu().contiguous()
    save_file(tensors, state / name)
    # The small file names the large one: until it is replaced, the state before is in force.
    new = state / "state.json.new"
    new.write_text(json.dumps({"plan": plan, "weights": name, "losses": losses}), "utf-8")
    new.replace(state / "state.json")
    for path in state.glob("step-*.safetensors"):
        if path.name != name:
            path.unlink()


def restored(
    state: Path, plan: dict[str, Any], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Bring values and moments to where the same training left them, and return its losses so far.

    Without weights there is no state.

    Raises:
        ModelError: the state is of another training, or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (state / "state.json").is_file():
        return []
    try:
        found = json.loads((state / "state.json").read_text("utf-8"))
        if not (state / found["weights"]).is_file():
            (state / "state.json").unlink()  # or it would name a file of that name which is still being written
            return []
        if found["plan"] != plan:
            differing = ", ".join(key for key in plan if found["plan"].get(key) != plan[key])
            raise ModelError(
                f"{state} holds the state of another training (differing: {differing or 'more is named there'}); "
                "remove it, or give another folder"
            )
        tensors = load_file(state / found["weights"])
    except (ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{state} cannot be read: {error}; remove it, and the training begins anew") from error
    with torch.no_grad():
        for key, tensor in trained.items():
            tensor.copy_(tensors[f"value.{key}"])
            optimizer.state.pop(tensor, None)
            for what, value in _moments(tensors, key):
                # Counts of steps stay where the optimizer has them, on the CPU.
                optimizer.state[tensor][what] = value.to(tensor.device) if what != "step" else value
    return list(found["losses"])


def _moments(tensors: dict[str, Tensor], key: str) -> Iterator[tuple[str, Tensor]]:
    for what in ("step", "exp_avg", "exp_avg_sq"):
        if f"{what}.{key}" in tensors:
            yield what, tensors[f"{what}.{key}"]


def finished(state: Path) -> None:
    """Remove the state of a training whose model is saved, and the folder if it holds nothing else."""
    # What names the weights goes first, so that it never names what is gone.
    for path in (state / "state.json", state / "state.json.new", *state.glob("step-*.safetensors")):
        path.unlink(missing_ok=True)
    if state.is_dir() and not any(state.iterdir()):
        state.rmdir()
