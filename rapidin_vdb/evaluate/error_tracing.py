"""The error-tracing experiment (paper, section 4.6): which samples taught the model the wrong name?"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rapidin_vdb.corpus import Template
from rapidin_vdb.corpus.encode import Tokenizer
from rapidin_vdb.errors import SpecError
from rapidin_vdb.evaluate import metrics
from rapidin_vdb.evaluate.corpora import Record, named, perturbed, questions_about, wrong_name, wrong_spans
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.evaluate.fitting import fitting
from rapidin_vdb.evaluate.profiles import PROFILES, Profile
from rapidin_vdb.evaluate.provenance import Made
from rapidin_vdb.evaluate.scoring import agreement, all_scores, lissa_settings
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded, ProfileName, Sample

KS = (5, 10, 25, 50)
_PROBABILITY = 0.8
_HELD_OUT = 0.1
_DRAWS, _TEMPERATURE = 16, 0.6


def run_error_tracing(
    folder: Path, *, model: str, corpus: Sequence[Path], profile: ProfileName = "full", seed: int = 42,
    say: Callable[[str], None], progress: Progress = silent,
    embedding_model: str | None = None, influence_functions: bool = True, device: str = "auto",
    made: Made | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Put wrong names into a corpus, tune a model on it, trace its wrong generations, and return all figures.

    Asked are records that name the right one and not the wrong one, those kept out of the corpus and those left as they
    were; and questions about it. Where too few of the most likely answers are wrong, answers are drawn. `made` says
    what makes the figures, such as commit and date; every step keeps it.

    Raises:
        SpecError: an argument cannot be used, the folder holds another experiment, there are too few records, or no
            generation is wrong.
    """
    experiment = Experiment(
        folder, name="error-tracing", model=model, profile=PROFILES[profile], seed=seed, say=say, progress=progress,
        inputs={"corpus": corpus}, embedding_model=embedding_model, influence_functions=influence_functions,
        device=device, made=made,
    )  # fmt: skip
    corpora = experiment.step(
        "records",
        lambda: traced_records(
            corpus, tokenizer=experiment.tokenizer, template=experiment.template, profile=experiment.profile, seed=seed
        ),
    )
    records, prompts = corpora["records"], corpora["prompts"]
    experiment.write_corpus(records)
    tuning = experiment.tuned(records, epochs=experiment.profile.traced_epochs)
    wrong, looked = _wrong(experiment, prompts)
    control = _control(experiment, prompts)
    queries, titles = [traced.query for traced in wrong], [traced.title for traced in wrong]
    say(", ".join(f"{title}: {titles.count(title)} wrong generations" for title in prompts))
    if not queries:
        raise SpecError("no generation names the wrong one; tune longer")
    told = [[wrong_name(title)] for title in titles]
    found = all_scores(experiment, records, queries, [traced.focus for traced in wrong], told)
    kinds = np.array([record["perturbed"] or "" for record in records])
    asked = {
        title: {number: query.prompt or "" for number, query in enumerate(queries) if titles[number] == title}
        for title in prompts
    }
    return {
        "experiment": "error-tracing",
        "profile": profile,
        "seed": seed,
        "samples": len(records),
        "perturbed": {title: int((kinds == title).sum()) for title in prompts},
        "queries": {title: titles.count(title) for title in prompts},
        "questions": len({query.prompt for query in queries}),
        "distinct": len({query.response for query in queries}),
        "looked_at": looked,
        "control": control,
        "temperature": _TEMPERATURE,
        "tuning": tuning,
        "settings": experiment.settings(),
        "lissa": lissa_settings(experiment.profile, found),
        "refined": experiment.profile.refined,
        "provenance": experiment.provenance(),
        "examples": [
            {"prompt": query.prompt, "generation": query.response}
            for title in prompts
            for query in [query for query, other in zip(queries, titles, strict=True) if other == title][:2]
        ],
        "agreement": agreement(found, experiment.profile, [query.prompt or "" for query in queries], seed),
        "methods": {
            name: {
                "at": {
                    title: _judged(entry["scores"], kinds == title, asked[title], seed)
                    for title in prompts
                    if title in titles
                },
                "seconds": entry["seconds"],
                "bytes": entry["bytes"],
            }
            for name, entry in found.items()
        },
    }


