"""Everybody's scores of the same samples for the same generations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rapidin_vdb.evaluate import gradients, methods
from rapidin_vdb.evaluate.corpora import Record
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.gradient import LoadedModel, RapidGradMaker, load_model
from rapidin_vdb.records import Encoded, ModelSpec, Sample, SketchSpec


def all_scores(
    experiment: Experiment, records: Sequence[Record], queries: Sequence[Sample], focused: Sequence[Encoded]
) -> dict[str, dict[str, Any]]:
    """Return every method's scores, seconds and stored bytes; `focused` are the queries on their telling words."""
    profile = experiment.profile
    samples, asked = experiment.samples(records), experiment.encoded(queries)
    documents = [f"{record['instruction']} {record['output']}" for record in records]
    texts = [f"{query.prompt} {query.response}" for query in queries]
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, work: Callable[[], np.ndarray], size: int) -> None:
        scores, seconds = experiment.scores(name, work)
        found[name] = {"scores": scores, "seconds": seconds, "bytes": size}

    add("random", lambda: methods.random_scores(len(queries), len(records), seed=experiment.seed), 0)
    add("BM25", lambda: methods.bm25_scores(documents, texts), 0)
    hidden = int(experiment.loaded().model.config.hidden_size)
    base = load_model(ModelSpec(model=experiment.model, parameters="lm_head|embed"))
    add("embedding (base model)", lambda: methods.hidden_scores(base, samples, asked), 4 * hidden * len(records))
    loaded = experiment.loaded()
    add("hidden state (tuned)", lambda: methods.hidden_scores(loaded, samples, asked), 4 * hidden * len(records))
    _gradient_scores(experiment, add, loaded, samples, asked, focused)
    assert set(found) >= {"random", "BM25", "TracIn + LN", _rapidin(profile.width, profile.shuffles[0])}
    return found


def _gradient_scores(
    experiment: Experiment, add: Callable[[str, Callable[[], np.ndarray], int], None], loaded: LoadedModel,
    samples: list[Encoded], asked: list[Encoded], focused: Sequence[Encoded],
) -> None:  # fmt: skip
    profile = experiment.profile
    length = sum(shape.count for shape in loaded.shapes)
    lengths = [shape.count for shape in loaded.shapes]
    widest = max(profile.widths)
    maker = RapidGradMaker(loaded, spec=SketchSpec(width=widest, shuffles=profile.shuffles[0]), normalize="layer")
    full = gradients.FullGradients(maker, samples, progress=experiment.progress)
    cache: dict[str, Any] = {}

    def directions() -> tuple[dict, np.ndarray]:
        if "directions" not in cache:
            cache["directions"] = full.directions(asked)
        return cache["directions"]

    def products() -> tuple[np.ndarray, np.ndarray]:
        if "products" not in cache:
            cache["products"] = full.products(directions()[0])
        return cache["products"]

    whole = 4 * length * len(samples)
    add("TracIn", lambda: gradients.tracin(products()[0]), whole)
    add("TracIn + LN", lambda: gradients.tracin_normalised(*products(), directions()[1]), whole)
    add("influence function (DataInf)", lambda: gradients.datainf(full, *products(), lengths), whole)
    if profile.lissa_depth:
        add(
            "influence function (LiSSA)",
            lambda: gradients.lissa(
                full, maker, samples, directions()[0], depth=profile.lissa_depth, batch=profile.lissa_batch,
                damping=0.01, seed=experiment.seed, progress=experiment.progress,
            ),
            whole,
        )  # fmt: skip
    cache.clear()
    for shuffles in profile.shuffles:
        other = maker
        if shuffles != maker.spec.shuffles:
            other = RapidGradMaker(loaded, spec=SketchSpec(width=widest, shuffles=shuffles), normalize="layer")

        def sketched(other: RapidGradMaker = other) -> dict[int, np.ndarray]:
            if "sketched" not in cache:
                cache["sketched"] = gradients.sketched(
                    other, samples, asked, profile.widths, progress=experiment.progress
                )
            return cache["sketched"]

        for width in profile.widths:
            add(
                _rapidin(width, shuffles),
                lambda width=width, sketched=sketched: sketched()[width],  # type: ignore[misc]
                2 * width * len(samples),
            )
        cache.clear()
    narrow = RapidGradMaker(
        loaded, spec=SketchSpec(width=profile.width, shuffles=profile.shuffles[0]), normalize="layer"
    )
    add(
        f"{_rapidin(profile.width, profile.shuffles[0])}, token-wise",
        lambda: gradients.sketched(narrow, samples, focused, [profile.width], progress=experiment.progress)[
            profile.width
        ],
        2 * profile.width * len(samples),
    )


def _rapidin(width: int, shuffles: int) -> str:
    return f"RapidIn (K = {width:,}, lambda = {shuffles})"
