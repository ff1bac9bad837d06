"""How many tokens a batch may have, and what to do when it was too many."""

from typing import Any

import torch

from rapidin_vdb.sketch.memory import free_bytes

# Beyond these a larger batch is no faster: a core's caches, or a GPU's arithmetic, are busy already.
_ENOUGH_TOKENS = {"cpu": 4096, "cuda": 32768}


def default_batch_tokens(config: Any, *, dtype: str, device: str, workers: int = 1) -> int:
    """Return how many tokens (padding included) a batch can have in a worker's share of the memory that is free now."""
    text = config.get_text_config()
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    # What a layer keeps for backward, and once more what the hooks keep; then logits, their float32 copy and gradient.
    activations = layers * (24 * hidden + 6 * inner) * (4 if dtype == "float32" else 2)
    per_token = activations + 16 * int(text.vocab_size)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    return max(1, min(_ENOUGH_TOKENS[kind], free_bytes(device) // workers // 3 // per_token))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a smaller batch might have passed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def peak_bytes(device: str) -> int:
    """Return the most memory that was allocated on a GPU so far; 0 for the CPU, whose peak the system knows."""
    return int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else 0


def release_memory() -> None:
    """Give what torch holds in reserve back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
