"""A PEFT adapter is put on its model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rapidin_vdb.errors import ModelError, ModelNotFoundError
from rapidin_vdb.gradient.memory import is_out_of_memory
from rapidin_vdb.gradient.quiet import quiet_libraries, short


def _refuse_pickle(adapter: str) -> None:
    """Refuse an adapter without safetensors: PEFT would go on to unpickle what is there instead."""
    file = "adapter_model.safetensors"
    if Path(adapter).is_dir():
        there = (Path(adapter) / file).is_file()
        if not there and not any(Path(adapter).glob("*.bin")):
            raise ModelNotFoundError(
                f"the adapter folder {adapter} has no {file}; give the folder that save_pretrained wrote, all of it"
            )
    else:
        from transformers.utils import cached_file

        try:
            cached_file(adapter, "adapter_config.json")
            there = cached_file(adapter, file, _raise_exceptions_for_missing_entries=False) is not None
        except OSError as error:
            raise ModelNotFoundError(
                f"no adapter at {adapter}: neither a folder nor a name that can be reached ({short(error)})"
            ) from error
    if not there:
        raise ModelError(
            f"the adapter {adapter} has no {file}; pickled weights (.bin) are not loaded, for they can run code: save "
            "the adapter again with save_pretrained(..., safe_serialization=True)"
        )


def check_adapter(adapter: str) -> Any:
    """Return the configuration of an adapter that can be loaded, as far as its weights are not read.

    Raises:
        ModelError: there is no such adapter, it cannot be repeated or is of another kind, or its weights are pickled.
    """
    _refuse_pickle(adapter)
    with quiet_libraries():  # the import too: bitsandbytes says at import what it does without
        from peft import PeftConfig

        try:
            config = PeftConfig.from_pretrained(adapter)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the configuration of the adapter {adapter} cannot be read: {short(error)}; save it again, or copy it "
                "anew"
            ) from error
    if config.is_prompt_learning:
        raise ModelError(
            f"the adapter {adapter} learns a prompt ({config.peft_type.value}), which takes places before a "
            "sample's own tokens; wanted one that changes the model's layers, such as LoRA"
        )
    _refuse_unrepeatable(config, adapter)
    return config


def load_adapter(model: Any, adapter: str, base: str, device: str) -> Any:
    """Return a model with an adapter on it, whose weights are read onto a device; `base` is the model's name.

    Raises:
        ModelError: there is no such adapter, it does not fit the model or the memory, or its weights are pickled.
    """
    config = check_adapter(adapter)
    try:
        with quiet_libraries():
            from peft import PeftModel, get_peft_model_state_dict
            from peft.utils import load_peft_weights

            weights = load_peft_weights(adapter, device="cpu", use_safetensors=True)
            _check_vocabulary(model, config, weights, adapter=adapter, base=base)
            # Else PEFT reads it onto the first GPU, wherever the model is.
            adapted = PeftModel.from_pretrained(
                model, adapter, is_trainable=True, use_safetensors=True, torch_device=device
            )
            weights = _as_placed(adapted, weights)
    except SafetensorError as error:
        raise ModelError(
            f"the adapter {adapter} cannot be read: {short(error)}; save it again, or copy it anew"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ModelError(f"{device} has no memory for the adapter {adapter}: {short(error)}") from error
        raise ModelError(
            f"the adapter {adapter} does not fit the model {base}: {short(error)}. "
            f"Was it made for another model?{_made_for(adapter)}"
        ) from error
    # PEFT only warns of keys that it could not place, or did not find.
    placed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    differing = (set(placed) - set(weights)) | _without_place(adapted, weights, known=set(placed))
    if differing:
        raise ModelError(
            f"the adapter {adapter} does not fit the model {base}: {len(differing)} of its weights have no place there "
            f"or are missing, such as {min(differing)}. Was it made for another model?{_made_for(adapter)}"
        )
    return adapted


def _refuse_unrepeatable(config: Any, adapter: str) -> None:
    """Refuse LoRA whose beginning took from the model's weights what cannot be taken from them again.

    PEFT does it anew at each load. By an exact decomposition (`pissa`, `olora`) it finds the same every time; other
    beginnings (`eva`, `orthogonal`, `mica`, `gaussian`) leave the model as it is.
    """
    how = str(getattr(config, "init_lora_weights", "")).lower()
    if how == "loftq" and not torch.cuda.is_available():
        raise ModelError(
            f"the adapter {adapter} began as {how}, which PEFT computes on a GPU alone; this machine has none"
        )
    if how.startswith("pissa_niter_"):
        why = "by a draw, another one at each load"
    elif how in ("corda", "lora_ga"):
        why = "by what was computed of samples, which is not kept with it"
    else:
        return
    raise ModelError(
        f"the adapter {adapter} began as {how}: that took a part out of the model's weights {why}, and it cannot be "
        "put on them as it was trained. Where it was trained, save it as plain LoRA, with save_pretrained(..., "
        "path_initial_model_for_weight_conversion=FOLDER), the folder of the adapter as it was before training"
    )


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


def _without_place(adapted: Any, weights: dict[str, Tensor], *, known: set[str]) -> set[str]:
    """Return the names of weights that are neither the adapter's known ones nor the model's own.

    Embeddings and output layer are in a file where whoever saved it asked for them, or PEFT took them for resized. What
    is adapted there, or trained whole, stands there once more then, by a name that PEFT does not read.
    """
    others = set(weights) - known - set(adapted.state_dict())
    layers = {id(layer) for layer in (adapted.get_input_embeddings(), adapted.get_output_embeddings())}
    owners = tuple(f"{name}." for name, module in adapted.named_modules() if id(module) in layers)
    twice = {name for name in others if name.startswith(owners) and _is_copy(weights[name], weights, known, owners)}
    return others - twice


def _is_copy(tensor: Tensor, weights: dict[str, Tensor], known: set[str], owners: tuple[str, ...]) -> bool:
    same = (weights[name] for name in known & set(weights) if name.startswith(owners))
    return any(other.shape == tensor.shape and bool((other == tensor).all()) for other in same)


# How the weights of an adapted or whole layer are named in a file, and which of their sizes is that of the vocabulary.
_OF_VOCABULARY = {
    "weight": 0, "base_layer.weight": 0, "original_module.weight": 0, "modules_to_save.weight": 0,
    "token_adapter.base_layer.weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0,
}  # fmt: skip


def _check_vocabulary(model: Any, config: Any, weights: dict[str, Tensor], *, adapter: str, base: str) -> None:
    """Refuse an adapter of a vocabulary of another size than the model's, before PEFT fails of it in its own words."""
    if (known := getattr(model.get_input_embeddings(), "num_embeddings", None)) is None:
        return
    layers = {id(model.get_input_embeddings()): known}
    if (output := model.get_output_embeddings()) is not None:
        layers[id(output)] = int(getattr(output, "out_features", known))
    sizes = [
        (int(tensor.shape[axis]), layers[id(module)])
        for name, module in model.named_modules()
        if id(module) in layers
        for ending, axis in _OF_VOCABULARY.items()
        if (tensor := weights.get(f"base_model.model.{name}.{ending}")) is not None and tensor.dim() > axis
    ]
    trained = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or ()
    places = [place for some in (trained.values() if isinstance(trained, dict) else [trained]) for place in some]
    if places and max(places) >= known:
        sizes.append((max(places) + 1, known))
    for wanted, there in sizes:
        if wanted != there:
            raise ModelError(
                f"the adapter {adapter} does not fit the model {base}: it is of a vocabulary of {wanted} tokens, and "
                f"the model's has {there}. Was it made for another model?{_made_for(adapter)} Or were tokens added to "
                "this one: then give --model a folder with it as it was trained. Load it, call "
                f"resize_token_embeddings({wanted}), and save it there, with the tokenizer that has these tokens"
            )


def _made_for(adapter: str) -> str:
    try:
        base = json.loads((Path(adapter) / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError):
        return ""
    return f" Its configuration names {base}." if base else ""
