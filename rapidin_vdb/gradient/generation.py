"""What a model says to a prompt: most likely token by token, or drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rapidin_vdb.errors import SpecError
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model says to a prompt."""

    text: str
    """It, without what ends it."""
    cut: bool
    """Whether it was ended by the number of tokens that it may have, and not by the model."""


@torch.no_grad()
def generate_one(
    loaded: LoadedModel, prompt: str, *, max_tokens: int, temperature: float, seed: int, progress: Progress = silent,
    special: bool = True, end: str = "",
) -> Said:  # fmt: skip
    """Return the continuation of a prompt that is written in its template; at temperature 0 the most likely one.

    It ends with the end-of-sequence token, or with the last token of `end`. Without `special`, the tokenizer adds none
    of its own tokens to the prompt. Nothing but these settings counts: what the model's folder says about generation
    does not. `progress` hears of every token, and may end it by raising.

    Raises:
        SpecError: an option is out of range, or the prompt leaves no room.
    """
    if not 1 <= max_tokens <= 4096:
        raise SpecError(f"max_tokens is {max_tokens}; wanted 1 to 4096")
    # Below, logits divided by it overflow.
    if temperature != 0 and not 0.01 <= temperature <= 10:
        raise SpecError(f"temperature is {temperature}; wanted 0 (most likely), or 0.01 to 10")
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = prompt_ids(tokenizer, prompt, model.config, special=special)
    room = getattr(model.config, "max_position_embeddings", None)
    max_tokens = max_tokens if room is None else min(max_tokens, room - len(ids))
    heard = _Heard(progress, len(ids), max_tokens)
    (said,) = _continued(
        model, tokenizer, [ids], max_tokens=max_tokens, temperature=temperature, seed=seed, end=end,
        stopping_criteria=[heard],
    )  # fmt: skip
    return said


def prompt_ids(tokenizer: Any, prompt: str, config: Any, *, special: bool = True) -> list[int]:
    """Return the tokens of a prompt that is written in its template, which leave a model of that configuration room.

    Raises:
        SpecError: there are none, or as many as the model knows positions.
    """
    ids = _prompt_ids(tokenizer, prompt, special=special)
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and len(ids) >= room:
        raise SpecError(f"the prompt has {len(ids)} tokens, and the model knows {room} positions; shorten it")
    return ids


def _prompt_ids(tokenizer: Any, prompt: str, *, special: bool = True) -> list[int]:
    """Return the tokens of a prompt that is written in its template, with nothing behind them.

    Raises:
        SpecError: there are none.
    """
    # A template that writes the beginning-of-sequence token itself must not get a second one, as in `encode`.
    begun = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    ids = list(tokenizer(prompt, add_special_tokens=special and not begun)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids.pop()  # some tokenizers end every text
    if not ids:
        raise SpecError("the prompt is empty; the model needs a token to begin with")
    return ids


def _continued(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, seed: int,
    end: str = "", **options: Any,
) -> list[Said]:  # fmt: skip
    """Return the continuations of some prompts' tokens, all at once; what the model's folder says does not count."""
    from transformers import GenerationConfig

    # Where `generate` is told nothing, it takes the model's own settings; these are replaced by none.
    model.generation_config = GenerationConfig()
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    eos = tokenizer.eos_token_id
    last = tokenizer(end, add_special_tokens=False)["input_ids"][-1:] if end else []
    ends = list(dict.fromkeys([*([] if eos is None else [eos]), *last]))
    # What fills is masked, or cut off with the end: without a token for it any will do.
    padding = next(token for token in (tokenizer.pad_token_id, eos, 0) if token is not None)
    longest = max(map(len, prompts))
    # On the left: what is generated has to follow the prompt.
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # The generator is the process's own: what others draw meanwhile, and have drawn, must not change.
    cuda = model.device.type == "cuda"
    with torch.random.fork_rng(devices=[model.device] if cuda else []):
        # `torch.manual_seed` would set those of all other devices, too.
        (torch.cuda.default_generators[model.device.index] if cuda else torch.default_generator).manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_tokens,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=padding,
            **drawn,
            **options,
        )
    found = []
    for row in out[:, longest:].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), None)
        found.append(Said(text=tokenizer.decode(row[:stop], skip_special_tokens=True), cut=stop is None))
    return found


class _Heard:
    """Asked after every token whether that is enough: never, but whoever hears of it may raise."""

    def __init__(self, progress: Progress, first: int, total: int) -> None:
        self._progress, self._first, self._total = progress, first, total

    def __call__(self, ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self._progress("generated tokens", ids.shape[1] - self._first, self._total)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@torch.no_grad()
def generate_batch(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_tokens: int, batch: int = 32, temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:  # fmt: skip
    """Return a continuation of each prompt, many at a time: the most likely one, or one drawn at a temperature.

    The prompts are written in their template. As in `generate_one`, nothing but these settings counts.

    Raises:
        SpecError: a prompt is empty.
    """
    model.eval()
    texts = [""] * len(prompts)
    encoded = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        said = _continued(
            model, tokenizer, [encoded[number] for number in part], max_tokens=max_tokens, temperature=temperature,
            seed=seed + first,
        )  # fmt: skip
        for number, answer in zip(part, said, strict=True):
            texts[number] = answer.text
    return texts
