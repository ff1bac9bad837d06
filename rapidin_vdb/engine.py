"""A loaded model with its template and sketch: what turns the samples of one fingerprint into RapidGrads."""

from typing import cast

from rapidin_vdb.corpus import Template, load_template
from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient import LoadedModel, RapidGradMaker, fingerprint_of, load_model
from rapidin_vdb.records import DType, Fingerprint, ModelSpec
from rapidin_vdb.store import check_fingerprint


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


def load_engine(
    stored: Fingerprint, *, place: str, model: str | None = None, adapter: str | None = None, device: str = "auto"
) -> Engine:
    """Load the model of a database; `model` and `adapter` say where they are, if they have moved since `init`.

    Raises:
        ModelError: they cannot be loaded.
        FingerprintError: they are not those that the database was made with.
    """
    spec = ModelSpec(
        model=model or stored.model,
        adapter=adapter or stored.adapter,
        quantization=stored.quantization,
        dtype=cast(DType, stored.dtype if stored.dtype in ("float32", "bfloat16", "float16") else "auto"),
        parameters=stored.parameters,
    )
    try:
        loaded = load_model(spec, device=device)
    except ModelError as error:
        if model is None and adapter is None:
            raise ModelError(
                f"{error}. If it has moved since init, say where it is: --model FOLDER --adapter FOLDER"
            ) from error
        raise
    # A chat template is the tokenizer's, and may have changed with it; a Jinja file is the database's own.
    own = stored.template_text if stored.template == "jinja" else None
    template = load_template(stored.template, tokenizer=loaded.tokenizer, text=own)
    here = fingerprint_of(
        loaded,
        template=template.name,
        template_text=template.text,
        max_tokens=stored.max_tokens,
        normalize=stored.normalize,
        sketch=stored.sketch,
        epochs=stored.epochs,
        learning_rate=stored.learning_rate,
    )
    check_fingerprint(stored, here, place=place)
    return Engine(stored, loaded)
