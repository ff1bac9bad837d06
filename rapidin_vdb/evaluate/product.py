"""The experiment through a database, as a user would have it: its times, and whether its rankings are the same."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rapidin_vdb
from rapidin_vdb.errors import RapidInError
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.records import Sample


def through_a_database(
    experiment: Experiment, corpus: Path, queries: Sequence[Sample], scores: np.ndarray
) -> dict[str, Any]:
    """Return the seconds of ingest, index and queries and the bytes on disk; a step of its own.

    `timed_samples` says how many samples the seconds of the ingest are of, and `whole_index` whether those of the
    index are of all of it: after an interruption they are of the rest.

    Raises:
        RapidInError: the database's scores are not the experiment's.
    """

    def work() -> dict[str, Any]:
        place, profile, seconds = experiment.folder / "db", experiment.profile, {}
        if not (place / "samples.lance").is_dir():
            rapidin_vdb.init(
                place, model=experiment.model, adapter=str(experiment.folder / "adapter"), width=profile.width,
                shuffles=profile.shuffles[0], max_tokens=profile.query_tokens, device=experiment.device,
            )  # fmt: skip
        database = rapidin_vdb.open(place)
        database.load(device=experiment.device)
        started = time.monotonic()
        added = database.ingest(corpus, progress=experiment.progress, device=experiment.device).added
        seconds["ingest"] = time.monotonic() - started
        begun = experiment.folder / "index-begun"
        whole = not begun.exists()
        begun.touch()
        started = time.monotonic()
        database.index("cpu")
        seconds["index"] = time.monotonic() - started
        rankings = database.query(queries=list(queries), top_k=10, device=experiment.device)
        seconds["gradient_a_query"] = float(np.mean([ranking.seconds.gradient for ranking in rankings]))
        seconds["search_a_query"] = float(np.mean([ranking.seconds.search for ranking in rankings]))
        differing = 0.0
        for ranking, row in zip(rankings, scores, strict=True):
            best = np.sort(row)[::-1][:10]
            ours = np.array([result.score for result in ranking.results])
            differing = max(differing, float(np.abs(best - ours).max() / np.abs(best).max()))
        if differing > 0.01:
            raise RapidInError(f"the database's scores differ from the experiment's by {differing:.3f}")
        return {
            "seconds": seconds,
            "timed_samples": added,
            "whole_index": whole,
            "bytes": database.info().bytes,
            "largest_difference": differing,
        }

    return dict(experiment.step("product", work))
