"""Everybody's scores of the same samples for the same generations, in as few passes as it takes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rapidin_vdb.evaluate import gradients, hessian, methods
from rapidin_vdb.evaluate.corpora import Record
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.gradient import LoadedModel, RapidGradMaker, load_model
from rapidin_vdb.records import Encoded, ModelSpec, Sample, SketchSpec

DATAINF, LISSA = "influence function (DataInf)", "influence function (LiSSA)"
EXACT, TOLD_EXACT = "TracIn + LN", "TracIn + LN, token-wise"
TOLD_BM25, CONTAINING = "BM25, token-wise", "responses that contain the words"
_DAMPING = 0.01


def rapidin(width: int, shuffles: int, *, token_wise: bool = False) -> str:
    """Return the name of a RapidIn."""
    return f"RapidIn (K = {width:,}, lambda = {shuffles})" + (", token-wise" if token_wise else "")


def all_scores(
    experiment: Experiment, records: Sequence[Record], queries: Sequence[Sample], focused: Sequence[Encoded],
    told: Sequence[Sequence[str]],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return every method's scores, seconds and stored bytes.

    `told` are the words that token-wise methods are told of each query, and `focused` the queries on these words.
    """
    sizes = _text_scores(experiment, records, queries, told)
    sizes |= _gradient_scores(experiment, experiment.samples(records), experiment.encoded(queries), focused)
    found = {}
    for name, size in sizes.items():
        kept = experiment.kept(name)
        assert kept is not None
        found[name] = {"scores": kept[0], "seconds": kept[1], "bytes": size}
    return found


def _text_scores(
    experiment: Experiment, records: Sequence[Record], queries: Sequence[Sample], told: Sequence[Sequence[str]]
) -> dict[str, int]:
    """Make the scores of methods that look at texts and hidden states; return the bytes that each keeps."""
    documents = [f"{record['instruction']} {record['output']}" for record in records]
    responses = [record["output"] for record in records]
    texts = [f"{query.prompt} {query.response}" for query in queries]
    # Whatever is chosen as theta: no gradient is taken.
    base = load_model(ModelSpec(model=experiment.model, parameters="norm"))
    tuned = experiment.loaded()
    hidden = 4 * int(base.model.config.hidden_size) * len(records)

    def near(loaded: LoadedModel) -> np.ndarray:
        return methods.hidden_scores(loaded, experiment.samples(records), experiment.encoded(queries))

    ways: dict[str, tuple[Callable[[], np.ndarray], int]] = {
        "random": (lambda: methods.random_scores(len(queries), len(records), seed=experiment.seed), 0),
        "BM25": (lambda: methods.bm25_scores(documents, texts)[0], 0),
        TOLD_BM25: (lambda: methods.bm25_scores(responses, [" ".join(words) for words in told])[0], 0),
        CONTAINING: (lambda: methods.containing_scores(responses, told, seed=experiment.seed), 0),
        **_embedding(experiment, documents, texts, lambda: near(base), hidden),
        "hidden state (of the tuned model)": (lambda: near(tuned), hidden),
    }
    for name, (work, _) in ways.items():
        if experiment.kept(name) is None:
            started = time.monotonic()
            scores = work()
            experiment.keep(name, scores, time.monotonic() - started)
    return {name: size for name, (_, size) in ways.items()}


def _embedding(
    experiment: Experiment, documents: list[str], texts: list[str], otherwise: Callable[[], np.ndarray], size: int
) -> dict[str, tuple[Callable[[], np.ndarray], int]]:
    """Return the way of a sentence-embedding model where one was given, else that of the model's own hidden states."""
    if experiment.embedding_model is None:
        return {"embedding (mean hidden state of the base model)": (otherwise, size)}
    encoder = methods.embedder(experiment.embedding_model)
    length = encoder.encode(["x"], show_progress_bar=False).shape[1]
    name = f"embedding ({Path(experiment.embedding_model).name})"
    return {name: (lambda: methods.embedding_scores(encoder, documents, texts), 4 * length * len(documents))}


