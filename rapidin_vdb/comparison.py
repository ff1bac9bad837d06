"""Whether it helped: generations, judged by a database's model and by one that was trained anew."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from rapidin_vdb.arguments import place_of
from rapidin_vdb.corpus import Template, Tokenizer, as_written, encode, load_template
from rapidin_vdb.engine import check_room, dtype_of, said_by
from rapidin_vdb.errors import CorpusError, GradientError, ModelError, ModelNotFoundError, SpecError
from rapidin_vdb.focus import focus_of
from rapidin_vdb.gradient import (
    LoadedModel,
    Said,
    batch_tokens_for,
    check_loadable,
    check_places,
    evaluate_losses,
    hash_of_tokenizer,
    if_it_fits,
    load_model,
    load_tokenizer,
    tell_of_base,
    tell_of_weights,
    weights_of,
)
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
    batch_tokens: int
    """How many tokens a batch had, padding included; the other model's are to have as many, to be rounded alike."""
    weights: str
    """How that model's weights are kept, in words."""


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
    tokens = batch_tokens_for(loaded)
    return Judged(
        queries=[as_written(query, one) for query, one in zip(queries, encoded, strict=True)],
        encoded=encoded,
        focus=[focus_of(query, focus) for query in queries],
        losses=evaluate_losses(loaded, encoded, batch_tokens=tokens, stage="losses before", progress=progress),
        template=template,
        batch_tokens=tokens,
        weights=weights_of(loaded),
    )


