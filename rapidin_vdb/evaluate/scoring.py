"""Everybody's scores of the same samples for the same generations, in as few passes as it takes."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rapidin_vdb.evaluate import gradients, hessian, methods, metrics
from rapidin_vdb.evaluate.corpora import Record
from rapidin_vdb.evaluate.experiment import Experiment, Kept
from rapidin_vdb.evaluate.profiles import Profile
from rapidin_vdb.gradient import LoadedModel, RapidGradMaker, load_model
from rapidin_vdb.records import Encoded, ModelSpec, Sample, SketchSpec

DATAINF = "influence function (DataInf)"
EXACT, TOLD_EXACT = "TracIn + LN", "TracIn + LN, token-wise"
TOLD_BM25, CONTAINING = "BM25, token-wise", "responses that contain the words"
_DAMPING = 0.01
_DAMPED_BY = 64


def rapidin(width: int, shuffles: int, *, token_wise: bool = False) -> str:
    """Return the name of a RapidIn."""
    return f"RapidIn (K = {width:,}, lambda = {shuffles})" + (", token-wise" if token_wise else "")


def refined(name: str) -> str:
    """Return the name of a RapidIn whose two ends are ranked again by exact scores."""
    return f"{name}, refined"


def lissa(steps: int) -> str:
    """Return the name of LiSSA's influence function: it depends on the steps what that is."""
    return f"influence function (LiSSA, {steps} steps)"


def lissa_settings(profile: Profile, found: Mapping[str, Kept]) -> dict[str, Any]:
    """Return what LiSSA's recursion ran with, and how far its scores are TracIn's: too few steps leave them so."""
    name, settings = lissa(profile.lissa_depth), {"steps": profile.lissa_depth, "samples a step": profile.lissa_batch}
    if name not in found:
        return settings | {"damping": _DAMPING}
    alike = metrics.correlation(found[name]["scores"], found["TracIn"]["scores"])
    return settings | {"damping": _DAMPING, "correlation with TracIn": alike}


def agreement(
    found: Mapping[str, Kept], profile: Profile, groups: Sequence[str], seed: int
) -> dict[str, dict[str, tuple[float, float, float] | None]]:
    """Return how each RapidIn agrees with the exact scores that it estimates, token-wise ones with token-wise ones."""
    return {
        name: metrics.agreement(found[name]["scores"], found[exact]["scores"], seed=seed, groups=groups)
        for told, exact in ((False, EXACT), (True, TOLD_EXACT))
        for shuffles in profile.shuffles
        for width in profile.widths
        for name in [rapidin(width, shuffles, token_wise=told)]
    }


def all_scores(
    experiment: Experiment, records: Sequence[Record], queries: Sequence[Sample], focused: Sequence[Encoded],
    told: Sequence[Sequence[str]],
) -> dict[str, Kept]:  # fmt: skip
    """Return every method's scores, seconds and stored bytes.

    `told` are the words that token-wise methods are told of each query, and `focused` the queries on these words.
    """
    experiment.scores_are_of(records, queries, [sample.focus for sample in focused], told)
    names = _text_scores(experiment, records, queries, told)
    names += _gradient_scores(experiment, experiment.samples(records), experiment.encoded(queries), focused)
    found = {}
    for name in names:
        kept = experiment.kept(name)
        assert kept is not None
        found[name] = kept
    return found


class _Sums(NamedTuple):
    """DataInf's sums, and the seconds that they took: the gradients' and their own."""

    sums: gradients.Directions
    seconds: float


Way = Callable[[], tuple[np.ndarray, int]]
"""Makes a method's scores, and says how many bytes it keeps."""


def _text_scores(
    experiment: Experiment, records: Sequence[Record], queries: Sequence[Sample], told: Sequence[Sequence[str]]
) -> list[str]:
    """Make the scores of methods that look at texts and hidden states, and return their names."""
    documents = [f"{record['instruction']} {record['output']}" for record in records]
    responses = [record["output"] for record in records]
    texts = [f"{query.prompt} {query.response}" for query in queries]
    base = load_model(ModelSpec(model=experiment.model), device=experiment.device, gradients=False)
    tuned = experiment.loaded()
    hidden = 4 * int(base.model.config.hidden_size) * len(records)

    def near(loaded: LoadedModel) -> tuple[np.ndarray, int]:
        return methods.hidden_scores(loaded, experiment.samples(records), experiment.encoded(queries)), hidden

    ways: dict[str, Way] = {
        "random": lambda: (methods.random_scores(len(queries), len(records), seed=experiment.seed), 0),
        "BM25": lambda: methods.bm25_scores(documents, texts, seed=experiment.seed),
        TOLD_BM25: lambda: methods.bm25_scores(responses, [" ".join(words) for words in told], seed=experiment.seed),
        CONTAINING: lambda: (methods.containing_scores(responses, told, seed=experiment.seed), 0),
        **_embedding(experiment, documents, texts, lambda: near(base)),
        "hidden state (of the tuned model)": lambda: near(tuned),
    }
    for name, work in ways.items():
        if experiment.kept(name) is None:
            started = time.monotonic()
            scores, size = work()
            experiment.keep(name, scores, time.monotonic() - started, size)
    return list(ways)


