"""Databases are opened, or made for the training samples of one model."""

import logging
from pathlib import Path

from rapidin_vdb.arguments import above_zero, one_of, place_of, whole
from rapidin_vdb.corpus import load_template
from rapidin_vdb.database import Database
from rapidin_vdb.engine import Engine
from rapidin_vdb.errors import SpecError
from rapidin_vdb.gradient import fingerprint_of, load_model, tell_of_pair
from rapidin_vdb.records import DType, ModelSpec, Normalize, Quantization, SketchSpec, Turns
from rapidin_vdb.store import SampleTable

logger = logging.getLogger(__name__)

_DEFAULT_SKETCH = SketchSpec()
# With so many, neighbours share a bucket as often as others do, also among 2^32 coordinates (docs/log.md).
_MIXED = 12


def open(path: str | Path) -> Database:
    """Return an existing database; its model is loaded when first needed.

    Raises:
        TableNotFoundError: there is none.
    """
    return Database(SampleTable(str(path)))


def init(
    path: str | Path,
    *,
    model: str | Path,
    adapter: str | Path | None = None,
    quantization: Quantization = "none",
    dtype: DType = "auto",
    width: int = _DEFAULT_SKETCH.width,
    shuffles: int = _DEFAULT_SKETCH.shuffles,
    seed: int = _DEFAULT_SKETCH.seed,
    normalize: Normalize = "layer",
    parameters: str = "trainable",
    template: str = "alpaca",
    turns: Turns = "last",
    max_tokens: int = 512,
    epochs: float = 1.0,
    learning_rate: float = 1.0,
    device: str = "auto",
) -> Database:
    """Make a new database for the training samples of a model, and return it.

    The model is loaded, to take its fingerprint and to see that the sketch fits; nothing is written before that.
    `turns` says which of the assistant's turns in a conversation have a loss: those that the model was trained on.

    Raises:
        TableExistsError: something is at `path` already.
        ModelError: the model or the adapter is missing, or they do not belong together.
        SpecError: a value that cannot be honoured, such as a width beyond the gradient.
    """
    epochs, learning_rate = above_zero("epochs", epochs), above_zero("learning-rate", learning_rate)
    max_tokens, seed = whole("--max-tokens", max_tokens, 2), whole("--seed", seed, 0)
    width, shuffles = whole("--width", width, 1), whole("--shuffles", shuffles, 0)
    for option, word, kind in (
        ("turns", turns, Turns),
        ("normalize", normalize, Normalize),
        ("quantization", quantization, Quantization),
        ("dtype", dtype, DType),
    ):
        one_of(option, word, kind)
    SampleTable.check_free(str(path))
    chosen = None if template == "chat" else load_template(template)
    if turns == "all" and chosen is not None:
        raise SpecError(f"--turns all goes with --template chat, which writes every turn; here it is {chosen.name}")
    loaded = load_model(
        ModelSpec(
            model=place_of(model) or "",
            adapter=place_of(adapter),
            quantization=quantization,
            dtype=dtype,
            parameters=parameters,
        ),
        device=device,
    )
    positions = loaded.learned_positions
    if positions is not None and max_tokens > positions:
        raise SpecError(
            f"--max-tokens is {max_tokens}, but this model knows only {positions} positions; give {positions}"
        )
    if loaded.rotary_memory is not None and max_tokens > loaded.rotary_memory:
        raise SpecError(
            f"--max-tokens is {max_tokens}, but beyond {loaded.rotary_memory} tokens this model turns positions by the "
            f"longest sample so far (dynamic), so that gradients would not be those of a sample; give "
            f"{loaded.rotary_memory}"
        )
    if loaded.rotary_limit is not None and max_tokens > loaded.rotary_limit:
        logger.warning(
            "beyond %d tokens, this model turns positions by the length of the sample: scores and RapidGrads of tokens "
            "are not exact in samples that are longer", loaded.rotary_limit,
        )  # fmt: skip
    if shuffles < _MIXED:
        logger.warning(
            "--shuffles %d leaves coordinates beside their neighbours: scores may be further off than their "
            "score_error says; from %d on they are mixed", shuffles, _MIXED,
        )  # fmt: skip
    tell_of_pair(loaded, template=template)
    chosen = chosen or load_template(template, tokenizer=loaded.tokenizer)
    fingerprint = fingerprint_of(
        loaded,
        template=chosen.name,
        template_text=chosen.text,
        max_tokens=max_tokens,
        normalize=normalize,
        sketch=SketchSpec(width=width, shuffles=shuffles, seed=seed),
        epochs=epochs,
        learning_rate=learning_rate,
        turns=turns,
    )
    engine = Engine(fingerprint, loaded)
    return Database(SampleTable.create(str(path), fingerprint), engine=engine)
