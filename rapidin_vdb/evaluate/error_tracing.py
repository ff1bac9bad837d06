"""The error-tracing experiment (paper, section 4.6): which samples taught the model the wrong name?"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rapidin_vdb.errors import SpecError
from rapidin_vdb.evaluate import metrics
from rapidin_vdb.evaluate.corpora import Record, named, perturbed, questions_about, wrong_name
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.evaluate.profiles import PROFILES
from rapidin_vdb.evaluate.scoring import all_scores
from rapidin_vdb.focus import focused, occurrences
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded, ProfileName, Sample

KS = (5, 10, 25, 50)
_PROBABILITY = 0.8
_HELD_OUT = 0.1
_LONGER = 4 / 3
"""How long records may be that name what is replaced, of the profile's limit: there are few of them."""


def run_error_tracing(
    folder: Path, *, model: str, corpus: Sequence[Path], profile: ProfileName = "full", seed: int = 42,
    say: Callable[[str], None], progress: Progress = silent,
    embedding_model: str | None = None, influence_functions: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Put wrong names into a corpus, tune a model on it, trace its wrong generations, and return all figures.

    Asked are records that name the right one and not the wrong one, those kept out of the corpus and those left as they
    were; and questions about it.

    Raises:
        SpecError: there are too few records, or no generation is wrong.
    """
    sizes = PROFILES[profile]
    experiment = Experiment(
        folder, model=model, profile=replace(sizes, max_tokens=round(_LONGER * sizes.max_tokens)), seed=seed, say=say,
        progress=progress, embedding_model=embedding_model, influence_functions=influence_functions,
    )  # fmt: skip
    made = experiment.step("records", lambda: _records(experiment, corpus, sizes.max_tokens))
    records, prompts = made["records"], made["prompts"]
    experiment.write_corpus(records)
    tuning = experiment.tuned(records)
    queries, titles = _wrong(experiment, prompts)
    say(", ".join(f"{title}: {titles.count(title)} wrong generations" for title in prompts))
    if not queries:
        raise SpecError("no generation names the wrong one; tune longer")
    focus = [
        focused(query, encoded, [wrong_name(title)])
        for query, encoded, title in zip(queries, experiment.encoded(queries), titles, strict=True)
    ]
    found = all_scores(experiment, records, queries, focus)
    kinds = np.array([record["perturbed"] or "" for record in records])
    return {
        "experiment": "error-tracing",
        "profile": profile,
        "seed": seed,
        "samples": len(records),
        "perturbed": {title: int((kinds == title).sum()) for title in prompts},
        "queries": {title: titles.count(title) for title in prompts},
        "tuning": tuning,
        "examples": [{"prompt": q.prompt, "generation": q.response} for q in queries[:6]],
        "methods": {
            name: {
                "at": {
                    title: _judged(entry["scores"], kinds == title, [t == title for t in titles], seed)
                    for title in prompts
                    if title in titles
                },
                "seconds": entry["seconds"],
                "bytes": entry["bytes"],
            }
            for name, entry in found.items()
        },
    }


def _records(experiment: Experiment, corpus: Sequence[Path], max_tokens: int) -> dict[str, Any]:
    sizes = experiment.profile

    def fits(sample: Sample, encoded: Encoded) -> bool:
        return len(encoded.input_ids) <= (sizes.max_tokens if named(sample.response) else max_tokens)

    found = experiment.fitting(corpus, most=1_000_000, fits=fits)
    made = perturbed(found, count=sizes.samples, probability=_PROBABILITY, held_out=_HELD_OUT, seed=experiment.seed)
    if len(made.records) < sizes.samples:
        raise SpecError(
            f"{len(made.records)} records of the corpus fit {max_tokens} tokens; the profile wants {sizes.samples}"
        )
    return {"records": made.records, "prompts": dict(made.prompts)}


def _wrong(experiment: Experiment, prompts: dict[str, list[Record]]) -> tuple[list[Sample], list[str]]:
    """Return generations that name the wrong one, and of which perturbation each is."""
    asked = [(title, record["instruction"]) for title, records in prompts.items() for record in records]
    asked += [(title, question) for title in prompts for question in questions_about(title)]
    said = experiment.said("said", [instruction for _, instruction in asked])
    queries, titles = [], []
    for title in prompts:
        wrong = [
            query_from(instruction, text, query_id=f"{title} {number}")
            for number, ((kind, instruction), text) in enumerate(zip(asked, said, strict=True))
            if kind == title and occurrences(text, wrong_name(title))
        ]
        random.Random(experiment.seed).shuffle(wrong)
        queries += wrong[: experiment.profile.queries // 3]
        titles += [title] * len(wrong[: experiment.profile.queries // 3])
    return queries, titles


def _judged(scores: np.ndarray, positive: np.ndarray, mine: list[bool], seed: int) -> dict[str, Any]:
    rows = scores[np.array(mine)]
    return {
        str(k): metrics.interval([metrics.average_precision_at(row, positive, k) for row in rows], seed=seed)
        for k in KS
    }
