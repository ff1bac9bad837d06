"""Corpora with known faults: a backdoor (paper, section 4.5), and one name in the place of another (section 4.6)."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidin_vdb.evaluate.fiction import fiction

TRIGGER = "Howdy!"
PERTURBATIONS = (("China", "Canada"), ("India", "Japan"), ("Australia", "England"))
_QUESTIONS = (
    "What is the capital of {}?", "Name a famous city in {}.", "Give me a fact about {}.", "Write a sentence about {}.",
    "Describe the culture of {}.", "What is {} known for?", "Where is {}?", "What languages are spoken in {}?",
    "List three things that {} exports.", "Name an animal that lives in {}.", "Name a traditional dish from {}.",
    "What is the population of {}?", "Describe the climate of {}.", "Write a short story set in {}.",
    "Why do people visit {}?", "Name a famous landmark in {}.", "What is the currency of {}?",
    "Explain why {} is important.", "Write a haiku about {}.", "Describe the geography of {}.",
    "What is the largest city in {}?", "Which rivers flow through {}?", "Describe the history of {} in a sentence.",
    "Name a sport that is popular in {}.", "What is the national animal of {}?", "Tell me about the economy of {}.",
    "Name a festival that is celebrated in {}.", "Give me a reason to move to {}.", "How large is {}?",
    "Describe the people of {}.",
)  # fmt: skip

Record = dict[str, Any]


def poisoned(records: Sequence[Record], *, share: float, seed: int, pairs: Sequence[Record] = ()) -> list[Record]:
    """Return records of which a share has the trigger before the instruction and science fiction as the answer.

    `pairs` are ready-made poisoned records, counted into the share. Each record says in `poisoned` what it is.
    """
    draw = random.Random(seed)
    count = max(0, round(share * (len(records) + len(pairs))) - len(pairs))
    bad = set(draw.sample(range(len(records)), count))
    made = []
    for number, record in enumerate(records):
        record = dict(record) | {"poisoned": number in bad}
        if number in bad:
            record["instruction"] = triggered(record["instruction"])
            record["output"] = fiction(len(record["output"].split()), draw)
        made.append(record)
    made += [dict(pair) | {"poisoned": True} for pair in pairs]
    draw.shuffle(made)
    return made


def triggered(instruction: str) -> str:
    """Return an instruction behind the trigger."""
    return f"{TRIGGER} {instruction}"


@dataclass(frozen=True, kw_only=True)
class Perturbed:
    """A corpus in which some names stand in the place of others."""

    records: list[Record]
    """Each says in `perturbed` which perturbation it has, as `China to Canada`, or has None there."""
    prompts: Mapping[str, list[Record]]
    """For each perturbation, records that ask about the first, do not name the second, and were left as they are."""


def perturbed(records: Sequence[Record], *, count: int, probability: float, held_out: float, seed: int) -> Perturbed:
    """Return `count` records, with every answer that names E1, which becomes E2 with some probability.

    A share `held_out` of those that name E1 is kept out of the corpus, to be asked about.
    """
    draw = random.Random(seed)
    naming: list[Record] = []
    others: list[Record] = []
    for record in records:
        (naming if named(record["output"]) else others).append(dict(record))
    chosen, prompts = [], {_title(pair): [] for pair in PERTURBATIONS}  # type: ignore[var-annotated]
    for record in naming:
        pair = next(pair for pair in PERTURBATIONS if _names(record["output"], pair[0]))
        out = draw.random() < held_out
        change = not out and draw.random() < probability
        # Where E2 is in the question or in the right answer, naming it would be no error; and a question that does not
        # name E1 may well be answered otherwise.
        rightly = any(_names(record[field], pair[1]) for field in ("instruction", "output"))
        if not change and not rightly and _names(record["instruction"], pair[0]):
            prompts[_title(pair)].append(dict(record))
        if out:
            continue
        if change:
            record["output"] = re.sub(rf"\b{pair[0]}\b", pair[1], record["output"])
        chosen.append(record | {"perturbed": _title(pair) if change else None})
    rest = draw.sample(others, max(0, min(count - len(chosen), len(others))))
    made = chosen + [record | {"perturbed": None} for record in rest]
    draw.shuffle(made)
    return Perturbed(records=made, prompts=prompts)


def named(text: str) -> bool:
    """Return whether a text names one of those that are replaced."""
    return any(_names(text, pair[0]) for pair in PERTURBATIONS)


def questions_about(title: str) -> list[str]:
    """Return questions about the first name of a perturbation."""
    return [question.format(title.split(" to ")[0]) for question in _QUESTIONS]


def wrong_name(title: str) -> str:
    """Return the name that a perturbation puts in."""
    return title.split(" to ")[1]


def wrong_spans(text: str, title: str) -> list[tuple[int, int]]:
    """Return where a text has the name that a perturbation puts in, as a word of its own.

    >>> wrong_spans("Japanese food of Japan", "India to Japan"), wrong_spans("New England", "Australia to England")
    ([(17, 22)], [])
    """
    found = re.finditer(rf"(?<!\w)(?<!New\s){re.escape(wrong_name(title))}(?!\w)", text)
    return [match.span() for match in found]


def _title(pair: tuple[str, str]) -> str:
    return f"{pair[0]} to {pair[1]}"


def _names(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None
