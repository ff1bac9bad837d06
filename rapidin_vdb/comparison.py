"""Whether it helped: generations, judged by a database's model and by one that was trained anew."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np

from rapidin_vdb.arguments import name_of
from rapidin_vdb.corpus import Template, as_written
from rapidin_vdb.engine import dtype_of, said_by
from rapidin_vdb.errors import ModelError, ModelNotFoundError, SpecError
from rapidin_vdb.focus import focus_of
from rapidin_vdb.gradient import LoadedModel, check_places, evaluate_losses, hash_of_tokenizer, load_model, tell_of_base
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import encode_queries
from rapidin_vdb.records import Encoded, Fingerprint, Focus, ModelSpec, Sample
from rapidin_vdb.results import ComparedToken, Comparison

Name = str | PathLike[str] | None


@dataclass(frozen=True, eq=False)
class Judged:
    """Queries whose generations the model of a database has judged."""

    queries: Sequence[Sample]
    """They, as their tokens are of them."""
    encoded: Sequence[Encoded]
    """Their tokens."""
    focus: Sequence[tuple[Focus, ...]]
    """What of each was looked at; nothing for all of it."""
    losses: Sequence[np.ndarray]
    """The loss at each of these tokens, in nats."""
    template: Template
    """What wrote their prompts."""


def judge(
    queries: Sequence[Sample], loaded: LoadedModel, template: Template, *, max_tokens: int, focus: Sequence[Focus],
    progress: Progress = silent,
) -> Judged:  # fmt: skip
    """Return queries with the losses of a database's model.

    Raises:
        CorpusError: a query cannot be encoded.
        GradientError: one does not fit the memory.
        ModelError: a loss is not finite.
        SpecError: a focus is not in its generation.
    """
    encoded = encode_queries(queries, tokenizer=loaded.tokenizer, template=template, max_tokens=max_tokens, focus=focus)
    return Judged(
        queries=[as_written(query, one) for query, one in zip(queries, encoded, strict=True)],
        encoded=encoded,
        focus=[focus_of(query, focus) for query in queries],
        losses=evaluate_losses(loaded, encoded, stage="losses before", progress=progress),
        template=template,
    )


def other_model(stored: Fingerprint, *, model: Name, new_model: Name, new_adapter: Name) -> ModelSpec:
    """Return what is to be compared with a database's model, which may have moved to `model`; its folders are there.

    An adapter alone is put on the database's base model, a model alone is taken as it is.

    Raises:
        ModelError: a folder is not there, or is none of a model's.
        SpecError: neither is given.
    """
    base, adapter = name_of(new_model), name_of(new_adapter)
    if base is None and adapter is None:
        raise SpecError("give what was trained anew: --new-adapter FOLDER, or --new-model FOLDER, or both")
    spec = ModelSpec(
        model=base or name_of(model) or stored.model,
        adapter=adapter,
        quantization=stored.quantization,
        dtype=dtype_of(stored),
    )
    try:
        check_places(replace(spec, adapter=None))
    except ModelNotFoundError as error:
        if base is not None or model is not None:
            raise
        raise ModelNotFoundError(f"{error}. If it has moved since init, say where it is: --model FOLDER") from error
    check_places(spec)
    return spec


def load_other(stored: Fingerprint, spec: ModelSpec, *, device: str) -> LoadedModel:
    """Load what is to be compared with the model of a database.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer is another, so that tokens are not those of the database.
        SpecError: there is no such device.
    """
    loaded = load_model(spec, device=device, gradients=False)
    if hash_of_tokenizer(loaded, known=stored.tokenizer_hash) != stored.tokenizer_hash:
        raise ModelError(
            f"the model {spec.model} has another tokenizer than the database's ({stored.model}): losses of other "
            "tokens cannot be compared. Give a model that was trained anew from the same base"
        )
    tell_of_base(loaded)
    return loaded


def compare(
    before: Judged, loaded: LoadedModel, *, answer_tokens: int, progress: Progress = silent
) -> list[Comparison]:
    """Return queries with the losses of both models, and what the other says to their prompts, in so many tokens.

    A query without a prompt has no answer, nor has one of several turns, as one that calls tools is.

    Raises:
        SpecError: a prompt leaves no room for an answer.
        GradientError: a query does not fit the memory.
        ModelError: a loss is not finite.
    """
    after = evaluate_losses(loaded, before.encoded, stage="losses after", progress=progress)
    compared, template = [], before.template
    for number, (query, encoded) in enumerate(zip(before.queries, before.encoded, strict=True)):
        pair = before.losses[number], after[number]
        answer = None
        if answer_tokens and not query.turns and template.render(query):
            progress("answers", number, len(before.queries))
            answer = said_by(loaded, template, query, max_tokens=answer_tokens)
        compared.append(
            Comparison(
                query_id=query.sample_id,
                prompt=query.prompt,
                generation=query.response,
                loss_before=float(np.mean(pair[0], dtype=np.float64)),
                loss_after=float(np.mean(pair[1], dtype=np.float64)),
                tokens=tuple(_tokens(query, encoded, *pair)),
                focus=before.focus[number] or None,
                answer=answer,
                truncated=encoded.truncated,
            )
        )
    if answer_tokens:
        progress("answers", len(compared), len(compared))
    return compared


def _tokens(query: Sample, encoded: Encoded, before: np.ndarray, after: np.ndarray) -> Iterator[ComparedToken]:
    for number, first, second in zip(encoded.loss_tokens, before.tolist(), after.tolist(), strict=True):
        start, end = encoded.offsets[number]
        yield ComparedToken(text=query.response[start:end], start=start, end=end, loss_before=first, loss_after=second)