def _gradient_scores(
    experiment: Experiment, samples: list[Encoded], asked: list[Encoded], focused: Sequence[Encoded]
) -> dict[str, int]:
    """Make the scores of methods that take gradients; return the bytes that each keeps."""
    profile, loaded = experiment.profile, experiment.loaded()
    lengths = [shape.count for shape in loaded.shapes]
    widest, first = max(profile.widths), profile.shuffles[0]
    sizes = dict.fromkeys(("TracIn", EXACT, TOLD_EXACT), 4 * sum(lengths) * len(samples))
    sizes |= {
        rapidin(width, shuffles): 2 * width * len(samples) for shuffles in profile.shuffles for width in profile.widths
    }
    sizes[rapidin(profile.width, first, token_wise=True)] = 2 * profile.width * len(samples)
    influence: dict[str, int] = {}
    if experiment.influence_functions:
        influence = {DATAINF: sizes["TracIn"]} | ({LISSA: sizes["TracIn"]} if profile.lissa_depth else {})

    makers = {
        shuffles: RapidGradMaker(loaded, spec=SketchSpec(width=widest, shuffles=shuffles), normalize="layer")
        for shuffles in profile.shuffles
    }
    full = gradients.FullGradients(makers[first], samples, progress=experiment.progress)
    products_file = experiment.folder / "products.npz"
    if not products_file.exists() or any(experiment.kept(name) is None for name in sizes):
        _first_pass(experiment, full, makers, asked, focused, products_file)
    if any(experiment.kept(name) is None for name in influence):
        with np.load(products_file, allow_pickle=False) as kept:
            dots, norms = kept["dots"], kept["norms"]
        _influence(experiment, full, makers[first], samples, asked, dots, norms, lengths)
    return sizes | influence


def _first_pass(
    experiment: Experiment, full: gradients.FullGradients, makers: dict[int, RapidGradMaker], asked: list[Encoded],
    focused: Sequence[Encoded], products_file: Any,
) -> None:  # fmt: skip
    """Make the scores of TracIn and of all RapidIns from one pass over the samples."""
    profile, first = experiment.profile, experiment.profile.shuffles[0]
    # The queries on their telling words are further columns of the same products.
    directions, query_norms = full.directions([*asked, *focused])
    takers: dict[str, Any] = {"products": gradients.Products(directions, full.shapes, full.samples)}
    takers |= {
        str(shuffles): gradients.Sketches(maker, asked, profile.widths, full.samples)
        for shuffles, maker in makers.items()
    }
    takers[str(first)].ask("token-wise", list(focused), [profile.width])
    seconds = full.run("gradients", takers)
    products, count = takers["products"], len(asked)
    dots, seconds_of = products.dots[:, :count], seconds["products"]
    with products_file.with_suffix(".new").open("wb") as file:
        np.savez(file, dots=dots, norms=products.norms)
    products_file.with_suffix(".new").replace(products_file)
    experiment.keep("TracIn", gradients.tracin(dots), seconds_of)
    for name, part in ((EXACT, slice(0, count)), (TOLD_EXACT, slice(count, None))):
        scores = gradients.tracin_normalised(products.dots[:, part], products.norms, query_norms[part])
        experiment.keep(name, scores, seconds_of)
    for shuffles in makers:
        for (kind, width), scores in takers[str(shuffles)].scores.items():
            experiment.keep(rapidin(width, shuffles, token_wise=bool(kind)), scores, seconds[str(shuffles)])


def _influence(
    experiment: Experiment, full: gradients.FullGradients, maker: RapidGradMaker, samples: list[Encoded],
    asked: list[Encoded], dots: np.ndarray, norms: np.ndarray, lengths: list[int],
) -> None:  # fmt: skip
    """Make the scores of both influence functions: a pass for DataInf's sums, LiSSA's recursion, a pass for both."""
    profile = experiment.profile
    weights, damping = hessian.datainf_weights(dots, norms, lengths)
    sums = gradients.WeightedSums(weights, full.shapes)
    seconds = {DATAINF: full.run("DataInf", {"sums": sums})["sums"], LISSA: 0.0}
    vectors = sums.sums
    if profile.lissa_depth:
        started = time.monotonic()
        inverse = hessian.lissa(
            maker, samples, full.directions(asked)[0], depth=profile.lissa_depth, batch=profile.lissa_batch,
            damping=_DAMPING, seed=experiment.seed, progress=experiment.progress,
        )  # fmt: skip
        seconds[LISSA] = time.monotonic() - started
        vectors = {number: torch.cat([rows, inverse[number]]) for number, rows in vectors.items()}
    started = time.monotonic()
    again = full.products(vectors).dots
    shared, count = time.monotonic() - started, len(asked)
    experiment.keep(DATAINF, hessian.datainf(dots, again[:, :count], damping), seconds[DATAINF] + shared)
    if profile.lissa_depth:
        experiment.keep(LISSA, again[:, count:].sum(2).T.astype(np.float64), seconds[LISSA] + shared)
