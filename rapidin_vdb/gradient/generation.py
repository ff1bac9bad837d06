"""What a model says to a prompt: most likely token by token, or drawn."""

from collections.abc import Sequence
from typing import Any

import torch

from rapidin_vdb.errors import SpecError
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.progress import Progress, silent


@torch.no_grad()
def generate_one(
    loaded: LoadedModel, prompt: str, *, max_tokens: int, temperature: float, seed: int, progress: Progress = silent
) -> str:
    """Return the continuation of a prompt that is written in its template; at temperature 0 the most likely one.

    Nothing but these settings counts: what the model's folder says about generation does not. `progress` hears of every
    token, and may end it by raising.

    Raises:
        SpecError: an option is out of range, or the prompt leaves no room.
    """
    if not 1 <= max_tokens <= 4096:
        raise SpecError(f"max_tokens is {max_tokens}; wanted 1 to 4096")
    # Below, logits divided by it overflow.
    if temperature != 0 and not 0.01 <= temperature <= 10:
        raise SpecError(f"temperature is {temperature}; wanted 0 (most likely), or 0.01 to 10")
    model, tokenizer = loaded.model, loaded.tokenizer
    # A template that writes the beginning-of-sequence token itself must not get a second one, as in `encode`.
    begun = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not begun)["input_ids"].to(model.device)
    end = tokenizer.eos_token_id
    if ids.shape[1] and int(ids[0, -1]) == end and not prompt.endswith(str(tokenizer.eos_token)):
        ids = ids[:, :-1]  # some tokenizers end every text
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None:
        if ids.shape[1] >= room:
            raise SpecError(f"the prompt has {ids.shape[1]} tokens, and the model knows {room} positions; shorten it")
        max_tokens = min(max_tokens, room - ids.shape[1])
    if not ids.shape[1]:
        raise SpecError("the prompt is empty; the model needs a token to begin with")
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    from transformers import GenerationConfig

    # Where `generate` is told nothing, it takes the model's own settings; these are replaced by none.
    model.generation_config = GenerationConfig()
    # The generator is the process's own: what others draw meanwhile, and have drawn, must not change.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            use_cache=True,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
            stopping_criteria=[_Heard(progress, ids.shape[1], max_tokens)],
            **drawn,
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


class _Heard:
    """Asked after every token whether that is enough: never, but whoever hears of it may raise."""

    def __init__(self, progress: Progress, first: int, total: int) -> None:
        self._progress, self._first, self._total = progress, first, total

    def __call__(self, ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self._progress("generated tokens", ids.shape[1] - self._first, self._total)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
    """Return the model's most likely continuation of each prompt, already written in its template."""
    model.eval()
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@torch.no_grad()
def generate_batch(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_tokens: int, batch: int = 32, temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:  # fmt: skip
    """Return a continuation of each prompt, many at a time: the most likely one, or one drawn at a temperature."""
    model.eval()
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    texts = [""] * len(prompts)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        longest = max(len(encoded[number]) for number in part)
        # On the left: what is generated has to follow the prompt.
        ids = torch.full((len(part), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(part):
            ids[row, longest - len(encoded[number]) :] = torch.tensor(encoded[number])
            mask[row, longest - len(encoded[number]) :] = 1
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed + first)
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_tokens,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **drawn,
            )
        for number, ids_out in zip(part, out[:, longest:], strict=True):
            texts[number] = tokenizer.decode(ids_out, skip_special_tokens=True)
    return texts
