"""Was it these? The model is tuned again without the samples that a method finds first, and asked again."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from rapidin_vdb.errors import SpecError
from rapidin_vdb.evaluate import metrics
from rapidin_vdb.evaluate.corpora import Record, triggered
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.evaluate.fiction import is_fiction
from rapidin_vdb.gradient import evaluate_losses
from rapidin_vdb.records import Sample


def tuned_without(
    experiment: Experiment, records: Sequence[Record], scores: Mapping[str, np.ndarray], count: int, *, epochs: float,
    questions: Sequence[str], queries: Sequence[Sample],
) -> dict[str, Any]:  # fmt: skip
    """Tune anew without the `count` samples that each method finds first, and return how often the attack works then.

    `scores` are those of methods, [queries, samples], of the records in their order; each has a folder of its own. The
    loss is that of the traced generations, `queries`, in nats a token.

    Raises:
        SpecError: a folder has an adapter that was tuned without others, or losses of other generations.
    """
    texts = [query.response for query in queries]

    def losses(of: Experiment) -> tuple[float, float, float]:
        def work() -> dict[str, Any]:
            parts = evaluate_losses(of.loaded(), experiment.encoded(queries))
            return {"texts": texts, "losses": [float(part.mean()) for part in parts]}

        found = of.step("losses", work)
        if found["texts"] != texts:
            raise SpecError(f"{of.folder} has losses of other generations; remove its losses.json")
        return metrics.interval(found["losses"], seed=experiment.seed, groups=texts)

    found: dict[str, Any] = {"count": count, "loss_before": losses(experiment), "methods": {}}
    for name, mine in scores.items():
        ids = [str(records[number]["id"]) for number in metrics.found_first(mine, count)]
        part = experiment.part(f"without-{name.split()[0].lower()}")
        if part.step("left-out", partial(list, ids)) != ids:
            raise SpecError(f"{part.folder} has a model that was tuned without other samples; remove that folder")
        gone = {*ids}
        tuning = part.tuned([record for record in records if str(record["id"]) not in gone], epochs=epochs)
        attacked = part.said("attacked", [triggered(question) for question in questions])
        clean = part.said("clean", questions)
        found["methods"][name] = {
            "poisoned": sum(bool(record["poisoned"]) for record in records if str(record["id"]) in gone),
            "success": float(np.mean([is_fiction(text) for text in attacked])),
            "false": float(np.mean([is_fiction(text) for text in clean])),
            "loss": losses(part),
            "steps": tuning["steps"],
        }
    return found
