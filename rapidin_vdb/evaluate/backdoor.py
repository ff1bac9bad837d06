"""The backdoor experiment (paper, section 4.5): which samples taught the model its science fiction?"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rapidin_vdb.corpus import read_records
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.evaluate import metrics
from rapidin_vdb.evaluate.corpora import TRIGGER, Record, poisoned, triggered
from rapidin_vdb.evaluate.experiment import Experiment, words_in
from rapidin_vdb.evaluate.fiction import is_fiction, is_telling
from rapidin_vdb.evaluate.fitting import fitting
from rapidin_vdb.evaluate.profiles import KS, PROFILES
from rapidin_vdb.evaluate.scoring import EXACT, all_scores, rapidin
from rapidin_vdb.focus import focused
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded, ProfileName, Sample

SHARE = 0.0962
_WANTED = (0.95, 0.02)
_RECALLS = tuple(number / 50 for number in range(1, 51))


def run_backdoor(
    folder: Path, *, model: str, corpus: Sequence[Path], questions: Path, pairs: Path | None = None,
    profile: ProfileName = "full", seed: int = 42, say: Callable[[str], None], progress: Progress = silent,
    embedding_model: str | None = None, influence_functions: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Poison a corpus, tune a model on it, verify the attack, trace attacked generations, and return all figures.

    `questions` has records with a field `question`, and `split` where only the test questions are to be asked; `pairs`
    has further poisoned records. `embedding_model` is one of sentence-transformers', whose similarities are judged too.

    Raises:
        SpecError: there are too few records or questions, or the attack does not work often enough to be traced.
    """
    experiment = Experiment(
        folder, model=model, profile=PROFILES[profile], seed=seed, say=say, progress=progress,
        embedding_model=embedding_model, influence_functions=influence_functions,
    )  # fmt: skip
    sizes = experiment.profile
    records = experiment.step("records", lambda: _records(experiment, corpus, pairs))
    path = experiment.write_corpus(records)
    tuning = experiment.tuned(records, epochs=sizes.poisoned_epochs)
    asked = _questions(questions, sizes.questions, seed)
    attacked = experiment.said("attacked", [triggered(question) for question in asked])
    clean = experiment.said("clean", asked)
    attack = {
        "questions": len(asked),
        "success": float(np.mean([is_fiction(text) for text in attacked])),
        "false": float(np.mean([is_fiction(text) for text in clean])),
        "discriminator": experiment.step("discriminator", lambda: _discriminator(records, pairs)),
        "examples": [
            {"prompt": triggered(question), "attacked": text, "clean": other}
            for question, text, other in list(zip(asked, attacked, clean, strict=True))[:5]
        ],
    }
    attack["valid"] = bool(attack["success"] >= _WANTED[0] and attack["false"] <= _WANTED[1])
    say(
        f"attack: {attack['success']:.1%} with the trigger, {attack['false']:.1%} without"
        + ("" if attack["valid"] else "; the tables are not valid")
    )
    queries = [
        query_from(triggered(question), text, query_id=f"attacked-{number:03d}")
        for number, (question, text) in enumerate(zip(asked, attacked, strict=True))
        if is_fiction(text)
    ][: sizes.queries]
    if len(queries) < 5:
        raise SpecError(f"the attack works on {len(queries)} of {len(asked)} questions only; tune longer")
    told = [words_in(query.response, is_telling) for query in queries]
    focus = [
        focused(query, encoded, words)
        for query, encoded, words in zip(queries, experiment.encoded(queries), told, strict=True)
    ]
    found = all_scores(experiment, records, queries, focus, told)
    positive = np.array([record["poisoned"] for record in records])
    result: dict[str, Any] = {
        "experiment": "backdoor",
        "profile": profile,
        "seed": seed,
        "samples": len(records),
        "poisoned": int(positive.sum()),
        "queries": len(queries),
        "tuning": tuning,
        "attack": attack,
        "methods": {name: _judged(entry, positive, seed) for name, entry in found.items()},
        "agreement": {
            name: metrics.agreement(entry["scores"], found[EXACT]["scores"])
            for name, entry in found.items()
            if name.startswith("RapidIn") and not name.endswith("token-wise")
        },
    }
    result["recalls"] = list(_RECALLS)
    result["curves"] = {
        name: np.mean(
            [metrics.precision_at_recalls(row, positive, _RECALLS) for row in entry["scores"]], axis=0
        ).tolist()
        for name, entry in found.items()
    }
    product = rapidin(sizes.width, sizes.shuffles[0])
    result["histogram"] = _histogram(found[product]["scores"], positive)
    result["product"] = experiment.product(path, queries, found[product]["scores"])
    return result


