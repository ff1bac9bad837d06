"""The experiment through a database, as a user would have it: its times, and whether its rankings are the same."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rapidin_vdb
from rapidin_vdb.errors import RapidInError
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.records import Sample
from rapidin_vdb.results import RankedSample, Ranking


def through_a_database(
    experiment: Experiment, corpus: Path, queries: Sequence[Sample], sample_ids: Sequence[str], *, scores: np.ndarray,
    refined: np.ndarray, exact: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """Return the seconds of ingest, index and queries and the bytes on disk; a step of its own.

    `scores`, `refined` and `exact` are the experiment's, [queries, samples], of the samples with those ids.
    `timed_samples` says how many samples the seconds of the ingest are of, and `whole_index` whether those of the
    index are of all of it: after an interruption they are of the rest. `refined_queries` are those that were also
    ranked again at both ends, for the seconds of `refine_a_query`.

    Raises:
        RapidInError: the database's scores are not the experiment's.
    """

    def work() -> dict[str, Any]:
        place, profile, seconds = experiment.folder / "db", experiment.profile, {}
        begun = experiment.folder / "index-begun"
        if not (place / "samples.lance").is_dir():
            begun.unlink(missing_ok=True)  # of a database that was here before
            rapidin_vdb.init(
                place, model=experiment.model, adapter=str(experiment.folder / "adapter"), width=profile.width,
                shuffles=profile.shuffles[0], seed=experiment.seed,
                # Cut as samples were for the tuning: a poisoned answer may be longer than the one it stands for.
                max_tokens=profile.max_tokens, device=experiment.device,
            )  # fmt: skip
        database = rapidin_vdb.open(place)
        database.load(device=experiment.device)
        started = time.monotonic()
        added = database.ingest(corpus, progress=experiment.progress, device=experiment.device).added
        seconds["ingest"] = time.monotonic() - started
        whole = not begun.exists()
        begun.touch()
        started = time.monotonic()
        database.index("cpu")
        seconds["index"] = time.monotonic() - started
        rankings = database.query(queries=list(queries), top_k=10, device=experiment.device)
        seconds["gradient_a_query"] = float(np.mean([ranking.seconds.gradient for ranking in rankings]))
        seconds["search_a_query"] = float(np.mean([ranking.seconds.search for ranking in rankings]))
        places = {name: number for number, name in enumerate(sample_ids)}
        differing = max(_difference(ranking, row, places) for ranking, row in zip(rankings, scores, strict=True))
        if differing > 0.01:
            raise RapidInError(f"the database's scores differ from the experiment's by {differing:.3f}")
        again = list(queries[: profile.refined_queries])
        count = min(profile.refined, len(sample_ids) // 2)
        rankings = database.query(
            queries=again, top_k=min(10, count), both=True, refine=count, device=experiment.device
        )
        seconds["refine_a_query"] = float(np.mean([ranking.seconds.tokens for ranking in rankings]))
        for ranking, row, truth in zip(rankings, refined[: len(again)], exact[: len(again)], strict=True):
            _compare(ranking, np.argsort(-row, kind="stable"), truth, places)
        return {
            "seconds": seconds,
            "timed_samples": added,
            "whole_index": whole,
            "bytes": database.info().bytes,
            "largest_difference": differing,
            "refined_queries": len(again),
        }

    return dict(experiment.step("product", work))


def _difference(ranking: Ranking, scores: np.ndarray, places: Mapping[str, int]) -> float:
    """Return how far a ranking's samples and scores are from the experiment's best, relative to the best of all."""
    best = np.sort(scores)[::-1][: len(ranking.results)]
    ours = np.array([result.score for result in ranking.results])
    theirs = scores[[places[result.sample_id] for result in ranking.results]]
    return float(max(np.abs(ours - best).max(), np.abs(ours - theirs).max()) / np.abs(best).max())


def _compare(ranking: Ranking, order: np.ndarray, exact: np.ndarray, places: Mapping[str, int]) -> None:
    """See that a database ranks both ends again as the experiment does: by exact scores that are the experiment's.

    Raises:
        RapidInError: it does not.
    """
    largest = float(np.abs(exact).max())
    assert ranking.harmful is not None
    for end, wanted in ((ranking.results, order), (ranking.harmful, order[::-1])):
        for result, number in zip(end, wanted[: len(end)], strict=True):
            assert isinstance(result, RankedSample) and result.exact_score is not None
            # Neighbours may change places by a rounding, but no score may be another.
            others = (exact[places[result.sample_id]], exact[number])
            if max(abs(result.exact_score - other) for other in others) > 0.001 * largest:
                raise RapidInError(
                    f"a database's exact score of {result.sample_id} at rank {result.rank} is "
                    f"{result.exact_score:.4f}; the experiment's is {others[0]:.4f}, and {others[1]:.4f} at that rank"
                )