def other_model(stored: Fingerprint, *, model: Name, new_model: Name, new_adapter: Name) -> ModelSpec:
    """Return what is to be compared with a database's model, which may have moved to `model`; its folders are there.

    An adapter alone is put on the database's base model, a model alone is taken as it is.

    Raises:
        ModelError: a folder is not there, or is none of a model's.
        SpecError: neither is given.
    """
    base, adapter = place_of(new_model), place_of(new_adapter)
    if base is None and adapter is None:
        raise SpecError("give what was trained anew: --new-adapter FOLDER, or --new-model FOLDER, or both")
    if base is not None and (Path(base) / "adapter_config.json").is_file():
        raise ModelError(
            f"the folder {base} holds an adapter (adapter_config.json), and is given as a model. Give it as "
            "--new-adapter, which is put on the database's base model; or on that of --new-model, if it is another"
        )
    spec = ModelSpec(
        model=base or place_of(model) or stored.model,
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


def check_other(
    stored: Fingerprint, spec: ModelSpec, queries: Sequence[Sample], *, model: Name, adapter: Name,
    tokenizer: Tokenizer | None, focus: Sequence[Focus], answers: bool,
) -> None:  # fmt: skip
    """See, before a model is loaded, that another can be compared with a database's on some queries, and answer them.

    The database's model may have moved to `model` and `adapter`; `tokenizer` is its tokenizer, where it is loaded.

    Raises:
        CorpusError: a query cannot be encoded.
        ModelError: a model, or an adapter, is not there or lacks something, or the other's tokenizer makes other tokens
            of a query.
        SpecError: a focus is not in its generation, or a prompt leaves no room for an answer.
    """
    config = check_loadable(spec)
    base = place_of(model) or stored.model
    if tokenizer is None:
        _check_moved(ModelSpec(model=base, adapter=place_of(adapter) or stored.adapter), told=model or adapter)
    own = load_tokenizer(base) if tokenizer is None else tokenizer
    other = own if spec.model == base else load_tokenizer(spec.model)
    template = load_template(stored.template, tokenizer=own, text=stored.template_text)
    encoded = encode_queries(queries, tokenizer=own, template=template, max_tokens=stored.max_tokens, focus=focus)
    if hash_of_tokenizer(other, known=stored.tokenizer_hash) != stored.tokenizer_hash:
        _check_tokens(stored, spec, queries, own, other, template)
    for query in (as_written(*pair) for pair in zip(queries, encoded, strict=True)):
        if answers and _can_be_answered(query, template):
            try:
                check_room(template, query, tokenizer=other, config=config)
            except SpecError as error:
                raise SpecError(
                    f"query {query.sample_id} cannot be answered: {error}, ask without this query, or leave out "
                    "--answer-tokens"
                ) from error


def _check_moved(spec: ModelSpec, *, told: Name) -> None:
    """See that the model of a database and its adapter are there, where nobody has told where they are, as recorded.

    Raises:
        ModelError: they are not.
    """
    try:
        check_places(spec)
    except ModelNotFoundError as error:
        if told is not None:
            raise
        raise ModelNotFoundError(
            f"{error}. If it has moved since init, say where it is: --model FOLDER --adapter FOLDER"
        ) from error


def _check_tokens(
    stored: Fingerprint, spec: ModelSpec, queries: Sequence[Sample], own: Tokenizer, other: Tokenizer,
    template: Template,
) -> None:  # fmt: skip
    """Refuse a tokenizer that makes other tokens of what is asked; one with a token more, such as a padding, does not.

    Raises:
        ModelError: names the first query of other tokens.
    """
    ours, theirs = (
        encode(queries, tokenizer=one, template=template, max_tokens=stored.max_tokens) for one in (own, other)
    )
    for query, one, two in zip(queries, ours, theirs, strict=True):
        if isinstance(one, CorpusError) or isinstance(two, CorpusError) or not _same_tokens(one, two):
            raise ModelError(
                f"the model {spec.model} has another tokenizer than the database's ({stored.model}), which makes other "
                f"tokens of query {query.sample_id}: losses of other tokens cannot be compared. Give a model that was "
                "trained anew from the same base, with the tokenizer of that; or ask without such queries"
            )


def _same_tokens(one: Encoded, other: Encoded) -> bool:
    return (one.input_ids, one.offsets, one.places) == (other.input_ids, other.offsets, other.places)


def _can_be_answered(query: Sample, template: Template) -> bool:
    """Say whether there is a prompt to answer, and no turn behind it, as there is where tools are called."""
    return not query.turns and bool(template.render(query))


def load_other(stored: Fingerprint, spec: ModelSpec, *, device: str) -> LoadedModel:
    """Load what is to be compared with the model of a database, and was found to be comparable with it.

    Raises:
        ModelError: it cannot be loaded.
        SpecError: there is no such device.
    """
    loaded = load_model(spec, device=device, gradients=False)
    tell_of_base(loaded)
    return loaded


def compare(
    before: Judged, loaded: LoadedModel, *, answer_tokens: int, progress: Progress = silent
) -> list[Comparison]:
    """Return queries with the losses of both models, and what the other says to their prompts, in so many tokens.

    A query without a prompt has no answer, nor has one of several turns, as one that calls tools is.

    Raises:
        SpecError: a prompt leaves no room for an answer.
        GradientError: a query, or an answer, does not fit the memory.
        ModelError: a loss is not finite.
    """
    tell_of_weights(loaded, before=before.weights)
    after = evaluate_losses(
        loaded, before.encoded, batch_tokens=before.batch_tokens, stage="losses after", progress=progress
    )
    compared, template = [], before.template
    for number, (query, encoded) in enumerate(zip(before.queries, before.encoded, strict=True)):
        pair = before.losses[number], after[number]
        answer = None
        if answer_tokens and _can_be_answered(query, template):
            progress("answers", number, len(before.queries))
            answer = _answered(loaded, template, query, answer_tokens)
        compared.append(
            Comparison(
                query_id=query.sample_id,
                prompt=query.prompt,
                generation=query.response,
                loss_before=float(np.mean(pair[0], dtype=np.float64)),
                loss_after=float(np.mean(pair[1], dtype=np.float64)),
                tokens=tuple(_tokens(query, encoded, *pair)),
                focus=before.focus[number] or None,
                answer=None if answer is None else answer.text,
                answer_cut=answer is not None and answer.cut,
                truncated=encoded.truncated,
            )
        )
    if answer_tokens:
        progress("answers", len(compared), len(compared))
    return compared


def _answered(loaded: LoadedModel, template: Template, query: Sample, max_tokens: int) -> Said:
    answer = if_it_fits(partial(said_by, loaded, template, query, max_tokens=max_tokens))
    if answer is None:
        raise GradientError(
            f"the answer to {query.sample_id} does not fit the memory beside the model: it takes fewer "
            "--answer-tokens, or another --device"
        )
    return answer


def _tokens(query: Sample, encoded: Encoded, before: np.ndarray, after: np.ndarray) -> Iterator[ComparedToken]:
    for number, first, second in zip(encoded.loss_tokens, before.tolist(), after.tolist(), strict=True):
        start, end = encoded.offsets[number]
        yield ComparedToken(text=query.response[start:end], start=start, end=end, loss_before=first, loss_after=second)