def _embedding(experiment: Experiment, documents: list[str], texts: list[str], otherwise: Way) -> dict[str, Way]:
    """Return the way of a sentence-embedding model where one was given, else that of the model's own hidden states."""
    encoder = experiment.encoder
    if encoder is None:
        return {"embedding (mean hidden state of the base model)": otherwise}

    def way() -> tuple[np.ndarray, int]:
        length = encoder.encode(["x"], show_progress_bar=False).shape[1]
        return methods.embedding_scores(encoder, documents, texts), 4 * length * len(documents)

    return {f"embedding ({experiment.embedding_name})": way}


def _gradient_scores(
    experiment: Experiment, samples: list[Encoded], asked: list[Encoded], focused: Sequence[Encoded]
) -> list[str]:
    """Make the scores of methods that take gradients, and return their names."""
    profile, loaded = experiment.profile, experiment.loaded()
    widest, first = max(profile.widths), profile.shuffles[0]
    names = ["TracIn", EXACT, TOLD_EXACT]
    names += [
        rapidin(width, shuffles, token_wise=told)
        for told in (False, True)
        for shuffles in profile.shuffles
        for width in profile.widths
    ]
    ours = {rapidin(profile.width, first, token_wise=told): TOLD_EXACT if told else EXACT for told in (False, True)}
    influence: list[str] = []
    if experiment.influence_functions:
        influence = [DATAINF] + ([lissa(profile.lissa_depth)] if profile.lissa_depth else [])

    makers = {
        shuffles: RapidGradMaker(
            loaded, spec=SketchSpec(width=widest, shuffles=shuffles, seed=experiment.seed), normalize="layer"
        )
        for shuffles in profile.shuffles
    }
    full = gradients.FullGradients(makers[first], samples, progress=experiment.progress)
    products_file, sums = experiment.folder / "products.npz", None
    if not products_file.exists() or any(experiment.kept(name) is None for name in names):
        sums = _first_pass(experiment, full, makers, asked, focused, products_file, samples if influence else None)
    if any(experiment.kept(name) is None for name in influence):
        with np.load(products_file, allow_pickle=False) as kept:
            dots, norms = kept["dots"], kept["norms"]
        _influence(experiment, full, makers[first], samples, asked, dots, norms, sums)
    for name, exact in ours.items():
        if experiment.kept(refined(name)) is None:
            _refine(experiment, name, exact)
    return names + [refined(name) for name in ours] + influence


def _refine(experiment: Experiment, name: str, exact: str) -> None:
    """Make the scores of a RapidIn whose ends are ranked again.

    Its seconds are those of the RapidIn alone: what exact scores of its ends take is measured through a database.
    """
    ours, theirs = experiment.kept(name), experiment.kept(exact)
    assert ours is not None and theirs is not None
    rows = [
        gradients.ranked_again(row, exactly, experiment.profile.refined)
        for row, exactly in zip(ours["scores"], theirs["scores"], strict=True)
    ]
    experiment.keep(refined(name), np.stack(rows), ours["seconds"], ours["bytes"])


