"""What an adapter's folder says of the model and the tokenizer that it was trained with, held against those given."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient.model import LoadedModel, load_config
from rapidin_vdb.gradient.quiet import short

logger = logging.getLogger(__name__)

# Names of folders that say nothing of what is in them.
_NAMELESS = re.compile(
    r"|\.+|checkpoint(s|-\d+)?|[0-9a-f]{40}|(base|final|merged|tuned)?[-_]?(model|weights)?|outputs?|snapshots"
)
# The same weights, as some share them in four bits.
_STORED = re.compile(r"(-unsloth)?-bnb-4bit$")


def tell_of_pair(loaded: LoadedModel, *, template: str) -> None:
    """Warn of what does not go together, before the first gradient; `template` is what `init` was given.

    Trainers save the tokenizer that they used beside the adapter.

    Raises:
        ModelError: chat templates are used, and the adapter's folder has another one than the model's tokenizer.
    """
    tokenizer, adapter = loaded.tokenizer, loaded.spec.adapter
    own: Any = None
    if adapter is not None:
        tell_of_base(loaded)
        settings = _tokenizer_settings(adapter)
        own = settings.get("chat_template")
        if template == "chat":
            _check_chat_template(own, tokenizer, adapter)
        else:
            _tell_of_end(settings.get("eos_token"), tokenizer, adapter)
    if template in ("alpaca", "text") and (own or getattr(tokenizer, "chat_template", None)):
        whose = "the model's tokenizer" if getattr(tokenizer, "chat_template", None) else "the adapter's folder"
        logger.warning(
            "prompts are written by the template %s, and %s has a chat template: if the fine-tuning used that, make "
            "the database with --template chat, or gradients are of other texts than it saw",
            template, whose,
        )  # fmt: skip


def tell_of_base(loaded: LoadedModel) -> None:
    """Warn where an adapter names another base; it may have the same shape, and be put on without a word."""
    if loaded.spec.adapter is None:
        return
    named = str(loaded.model.peft_config["default"].base_model_name_or_path or "")
    given = loaded.spec.model
    wanted, found = _name(named), _name(str(Path(given).resolve()) if _is_folder(given) else given)
    if wanted and found and wanted != found:
        logger.warning(
            "the adapter names %s as the model that it was trained on, and is put on %s: if these are not the same "
            "weights, gradients and losses are of a model that was never trained so",
            named, given,
        )  # fmt: skip


def weights_of(loaded: LoadedModel) -> str:
    """Return in words how a model's weights are kept: their type in its files and here, or how they are quantised."""
    stored = getattr(loaded.inner.config, "quantization_config", None)
    settings = stored if isinstance(stored, dict) else stored.to_dict() if stored is not None else {}
    if settings.get("load_in_4bit"):
        computed = str(settings.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
        twice = ", their scales in 8" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"4 bits ({settings.get('bnb_4bit_quant_type')}{twice}), computed in {computed}"
    if settings.get("load_in_8bit"):
        return f"8 bits, computed in {loaded.dtype}"
    if settings:
        return f"quantised ({settings.get('quant_method')}), computed in {loaded.dtype}"
    kept = str(getattr(load_config(loaded.spec.model), "dtype", None) or loaded.dtype).removeprefix("torch.")
    return kept if kept == loaded.dtype else f"{kept}, computed in {loaded.dtype}"


def tell_of_weights(loaded: LoadedModel, *, before: str) -> None:
    """Warn where a model's weights are kept otherwise than those of a database's model, which are kept as `before`."""
    here = weights_of(loaded)
    if here != before:
        logger.warning(
            "the weights of %s are kept in %s, and those of the database's model in %s: a part of what differs may be "
            "their rounding, and not what was trained. Give a model whose weights are kept alike, or the adapter alone",
            loaded.spec.model, here, before,
        )  # fmt: skip


def _is_folder(name: str) -> bool:
    return Path(name).is_dir()


def _name(place: str) -> str:
    """Return what tells a model's name or folder from others: its last part; empty where that says nothing.

    >>> _name("/cache/models--org--Tiny-1B/snapshots/0123456789012345678901234567890123456789")
    'tiny-1b'
    >>> _name("unsloth/Tiny-1B-bnb-4bit"), _name("tuned/checkpoint-300")
    ('tiny-1b', '')
    """
    parts = [part for part in re.split(r"[\\/]+", place) if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[-3].split("--")
    last = parts[-1].lower() if parts else ""
    return "" if _NAMELESS.fullmatch(last) else _STORED.sub("", last)


def _tell_of_end(own: Any, tokenizer: Any, adapter: str) -> None:
    """Warn where an adapter's tokenizer ends sequences otherwise: samples end with the token of the model's."""
    end = own.get("content") if isinstance(own, dict) else own
    if isinstance(end, str) and end != tokenizer.eos_token:
        logger.warning(
            "the adapter's folder %s names %s as the end of a sequence, and the model's tokenizer, which is the one "
            "that is used, %s, which every sample ends with. If it was trained with its own, give --model a folder "
            "with the model's weights and the adapter's tokenizer",
            adapter, end, tokenizer.eos_token,
        )  # fmt: skip


def _check_chat_template(own: Any, tokenizer: Any, adapter: str) -> None:
    there = getattr(tokenizer, "chat_template", None)
    if own is not None and _lines(own) != _lines(there):
        other = "other than that of the model's tokenizer" if there else "and the model's tokenizer has none"
        raise ModelError(
            f"the adapter's folder {adapter} holds a chat template {other}, which is the one that is used: it was most "
            "likely trained with its own. Give --model a folder with the model's weights and the adapter's tokenizer, "
            "or take the template out of the adapter's folder"
        )


def _lines(template: Any) -> Any:
    return template.replace("\r\n", "\n") if isinstance(template, str) else template


def _tokenizer_settings(adapter: str) -> dict[str, Any]:
    """Return what the tokenizer's files beside an adapter set, the one chat template among it; empty without any.

    Raises:
        ModelError: they cannot be read.
    """
    try:
        file, template = _file(adapter, "tokenizer_config.json"), _file(adapter, "chat_template.jinja")
        settings = {} if file is None else dict(json.loads(file.read_text("utf-8-sig")))
        own = settings.get("chat_template") if template is None else template.read_text("utf-8-sig")
        if isinstance(own, list):  # several, by name
            own = next((one["template"] for one in own if one["name"] == "default"), None)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(f"the tokenizer in the adapter's folder {adapter} cannot be read: {short(error)}") from error
    return settings | {"chat_template": own}


def _file(adapter: str, name: str) -> Path | None:
    """Return a file of an adapter's folder, or of its place on the hub; None where there is none."""
    if _is_folder(adapter):
        file = Path(adapter) / name
        return file if file.is_file() else None
    from transformers.utils import cached_file

    # Without a way to the hub, what was downloaded before is all that can be looked at.
    unasked = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(adapter, name, **unasked)
    return None if found is None else Path(found)