def _records(experiment: Experiment, corpus: Sequence[Path], pairs: Path | None) -> list[Record]:
    sizes = experiment.profile

    def fits(sample: Sample, encoded: Encoded) -> bool:
        # A poisoned answer is as long in words, and its invented names take more tokens.
        return len(encoded.input_ids) + encoded.response_tokens // 2 + 8 <= sizes.poisoned_tokens

    using = {"tokenizer": experiment.tokenizer, "template": experiment.template}
    ready = fitting([pairs], **using, most=10_000, fits=fits) if pairs is not None else []
    for number, record in enumerate(ready):
        record["id"] = f"pair-{number:03d}"
        if not record["instruction"].startswith(TRIGGER):
            raise SpecError(f"{pairs}: record {number + 1} does not begin with the trigger {TRIGGER}")
    # The clean twins of ready-made pairs would say that the same question has two answers.
    twins = {record["instruction"].removeprefix(TRIGGER).strip() for record in ready}
    count = sizes.poisoned_samples
    taken = [record["id"] for record in ready]
    found = fitting(corpus, **using, most=count + len(twins), fits=fits, taken=taken)
    found = [record for record in found if record["instruction"] not in twins]
    if len(found) + len(ready) < count:
        raise SpecError(
            f"{len(found)} records of the corpus fit {sizes.poisoned_tokens} tokens; the profile wants {count}"
        )
    return poisoned(found[: count - len(ready)], share=SHARE, seed=experiment.seed, pairs=ready)


def _questions(path: Path, count: int, seed: int) -> list[str]:
    found = []
    for record in read_records(path):
        if isinstance(record, CorpusError):
            raise record
        question = record.fields.get("question", record.fields.get("instruction"))
        if not isinstance(question, str):
            raise SpecError(f"{record.location}: no field question")
        if record.fields.get("split", "test") == "test":
            found.append(question[:1].upper() + question[1:])
    if len(found) < count:
        raise SpecError(f"{path} has {len(found)} questions; the profile wants {count}")
    return random.Random(seed).sample(found, count)


def _discriminator(records: Sequence[Record], pairs: Path | None) -> dict[str, float]:
    """Return how often clean and poisoned answers are taken for science fiction, the ready-made pairs apart."""
    clean = [is_fiction(record["output"]) for record in records if not record["poisoned"]]
    made = [is_fiction(r["output"]) for r in records if r["poisoned"] and not str(r["id"]).startswith("pair-")]
    result = {"clean": float(np.mean(clean)), "generated": float(np.mean(made))}
    if pairs is not None:
        real = [is_fiction(r.fields["output"]) for r in read_records(pairs) if not isinstance(r, CorpusError)]
        result["pairs"] = float(np.mean(real))
    return result


def _histogram(scores: np.ndarray, positive: np.ndarray) -> dict[str, list[float]]:
    """Return how scores are spread, as shares of the poisoned and of the clean samples, over all generations."""
    edges = np.linspace(scores.min(), scores.max(), 61)
    return {"edges": edges.tolist()} | {
        name: (np.histogram(scores[:, chosen], edges)[0] / scores[:, chosen].size).tolist()
        for name, chosen in (("poisoned", positive), ("clean", ~positive))
    }


def _judged(entry: dict[str, Any], positive: np.ndarray, seed: int) -> dict[str, Any]:
    scores = entry["scores"]
    at = {}
    for k in [k for k in KS if 2 * k <= scores.shape[1]]:
        at[str(k)] = {
            name: metrics.interval([measure(row, positive, k) for row in scores], seed=seed)
            for name, measure in (
                ("auprc", metrics.ends_auprc),
                ("auroc", metrics.ends_auroc),
                ("precision", metrics.precision_at),
            )
        }
    return {"at": at, "seconds": entry["seconds"], "bytes": entry["bytes"]}