def _first_pass(
    experiment: Experiment, full: gradients.FullGradients, makers: dict[int, RapidGradMaker], asked: list[Encoded],
    focused: Sequence[Encoded], products_file: Path, damped: list[Encoded] | None,
) -> _Sums | None:  # fmt: skip
    """Make the scores of TracIn and of all RapidIns from one pass over the samples.

    Where influence functions are wanted too, `damped` are the samples, and DataInf's sums are made on the way.
    """
    profile = experiment.profile
    # The queries on their telling words are further columns of the same products.
    directions, query_norms = full.directions([*asked, *focused])
    takers: dict[str, Any] = {"products": gradients.Products(directions, full.shapes, full.samples)}
    if damped is not None:
        rows = {number: both[: len(asked)] for number, both in directions.items()}
        takers[DATAINF] = _weighted(experiment, full, makers[profile.shuffles[0]], damped, rows)
    for shuffles, maker in makers.items():
        takers[str(shuffles)] = sketches = gradients.Sketches(maker, asked, profile.widths, full.samples)
        sketches.ask("token-wise", focused, profile.widths)
    seconds = full.run("gradients", takers)
    products, count, size = takers["products"], len(asked), _bytes(full)
    dots, exact_seconds = products.dots[:, :count], seconds["products"]
    with products_file.with_suffix(".new").open("wb") as file:
        np.savez(file, dots=dots, norms=products.norms)
    products_file.with_suffix(".new").replace(products_file)
    experiment.keep("TracIn", gradients.tracin(dots), exact_seconds, size)
    for name, part in ((EXACT, slice(0, count)), (TOLD_EXACT, slice(count, None))):
        scores = gradients.tracin_normalised(products.dots[:, part], products.norms, query_norms[part])
        experiment.keep(name, scores, exact_seconds, size)
    for shuffles in makers:
        for (kind, width), scores in takers[str(shuffles)].scores.items():
            name = rapidin(width, shuffles, token_wise=bool(kind))
            experiment.keep(name, scores, seconds[str(shuffles)], 2 * width * full.samples)
    return _Sums(takers[DATAINF].sums, seconds[DATAINF]) if damped is not None else None


def _weighted(
    experiment: Experiment, full: gradients.FullGradients, maker: RapidGradMaker, samples: list[Encoded],
    directions: gradients.Directions,
) -> gradients.WeightedSums:  # fmt: skip
    """Return what takes DataInf's sums, with the damping of some samples: all are known after the pass only.

    In the sums it stands beside |g_i|^2, of which it is one part in 10 d, with d of some thousands at least: how far it
    is off hardly matters. Where it does, in front of the sums, it is that of all samples.
    """
    draw = np.random.default_rng(experiment.seed)
    chosen = draw.choice(len(samples), min(_DAMPED_BY, len(samples)), replace=False)
    few = gradients.FullGradients(maker, [samples[number] for number in chosen])
    norms = few.products({number: rows[:1] for number, rows in directions.items()}).norms
    return gradients.WeightedSums(directions, hessian.datainf_damping(norms, _lengths(full)), full.shapes)


def _lengths(full: gradients.FullGradients) -> list[int]:
    return [shape.count for shape in full.shapes]


def _bytes(full: gradients.FullGradients) -> int:
    """Return how much the full gradients of all samples take, in single precision."""
    return 4 * full.samples * sum(_lengths(full))


def _influence(
    experiment: Experiment, full: gradients.FullGradients, maker: RapidGradMaker, samples: list[Encoded],
    asked: list[Encoded], dots: np.ndarray, norms: np.ndarray, sums: _Sums | None,
) -> None:  # fmt: skip
    """Make the scores of both influence functions: LiSSA's recursion, and a pass for both.

    DataInf's sums take a pass of their own where an interruption lost them.
    """
    profile, steps = experiment.profile, lissa(experiment.profile.lissa_depth)
    if sums is None:
        taker = _weighted(experiment, full, maker, samples, full.directions(asked)[0])
        sums = _Sums(taker.sums, full.run("DataInf", {DATAINF: taker})[DATAINF])
    seconds, vectors = {DATAINF: sums.seconds, steps: 0.0}, sums.sums
    if profile.lissa_depth:
        started = time.monotonic()
        inverse = hessian.lissa(
            maker, samples, full.directions(asked)[0], depth=profile.lissa_depth, batch=profile.lissa_batch,
            damping=_DAMPING, seed=experiment.seed, progress=experiment.progress,
        )  # fmt: skip
        seconds[steps] = time.monotonic() - started
        vectors = {number: torch.cat([rows, inverse[number]]) for number, rows in vectors.items()}
    started = time.monotonic()
    again = full.products(vectors).dots
    shared, count, size = time.monotonic() - started, len(asked), _bytes(full)
    damping = hessian.datainf_damping(norms, _lengths(full))
    experiment.keep(DATAINF, hessian.datainf(dots, again[:, :count], damping), seconds[DATAINF] + shared, size)
    if profile.lissa_depth:
        scores = again[:, count:].sum(2).T.astype(np.float64)
        experiment.keep(steps, scores, seconds[steps] + shared, size)
