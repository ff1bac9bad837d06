"""How many tokens a batch may have, and what to do when it was too many."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from rapidin_vdb.gradient.quiet import quiet_libraries
from rapidin_vdb.machine import free_bytes

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

# What plain errors say of it: torch's on a CPU; torch's, Triton's and the driver's on a GPU; cuBLAS's and its sisters'.
_NO_MEMORY = (
    "can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED",
    "_STATUS_NOT_INITIALIZED when calling `cublasCreate",
)  # fmt: skip
# Beyond these a larger batch is no faster: a core's caches, or a GPU's arithmetic, are busy already.
_ENOUGH_TOKENS = {"cpu": 4096, "cuda": 32768}
# Share of the free memory that a batch is given. A host has others to share with. On a GPU a batch was seen to take two
# thirds of what is reckoned below (Llama's shape, 7 billion parameters), beside gradients that are formed at a time.
_SHARE = {"cpu": 1 / 3, "cuda": 3 / 4}
_FORMED_BYTES = {"cpu": 0, "cuda": 2 << 30}
# A weight of a quantised linear layer, with its share of a block's scale.
_QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}


def default_batch_tokens(config: Any, *, dtype: str, device: str, workers: int = 1, weights: int = 0) -> int:
    """Return how many tokens (padding included) a batch can have in a worker's share of the memory that is free now.

    `weights` are the bytes that each worker's model is still to take of it (see `weight_bytes`).
    """
    text = config.get_text_config()
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    inner = max(_widest(text, "intermediate_size") or 4 * hidden, _inner_of_experts(text))
    # What a layer keeps for backward, and once more what the hooks keep; then logits, their float32 copy and gradient.
    activations = layers * (24 * hidden + 6 * inner) * (4 if dtype == "float32" else 2)
    per_token = activations + 16 * int(text.vocab_size)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    free = max(0, free_bytes(device) // workers - weights)
    spare = _SHARE[kind] * max(free - _FORMED_BYTES[kind], free // 4)
    return max(1, min(_ENOUGH_TOKENS[kind], int(spare) // per_token))


def _widest(text: Any, name: str) -> int:
    """Return a width of a configuration, the largest where each layer has its own (as Gemma 3n's); 0 if it has none."""
    found = getattr(text, name, None) or 0
    return int(max(found)) if isinstance(found, list | tuple) else int(found)


def _inner_of_experts(text: Any) -> int:
    """Return how wide the experts that one token goes through are together; 0 where there are none."""
    each = _widest(text, "moe_intermediate_size") or _widest(text, "intermediate_size")
    routed = int(getattr(text, "num_experts_per_tok", None) or 0) * each
    shared = int(getattr(text, "n_shared_experts", None) or 0) * each
    return routed + int(getattr(text, "shared_expert_intermediate_size", None) or shared) if routed else 0


def weight_bytes(config: Any, *, dtype: str, quantization: str) -> int:
    """Return the bytes that a model's weights take once they are loaded, found without loading them; 0 if unknown."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_libraries(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError, RuntimeError):
        return 0  # what is wrong with it, whoever loads it says
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    )
    each = 4 if dtype == "float32" else 2
    return int((model.num_parameters() - linear) * each + linear * _QUANTIZED_BYTES.get(quantization, each))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a smaller batch might have passed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def if_it_fits(work: Callable[[], T]) -> T | None:
    """Return what `work` gives, which is not None; None where it does not fit the memory, which is given back then."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Out here, where the error no longer holds what did not fit.
    release_memory()
    return None


def in_parts(work: Callable[[list[T]], list[R]], batch: list[T]) -> list[R]:
    """Return what `work` makes of a batch; of its halves, where it does not fit the memory."""
    if len(batch) == 1:
        return work(batch)
    made = if_it_fits(partial(work, batch))
    if made is not None:
        return made
    half = len(batch) // 2
    logger.warning("a batch of %d samples does not fit the memory: going on with %d", len(batch), half)
    return in_parts(work, batch[:half]) + in_parts(work, batch[half:])


def peak_bytes(device: str) -> int:
    """Return the most memory that was allocated on a GPU so far; 0 for the CPU, whose peak the system knows."""
    return int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else 0


def release_memory() -> None:
    """Give what torch holds in reserve back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
