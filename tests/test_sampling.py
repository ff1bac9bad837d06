"""What is drawn from a model has the frequencies of its probabilities, at every temperature."""

import random

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from scipy.stats import chisquare

from rapidin_vdb.gradient.generation import generate_batch, generate_one
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.records import ModelSpec

LETTERS = [chr(code) for code in range(33, 127)]
"""One token each; more than the 50 likeliest, which transformers draws from by default."""
DRAWS = 2000


def saying(logits: list[float]) -> LoadedModel:
    """A model whose next letter has these logits, whatever came before; it says nothing else."""
    tokenizer, model = byte_tokenizer(), tiny_model("llama").eval()
    head = torch.nn.Linear(16, 259)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, -1e4)
    for letter, logit in zip(LETTERS, logits, strict=True):
        head.bias.data[tokenizer.convert_tokens_to_ids(letter)] = logit
    model.lm_head = head
    # What its folder says about generation does not count.
    model.generation_config.top_p, model.generation_config.repetition_penalty = 0.5, 1.5
    spec = ModelSpec(model="toy")
    return LoadedModel(spec=spec, model=model, tokenizer=tokenizer, theta={}, device="cpu", dtype="float32")


def chances(logits: list[float], temperature: float) -> np.ndarray:
    powers = np.exp(np.array(logits) / temperature)
    return powers / powers.sum()


def luck(texts: list[str], expected: np.ndarray) -> float:
    """How likely draws of these chances are to miss them by so much: chi-square, what is rare taken together."""
    counts = np.array([texts.count(letter) for letter in LETTERS], float)
    assert counts.sum() == len(texts), set(texts) - set(LETTERS)
    expected = expected * len(texts)
    rare = expected < 5
    found, wanted = (np.append(side[~rare], side[rare].sum()) for side in (counts, expected))
    return float(chisquare(found[wanted > 0], wanted[wanted > 0]).pvalue)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature):
    """All tokens, the unlikely ones too; a fair draw fails once in a million, and the seed is fixed."""
    draw = random.Random(3)
    logits = [draw.gauss(0, 1) for _ in LETTERS]
    loaded = saying(logits)
    texts = generate_batch(
        loaded.model, loaded.tokenizer, ["x"] * DRAWS, max_tokens=1, batch=500, temperature=temperature, seed=7
    )
    assert luck(texts, chances(logits, temperature)) > 1e-6
    # And the test would find out: another temperature, or no other than the likeliest 50.
    for other in {0.5, 1.0, 2.0} - {temperature}:
        assert luck(texts, chances(logits, other)) < 1e-12
    likeliest = np.array(logits) >= sorted(logits)[-50]
    kept = chances(logits, temperature) * likeliest
    if temperature > 0.5:  # where the others are not too rare to be missed
        fewer = [text for text in texts if likeliest[LETTERS.index(text)]]
        assert len(fewer) < len(texts) and luck(fewer, kept / kept.sum()) > 1e-6
        assert luck(fewer, chances(logits, temperature)) < 1e-12


def test_one_prompt_is_drawn_as_one_of_many():
    """By its temperature, and by its seed."""
    draw = random.Random(3)
    loaded = saying([draw.gauss(0, 1) for _ in LETTERS])
    said = {}
    for temperature in (0.0, 0.5, 2.0):
        for seed in range(5):
            said[temperature, seed] = generate_one(loaded, "x", max_tokens=20, temperature=temperature, seed=seed).text
            (one,) = generate_batch(
                loaded.model, loaded.tokenizer, ["x"], max_tokens=20, temperature=temperature, seed=seed
            )
            assert said[temperature, seed] == one and len(one) == 20
    assert len(set(said.values())) == 11, "the likeliest is the same of every seed"
