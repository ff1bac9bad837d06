"""A database's model, loaded and checked; with its template and sketch, what turns samples into RapidGrads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from threading import RLock
from typing import Any, cast

import numpy as np

from rapidin_vdb.arguments import place_of
from rapidin_vdb.corpus import Record, Template, load_template, sample_from
from rapidin_vdb.corpus.shapes import asked_fields
from rapidin_vdb.errors import GradientError, ModelNotFoundError, SpecError
from rapidin_vdb.gradient import (
    ExactInfluence,
    LoadedModel,
    RapidGradMaker,
    Said,
    TokenRapidGradMaker,
    check_fingerprint,
    fingerprint_of,
    generate_one,
    load_model,
    prompt_ids,
)
from rapidin_vdb.gradient.device import device_failure, lacks_memory
from rapidin_vdb.gradient.fingerprint import WeightHashes
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import DType, Encoded, Fingerprint, ModelSpec, Sample


@dataclass(frozen=True, eq=False)
class Made:
    """What a sample was turned into."""

    vector: np.ndarray
    """Its RapidGrad, float16 [width]."""
    loss: float
    """Its mean cross-entropy, in nats."""
    tokens: np.ndarray | None = None
    """The RapidGrads of its response tokens, float16 [tokens, token width], where they were asked for."""


class Engine:
    """A model ready to make the RapidGrads of one fingerprint."""

    def __init__(self, fingerprint: Fingerprint, loaded: LoadedModel) -> None:
        """Compose the sketch.

        Raises:
            SpecError: the sketch cannot be honoured for this model.
        """
        self.loaded = loaded
        self.template: Template = load_template(
            fingerprint.template, tokenizer=loaded.tokenizer, text=fingerprint.template_text
        )
        self.maker = RapidGradMaker(loaded, spec=fingerprint.sketch, normalize=fingerprint.normalize)
        self._token_maker: TokenRapidGradMaker | None = None
        self.alone = RLock()
        """Held while the model is used: what listens to it for one sample must not hear another thread's."""

    @cached_property
    def influence(self) -> ExactInfluence:
        """Exact influence by the model's full gradients."""
        return ExactInfluence(self.maker)

    def generate(
        self, prompt: str | None, *, messages: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (), max_tokens: int, temperature: float, seed: int,
        progress: Progress = silent,
    ) -> str:  # fmt: skip
        """Return what the model says to a prompt, or after several turns, where it could call some tools.

        Raises:
            CorpusError: a turn has no texts `role` and `content`, or the turns do not fit the template.
            SpecError: not one of both is given, an option is out of range, or the prompt leaves no room.
        """
        if bool(messages) == (prompt is not None):
            raise SpecError("the model answers a prompt, or messages; give one of both")
        # What it will say is not known yet; a record cannot be without it.
        fields = asked_fields(prompt, "?", messages, tools)
        location = "messages" if messages else "the prompt"
        sample = sample_from(Record(location=location, fields=fields | {"id": "prompt"}))
        with self.alone:
            return said_by(
                self.loaded, self.template, sample, max_tokens=max_tokens, temperature=temperature, seed=seed,
                progress=progress,
            ).text  # fmt: skip

    def make(self, batch: Sequence[Encoded], *, token_width: int | None = None) -> list[Made | GradientError]:
        """Return what each sample of a batch is turned into, or why it cannot be.

        With `token_width`, the RapidGrads of its single tokens too.
        """
        with self.alone:
            return self._make(batch, token_width)

    def _make(self, batch: Sequence[Encoded], token_width: int | None) -> list[Made | GradientError]:
        if token_width is None:
            return [_made(result, None) for result in self.maker.make_batch(batch, half=True)]
        if self._token_maker is None or self._token_maker.width != token_width:
            self._token_maker = TokenRapidGradMaker(self.maker, width=token_width)
        norms: dict[str, np.ndarray] = {}
        results = self.maker.make_batch(batch, half=True, norms=norms)
        good = [s for s, result in zip(batch, results, strict=True) if not isinstance(result, GradientError)]
        tokens = self._token_maker.make(good, norms) if good else {}
        return [_made(result, tokens.get(sample.sample_id)) for sample, result in zip(batch, results, strict=True)]


