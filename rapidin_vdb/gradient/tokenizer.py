"""A model's tokenizer, which has to say where its tokens stand in the text."""

import json
from typing import Any

from rapidin_vdb.errors import ModelError, ModelNotFoundError
from rapidin_vdb.gradient.quiet import quiet_libraries, short


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model.

    Raises:
        ModelError: there is none, it knows no word, or it cannot say where its tokens stand in the text.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        kind = ModelNotFoundError if isinstance(error, OSError) else ModelError
        raise kind(f"no tokenizer can be loaded from {name}: {short(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {name} cannot say where its tokens stand in the text (not a fast tokenizer)"
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # What transformers makes of a folder without a tokenizer's files, as trainers write that were given none.
        raise ModelError(
            f"the model {name} comes without a tokenizer: what can be made of it knows no word. Put the tokenizer's "
            "files (tokenizer.json, tokenizer_config.json) of the model that was tuned beside its weights"
        )
    _keep_spaces(tokenizer.backend_tokenizer)
    return tokenizer


def _keep_spaces(backend: Any) -> None:
    """Let a token's place be all of its text: some leave out the space that it begins with, as RoBERTa's does.

    A token that begins with the last space of a prompt would else be one of the response.
    """
    processor = backend.post_processor
    # Its state alone: with the vocabulary it may be tens of megabytes.
    state = None if processor is None else json.loads(processor.__getstate__())
    if _untrimmed(state):
        processor.__setstate__(json.dumps(state).encode("utf-8"))
        backend.post_processor = processor


def _untrimmed(part: Any) -> bool:
    """Set `trim_offsets` to false wherever it is true, in place, and return whether it was anywhere."""
    if isinstance(part, list):
        return any([_untrimmed(inner) for inner in part])
    if not isinstance(part, dict):
        return False
    trims = part.get("trim_offsets") is True
    if trims:
        part["trim_offsets"] = False
    return any([_untrimmed(inner) for inner in part.values()]) or trims