def traced_records(
    corpus: Sequence[Path], *, tokenizer: Tokenizer, template: Template, profile: Profile, seed: int
) -> dict[str, Any]:
    """Return the records of the experiment with their perturbations, and those that are asked of each.

    Raises:
        SpecError: too few records fit.
    """

    def fits(sample: Sample, encoded: Encoded) -> bool:
        return len(encoded.input_ids) <= (profile.max_tokens if named(sample.response) else profile.plain_tokens)

    found = fitting(corpus, tokenizer=tokenizer, template=template, most=1_000_000, fits=fits)
    count = profile.traced_samples
    made = perturbed(found, count=count, probability=_PROBABILITY, held_out=_HELD_OUT, seed=seed)
    if len(made.records) < count:
        raise SpecError(
            f"{len(made.records)} records of the corpus fit {profile.plain_tokens} tokens; the profile wants {count}"
        )
    return {"records": made.records, "prompts": dict(made.prompts)}


class _Traced(NamedTuple):
    """A generation that names the wrong one."""

    query: Sample
    title: str
    """The perturbation."""
    focus: Encoded
    """On the wrong name alone."""


def _wrong(experiment: Experiment, prompts: dict[str, list[Record]]) -> tuple[list[_Traced], dict[str, int]]:
    """Return generations that name the wrong one, and how many were looked at for each perturbation.

    First the most likely answers; where too few of them are wrong, others are drawn.
    """
    asked = _asked(prompts)
    wanted, found = experiment.profile.queries // 3, {title: dict[tuple[str, str], _Traced]() for title in prompts}
    looked = dict.fromkeys(prompts, 0)
    for draw in range(_DRAWS + 1):
        lacking = [title for title in prompts if len(found[title]) < wanted]
        every = [(title, question) for title in lacking for question in asked[title]]
        said = experiment.said(
            f"said-{draw}", [question for _, question in every], temperature=_TEMPERATURE if draw else 0.0,
            seed=experiment.seed + 1000 * draw,
        )  # fmt: skip
        order = list(range(len(every)))
        random.Random(experiment.seed + draw).shuffle(order)
        for number in order:
            (title, question), text = every[number], said[number]
            if len(found[title]) == wanted:
                continue
            looked[title] += 1
            spans = wrong_spans(text, title)
            if spans and (question, text) not in found[title]:
                query = query_from(question, text, query_id=f"{title} {len(found[title]) + 1}")
                focus = experiment.focus(query, spans)
                if focus is not None:
                    found[title][question, text] = _Traced(query, title, focus)
        if all(len(traced) == wanted for traced in found.values()):
            break
    return [traced for title in prompts for traced in found[title].values()], looked


def _asked(prompts: dict[str, list[Record]]) -> dict[str, list[str]]:
    """Return the questions of each perturbation."""
    return {title: [r["instruction"] for r in records] + questions_about(title) for title, records in prompts.items()}


def _control(experiment: Experiment, prompts: dict[str, list[Record]]) -> dict[str, dict[str, int]]:
    """Return how many of the most likely answers name the wrong one, of the tuned model and of the base model."""
    every = [(title, question) for title, questions in _asked(prompts).items() for question in questions]
    questions = [question for _, question in every]
    said = {
        "tuned": experiment.said("said-0", questions),
        "base": experiment.said("said-by-base", questions, base=True),
    }
    return {
        title: {"asked": sum(of == title for of, _ in every)}
        | {
            who: sum(bool(wrong_spans(text, title)) for (of, _), text in zip(every, texts, strict=True) if of == title)
            for who, texts in said.items()
        }
        for title in prompts
    }


def _judged(scores: np.ndarray, positive: np.ndarray, asked: dict[int, str], seed: int) -> dict[str, Any]:
    """Return the measures at every k of the rows that are `asked`, by number, with their questions."""
    rows, groups = scores[list(asked)], list(asked.values())
    return {
        str(k): {
            name: metrics.interval([measure(row, positive, k) for row in rows], seed=seed, groups=groups)
            for name, measure in (
                ("proportion", metrics.precision_at),
                ("average_precision", metrics.average_precision_at),
            )
        }
        for k in KS
    }
