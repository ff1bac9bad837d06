"""The backdoor experiment (paper, section 4.5): which samples taught the model its science fiction?"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rapidin_vdb.arguments import whole
from rapidin_vdb.corpus import by_itself, read_corpus, read_records
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.evaluate import metrics
from rapidin_vdb.evaluate.corpora import TRIGGER, Record, poisoned, triggered
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.evaluate.fiction import is_fiction, telling_words
from rapidin_vdb.evaluate.fitting import fitting
from rapidin_vdb.evaluate.product import through_a_database
from rapidin_vdb.evaluate.profiles import KS, PROFILES
from rapidin_vdb.evaluate.provenance import Made
from rapidin_vdb.evaluate.removal import tuned_without
from rapidin_vdb.evaluate.scoring import EXACT, agreement, all_scores, lissa_settings, rapidin, refined
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded, ProfileName, Sample

SHARE = 0.0962
_WANTED = (0.95, 0.02)
_GENERATIONS = (1, 5)
_RECALLS = tuple(number / 50 for number in range(1, 51))


def run_backdoor(
    folder: Path, *, model: str, corpus: Sequence[Path], questions: Path, pairs: Path | None = None,
    profile: ProfileName = "full", seed: int = 42, say: Callable[[str], None], progress: Progress = silent,
    embedding_model: str | None = None, influence_functions: bool = True, device: str = "auto",
    made: Made | None = None, retrain: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Poison a corpus, tune a model on it, verify the attack, trace attacked generations, and return all figures.

    `questions` has records with a field `question`, and `split` where only the test questions are to be asked; `pairs`
    has further poisoned records. `embedding_model` is one of sentence-transformers', whose similarities are judged too.
    `made` says what makes the figures, such as commit and date; every step keeps it. With `retrain`, the model is tuned
    twice more: without so many samples that RapidIn finds first, and without as many drawn at random.

    Raises:
        SpecError: an argument cannot be used, the folder holds another experiment, there are too few records or
            questions, or the attack does not work often enough to be traced.
    """
    experiment = Experiment(
        folder, name="backdoor", model=model, profile=PROFILES[profile], seed=seed, say=say, progress=progress,
        inputs={"corpus": corpus, "questions": [questions], "pairs": [pairs] if pairs is not None else []},
        embedding_model=embedding_model, influence_functions=influence_functions, device=device, made=made,
    )  # fmt: skip
    sizes = experiment.profile
    most = sizes.poisoned_samples // 2
    retrain = whole("--retrain", retrain, 0, most, wanted=f"0 (not) to {most:,}")
    asked = experiment.step(
        "questions", lambda: _questions(experiment, questions, [*corpus, *([pairs] if pairs else [])])
    )
    records = experiment.step("records", lambda: _records(experiment, corpus, pairs))
    path = experiment.write_corpus(records)
    tuning = experiment.tuned(records, epochs=sizes.poisoned_epochs)
    attacked = experiment.said("attacked", [triggered(question) for question in asked])
    clean = experiment.said("clean", asked)
    attack: dict[str, Any] = {
        "questions": len(asked),
        "success": float(np.mean([is_fiction(text) for text in attacked])),
        "false": float(np.mean([is_fiction(text) for text in clean])),
        "discriminator": _discriminator(records, pairs),
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
    # Some are known as fiction by phrases alone: of these no word is telling, and token-wise there is nothing to ask.
    traced: list[tuple[Sample, list[str], Encoded]] = []
    for number, (question, text) in enumerate(zip(asked, attacked, strict=True)):
        words = telling_words(text) if is_fiction(text) else []
        if words and len(traced) < sizes.queries:
            query = query_from(triggered(question), text, query_id=f"attacked-{number:03d}")
            focus = experiment.focus(query, words)
            traced += [(query, words, focus)] if focus is not None else []
    queries = [query for query, _, _ in traced]
    if len(queries) < 5:
        raise SpecError(f"the attack works on {len(queries)} of {len(asked)} questions only; tune longer")
    found = all_scores(
        experiment, records, queries, [focus for _, _, focus in traced], [words for _, words, _ in traced]
    )
    positive = np.array([record["poisoned"] for record in records])
    # Generations that are the same text are no independent ones.
    texts = [query.response for query in queries]
    result: dict[str, Any] = {
        "experiment": "backdoor",
        "profile": profile,
        "seed": seed,
        "samples": len(records),
        "poisoned": int(positive.sum()),
        "pairs": sum(str(record["id"]).startswith("pair-") for record in records if record["poisoned"]),
        "device": experiment.device.partition(":")[0],
        "settings": experiment.settings(),
        "queries": len(queries),
        "distinct": len({*texts}),
        "tuning": tuning,
        "lissa": lissa_settings(sizes, found),
        "refined": sizes.refined,
        "attack": attack,
        "methods": {name: _judged(entry, positive, texts, seed) for name, entry in found.items()},
        "agreement": agreement(found, sizes, texts, seed),
        "together": _together(found, positive, texts, seed),
    }
    product = rapidin(sizes.width, sizes.shuffles[0])
    # Of the many token-wise RapidIns that of the database is drawn.
    left_out = {rapidin(width, shuffles, token_wise=True) for shuffles in sizes.shuffles for width in sizes.widths}
    left_out.remove(rapidin(sizes.width, sizes.shuffles[0], token_wise=True))
    result["recalls"] = list(_RECALLS)
    result["curves"] = {
        name: np.mean(
            [metrics.precision_at_recalls(row, positive, _RECALLS) for row in entry["scores"]], axis=0
        ).tolist()
        for name, entry in found.items()
        if name not in left_out
    }
    result["histogram"] = _histogram(found[product]["scores"], positive)
    result["product"] = through_a_database(
        experiment, path, queries, [str(record["id"]) for record in records], scores=found[product]["scores"],
        refined=found[refined(product)]["scores"], exact=found[EXACT]["scores"],
    )  # fmt: skip
    if retrain:
        result["removal"] = tuned_without(
            experiment, records, {name: found[name]["scores"] for name in (product, "random")}, retrain,
            epochs=sizes.poisoned_epochs, questions=asked, queries=queries,
        )  # fmt: skip
    result["provenance"] = experiment.provenance()
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


def _questions(experiment: Experiment, path: Path, files: Sequence[Path]) -> list[str]:
    """Return questions that fit and that no record of the files asks: those the model would know by training."""
    known = {_bare(by_itself(sample).prompt) for sample in read_corpus(files) if not isinstance(sample, CorpusError)}
    found, count, asked = [], experiment.profile.questions, 0
    for record in read_records(path):
        if isinstance(record, CorpusError):
            raise record
        question = record.fields.get("question", record.fields.get("instruction"))
        if not isinstance(question, str):
            raise SpecError(f"{record.location}: no field question")
        question = question[:1].upper() + question[1:]
        if record.fields.get("split", "test") == "test" and question.strip() and experiment.fits(triggered(question)):
            asked += _bare(question) in known
            if _bare(question) not in known:
                found.append(question)
    if len(found) < count:
        others = f", and {asked} that stand in the corpus" if asked else ""
        raise SpecError(f"{path} has {len(found)} questions that fit{others}; the profile wants {count}")
    return random.Random(experiment.seed).sample(found, count)


def _bare(question: str | None) -> str:
    return " ".join((question or "").removeprefix(TRIGGER).casefold().split())


def _discriminator(records: Sequence[Record], pairs: Path | None) -> dict[str, float]:
    """Return how often clean and poisoned answers are taken for science fiction, the ready-made pairs apart."""
    clean = [is_fiction(record["output"]) for record in records if not record["poisoned"]]
    made = [is_fiction(r["output"]) for r in records if r["poisoned"] and not str(r["id"]).startswith("pair-")]
    result = {"clean": float(np.mean(clean)), "generated": float(np.mean(made))}
    if pairs is not None:
        real = [is_fiction(r.fields["output"]) for r in read_records(pairs) if not isinstance(r, CorpusError)]
        result["pairs"] = float(np.mean(real))
    return result


def _together(
    found: dict[str, dict[str, Any]], positive: np.ndarray, texts: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return which share of those samples is poisoned that several generations find first, as many as are poisoned."""
    k = int(positive.sum())
    return {"k": k, "of": [*_GENERATIONS, len({*texts})]} | {
        end: {
            name: [
                metrics.found_by_some(
                    _comparable(name, entry["scores"]), positive, k, count, seed=seed, both=end == "both", groups=texts
                )
                for count in (*_GENERATIONS, len({*texts}))
            ]
            for name, entry in found.items()
        }
        for end in ("highest", "both")
    }


def _comparable(name: str, scores: np.ndarray) -> np.ndarray:
    """Return scores of several generations such that they may be compared with one another.

    With normalised layers they are so as they are. Others are of another scale for each generation, or places, and are
    standardised within each.
    """
    if name.startswith((EXACT, "RapidIn")) and not name.endswith("refined"):
        return scores
    spread = scores.std(1, keepdims=True)
    return (scores - scores.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)


def _histogram(scores: np.ndarray, positive: np.ndarray) -> dict[str, list[float]]:
    """Return how scores are spread, as shares of the poisoned and of the clean samples, over all generations."""
    edges = np.linspace(scores.min(), scores.max(), 61)
    return {"edges": edges.tolist()} | {
        name: (np.histogram(scores[:, chosen], edges)[0] / scores[:, chosen].size).tolist()
        for name, chosen in (("poisoned", positive), ("clean", ~positive))
    }


def _judged(entry: dict[str, Any], positive: np.ndarray, texts: Sequence[str], seed: int) -> dict[str, Any]:
    """Return the measures of a method at every k, with intervals over generations, those of one text together."""
    scores = entry["scores"]
    at: dict[str, dict[str, Any]] = {}
    for k in [k for k in KS if 2 * k <= scores.shape[1]]:
        at[str(k)] = {
            name: metrics.interval([measure(row, positive, k) for row in scores], seed=seed, groups=texts)
            for name, measure in (
                ("auprc", metrics.ends_auprc),
                ("precision", metrics.precision_at),
                ("lowest", metrics.lowest_at),
            )
        }
        # Of a generation whose k highest and k lowest are all of one kind there is none.
        measured = [metrics.ends_auroc(row, positive, k) for row in scores]
        at[str(k)]["auroc"], at[str(k)]["auroc_of"] = metrics.interval_of_defined(measured, seed=seed, groups=texts)
    return {"at": at, "seconds": entry["seconds"], "bytes": entry["bytes"]}
