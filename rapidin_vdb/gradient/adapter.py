"""A PEFT adapter is put on its model."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient.memory import is_out_of_memory
from rapidin_vdb.gradient.quiet import quiet_libraries, short


def _refuse_pickle(adapter: str) -> None:
    """Refuse an adapter without safetensors: PEFT would go on to unpickle what is there instead."""
    file = "adapter_model.safetensors"
    if Path(adapter).is_dir():
        there = (Path(adapter) / file).is_file()
    else:
        from transformers.utils import cached_file

        cached_file(adapter, "adapter_config.json")  # or it says that there is no such adapter
        there = cached_file(adapter, file, _raise_exceptions_for_missing_entries=False) is not None
    if not there:
        raise ModelError(
            f"the adapter {adapter} has no {file}; pickled weights (.bin) are not loaded, for they can run code: save "
            "the adapter again with save_pretrained(..., safe_serialization=True)"
        )


def load_adapter(model: Any, adapter: str, base: str, device: str) -> Any:
    """Return a model with an adapter on it, whose weights are read onto a device; `base` is the model's name.

    Raises:
        ModelError: there is no such adapter, it does not fit the model or the memory, or its weights are pickled.
    """
    try:
        _refuse_pickle(adapter)
        with quiet_libraries():  # the imports too: bitsandbytes says at import what it does without
            from peft import PeftConfig, PeftModel, get_peft_model_state_dict
            from peft.utils import load_peft_weights

            config = PeftConfig.from_pretrained(adapter)
            if config.is_prompt_learning:
                raise ModelError(
                    f"the adapter {adapter} learns a prompt ({config.peft_type.value}), which takes places before a "
                    "sample's own tokens; wanted one that changes the model's layers, such as LoRA"
                )
            # Else PEFT reads it onto the first GPU, wherever the model is.
            adapted = PeftModel.from_pretrained(
                model, adapter, is_trainable=True, use_safetensors=True, torch_device=device
            )
            weights = _as_placed(adapted, load_peft_weights(adapter, device="cpu", use_safetensors=True))
    except SafetensorError as error:
        raise ModelError(
            f"the adapter {adapter} cannot be read: {short(error)}; save it again, or copy it anew"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ModelError(f"{device} has no memory for the adapter {adapter}: {short(error)}") from error
        if not Path(adapter).is_dir() and isinstance(error, OSError | ValueError) and "find" in str(error).lower():
            raise ModelError(f"no adapter at {adapter}: neither a folder nor a name that can be reached") from error
        raise ModelError(
            f"the adapter {adapter} does not fit the model {base}: {short(error)}. "
            f"Was it made for another model?{_made_for(adapter)}"
        ) from error
    # PEFT only warns of keys that it could not place, or did not find.
    placed = get_peft_model_state_dict(adapted)
    differing = set(weights) ^ set(placed)
    if differing:
        raise ModelError(
            f"the adapter {adapter} does not fit the model {base}: {len(differing)} of its weights have no place there "
            f"or are missing, such as {min(differing)}. Was it made for another model?{_made_for(adapter)}"
        )
    return adapted


def _as_placed(adapted: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's weights under the names that PEFT places them by, as it makes them of those of a file.

    Experts that were modules of their own under transformers 4 are one tensor a kind since, and so are their adapters.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # older ones place them by the names that they have
        return weights
    config = adapted.peft_config["default"]
    placed: dict[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(adapted, config, weights)
    return placed


def _made_for(adapter: str) -> str:
    try:
        base = json.loads((Path(adapter) / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError):
        return ""
    return f" Its configuration names {base}." if base else ""