def said_by(
    loaded: LoadedModel, template: Template, sample: Sample, *, max_tokens: int, temperature: float = 0.0,
    seed: int = 0, progress: Progress = silent,
) -> Said:  # fmt: skip
    """Return what a model says to the prompt of a sample, whatever its response is.

    Raises:
        CorpusError: the template cannot render this sample.
        SpecError: an option is out of range, or the prompt leaves no room.
    """
    text, end = template.render(sample), template.end(sample)
    return generate_one(
        loaded, text, max_tokens=max_tokens, temperature=temperature, seed=seed, progress=progress,
        special=not template.whole, end=end,
    )  # fmt: skip


def check_room(template: Template, sample: Sample, *, tokenizer: Any, config: Any) -> None:
    """See, without the model, that one of that configuration has room behind the prompt of a sample.

    Raises:
        CorpusError: the template cannot render this sample.
        SpecError: the prompt has no tokens, or leaves no room.
    """
    prompt_ids(tokenizer, template.render(sample), config, special=not template.whole)


def _made(
    result: tuple[np.ndarray, float] | GradientError, tokens: np.ndarray | GradientError | None
) -> Made | GradientError:
    if isinstance(result, GradientError):
        return result
    return tokens if isinstance(tokens, GradientError) else Made(result[0], result[1], tokens)


def load_engine(
    stored: Fingerprint, *, place: str, model: str | PathLike[str] | None = None,
    adapter: str | PathLike[str] | None = None, device: str = "auto",
) -> Engine:  # fmt: skip
    """Load the model of a database, and compose its sketch.

    Raises:
        ModelError, FingerprintError: as `load_checked` does.
    """
    return Engine(stored, load_checked(stored, place=place, model=model, adapter=adapter, device=device))


def dtype_of(stored: Fingerprint) -> DType:
    """Return of which type the base weights of a database's model are to be loaded."""
    return cast(DType, stored.dtype if stored.dtype in ("float32", "bfloat16", "float16") else "auto")


def load_checked(
    stored: Fingerprint, *, place: str, model: str | PathLike[str] | None = None,
    adapter: str | PathLike[str] | None = None, device: str = "auto",
) -> LoadedModel:  # fmt: skip
    """Load the model of a database; `model` and `adapter` say where they are, if they have moved since `init`.

    Raises:
        ModelError: they cannot be loaded.
        FingerprintError: they are not those that the database was made with.
    """
    spec = ModelSpec(
        model=place_of(model) or stored.model,
        adapter=place_of(adapter) or stored.adapter,
        quantization=stored.quantization,
        dtype=dtype_of(stored),
        parameters=stored.parameters,
    )
    with WeightHashes(spec) as hashes:
        try:
            loaded = load_model(spec, device=device)
        except ModelNotFoundError as error:
            there = lacks_memory(error) or device_failure(error) is not None
            if model is None and adapter is None and not there:
                raise ModelNotFoundError(
                    f"{error}. If it has moved since init, say where it is: --model FOLDER --adapter FOLDER"
                ) from error
            raise
        template = load_template(stored.template, tokenizer=loaded.tokenizer, text=stored.template_text)
        here = fingerprint_of(
            loaded,
            template=template.name,
            template_text=template.text,
            max_tokens=stored.max_tokens,
            normalize=stored.normalize,
            sketch=stored.sketch,
            epochs=stored.epochs,
            learning_rate=stored.learning_rate,
            turns=stored.turns,
            tokenizer_hash=stored.tokenizer_hash,
            hashes=hashes,
        )
    check_fingerprint(stored, here, place=place)
    return loaded
