"""Load a causal language model, its adapter and its tokenizer, and choose the parameters theta."""

import dataclasses
import logging
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

from rapidin_vdb.errors import ModelError, ModelNotFoundError
from rapidin_vdb.gradient.adapter import check_adapter, load_adapter
from rapidin_vdb.gradient.causal import check_causal, check_kind, kind_of
from rapidin_vdb.gradient.device import device_failure, lacks_memory, resolve_device
from rapidin_vdb.gradient.memory import weight_bytes
from rapidin_vdb.gradient.parameters import choose_parameters
from rapidin_vdb.gradient.places import check_place, check_places, check_weights
from rapidin_vdb.gradient.quiet import quiet_libraries, short
from rapidin_vdb.gradient.tokenizer import load_tokenizer
from rapidin_vdb.records import DType, ModelSpec, ParameterShape

logger = logging.getLogger(__name__)

_WANTED = "Wanted a folder with config.json and model.safetensors, or the name of a model on the Hugging Face hub"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to give gradients: in eval mode, with exactly theta asking for them."""

    spec: ModelSpec
    """What was loaded."""
    model: Any
    """The model, its adapter applied (a torch.nn.Module)."""
    tokenizer: Any
    """Its tokenizer."""
    theta: dict[str, Tensor]
    """The parameter tensors, in the order of `named_parameters`."""
    device: str
    """Where it is."""
    dtype: str
    """Type of the base weights."""

    @property
    def inner(self) -> Any:
        """The transformers model itself, within an adapter where there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def known_tokens(self) -> int:
        """How many tokens the model has embeddings for."""
        return _embedding_within(self.model)[0].num_embeddings

    @property
    def learned_positions(self) -> int | None:
        """How many positions the model has embeddings for; None where positions are computed."""
        tokens = _embedding_within(self.model)
        others = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding) and m not in tokens]
        known = getattr(self.model.config, "max_position_embeddings", None)
        return int(known) if others and known else None

    @property
    def rotary_limit(self) -> int | None:
        """Length in tokens beyond which a whole batch is turned by other angles; None where angles are all the same."""
        return self._rotary("longrope")

    @property
    def rotary_memory(self) -> int | None:
        """Length in tokens beyond which angles are those of the longest sample so far; None where they never are."""
        return self._rotary("dynamic")

    def _rotary(self, kind: str) -> int | None:
        text = self.model.config.get_text_config()
        given = getattr(text, "rope_parameters", None) or {}
        limits = [
            (kind == "longrope" and one.get("original_max_position_embeddings")) or text.max_position_embeddings
            for one in (given, *given.values())  # or one for each type of layer
            if isinstance(one, dict) and one.get("rope_type") == kind
        ]
        return min(limits, default=None)

    @property
    def shapes(self) -> tuple[ParameterShape, ...]:
        """Names and shapes of theta, in order."""
        return tuple(ParameterShape(name=name, shape=tuple(tensor.shape)) for name, tensor in self.theta.items())


def _embedding_within(model: Any) -> list[torch.nn.Embedding]:
    """Return the embedding of tokens, with the copies of it that are within an adapter's wrapper."""
    modules = model.get_input_embeddings().modules()
    return [module for module in modules if isinstance(module, torch.nn.Embedding)]


def load_config(name: str) -> Any:
    """Return the configuration of a model, without its weights.

    Raises:
        ModelError: there is none, or it makes no sense.
    """
    from transformers import AutoConfig

    check_place(name, "model", "config.json")
    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        kind = ModelNotFoundError if isinstance(error, OSError) else ModelError
        raise kind(f"the model {name} cannot be loaded: {short(error)}. {_WANTED}") from error
    except StrictDataclassError as error:
        raise ModelError(
            f"the configuration of the model {name} makes no sense to transformers: {short(error).rstrip('.')}. Mend "
            "its config.json, or take that of the model that it was made from"
        ) from error


def check_loadable(spec: ModelSpec) -> Any:
    """Return a model's configuration, once it and its adapter can be loaded, as far as their weights are not read.

    Raises:
        ModelError: one of them is missing, is of a kind that is not loaded here, or makes no sense.
    """
    check_places(spec)
    config = load_config(spec.model)
    check_kind(config, spec.model)
    check_weights(spec.model)
    if spec.adapter is not None:
        check_adapter(spec.adapter)
    return config


def load_model(spec: ModelSpec, *, device: str = "auto", gradients: bool = True) -> LoadedModel:
    """Load a model, its adapter and its tokenizer; without `gradients` there is no theta, and there need be none.

    Raises:
        ModelError: one of them is missing, or they do not belong together.
        SpecError: theta cannot be chosen as asked, or no such device.
    """
    device = resolve_device(device)
    config = check_loadable(spec)
    spec = dataclasses.replace(spec, dtype=_resolved_dtype(spec, config))
    model = _load_base(spec, device, config)
    dtype = str(model.dtype).removeprefix("torch.")
    if spec.adapter is not None:
        model = load_adapter(model, spec.adapter, spec.model, device)
    model.eval()
    check_causal(model, spec.model)
    _keep_differentiable(model)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    tokenizer = load_tokenizer(spec.model)
    return LoadedModel(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        theta=choose_parameters(model, spec) if gradients else {},
        device=device,
        dtype=dtype,
    )


def _load_base(spec: ModelSpec, device: str, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": _DTYPES[spec.dtype]}
    if spec.quantization != "none":
        options["quantization_config"] = _quantization(spec)
    else:
        options |= _of_quantized(spec.model, config)
    try:
        with quiet_libraries():
            model, report = AutoModelForCausalLM.from_pretrained(
                spec.model,
                trust_remote_code=False,
                use_safetensors=True,
                device_map={"": device},
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, MemoryError, SafetensorError) as error:
        kind = ModelNotFoundError if isinstance(error, OSError) else ModelError
        raise kind(_not_loaded(spec, device, error, config)) from error
    _tell_unused(spec.model, sorted(report.get("unexpected_keys", ())))
    missing = sorted(report["missing_keys"]) + sorted(map(str, report.get("mismatched_keys", ())))
    if missing:
        raise ModelError(
            f"the model {spec.model} lacks weights of {len(missing)} parameters, such as {missing[0]}: it is "
            f"{kind_of(model.config)}, and was read as {type(model).__name__}"
        )
    return model


def _tell_unused(name: str, unused: list[str]) -> None:
    """Warn of weights that no parameter took, but for those that the model's class declares as not needed."""
    if unused:
        logger.warning(
            "%s: %d weights of the checkpoint are not used by the model, such as %s; is its config.json another's?",
            name, len(unused), ", ".join(unused[:3]),
        )  # fmt: skip


def _not_loaded(spec: ModelSpec, device: str, error: Exception, config: Any) -> str:
    """Say why a model cannot be loaded: its device is too small, or failed, or it is no such model."""
    if (failure := device_failure(error)) is not None:
        return f"{device} failed while the model {spec.model} was loaded: {failure}. See to the device, or name another"
    if not lacks_memory(error):
        return f"the model {spec.model} cannot be loaded: {short(error)}. {_WANTED}"
    weights = weight_bytes(config, dtype=spec.dtype, quantization=spec.quantization)
    smaller = []
    if spec.quantization != "nf4" and getattr(config, "quantization_config", None) is None:
        smaller.append("--quantization nf4")
    if spec.dtype == "float32":
        smaller.append("--dtype bfloat16")
    size = f", whose weights take {weights / 1e9:,.1f} GB" if weights else ""
    return (
        f"{device} has no memory for the model {spec.model}{size}: {short(error)}. It has to fit one device whole, and "
        f"once for each worker there: make room, take a larger --device or fewer --workers-per-device"
        + (f", or make the database with {' or '.join(smaller)}" if smaller else "")
    )


def _resolved_dtype(spec: ModelSpec, config: Any) -> DType:
    """Return the type of the base weights, in which a quantised model computes too: the same at `init` and later."""
    if spec.dtype != "auto":
        return spec.dtype
    found = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return cast(DType, found if found in _DTYPES else "float32")


def _of_quantized(name: str, config: Any) -> dict[str, Any]:
    """Return how a checkpoint is loaded that is quantised itself, and say where its gradients are another's affair."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    method = str(getattr(method, "value", method))
    if stored is None or method == "bitsandbytes":
        return {}
    if method == "mxfp4":
        from transformers import Mxfp4Config

        # Its kernel, where that is installed, hands no gradient on; so everywhere it is as on a CPU.
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    logger.warning(
        "%s is quantised (%s): whether gradients pass through its layers is up to that library, and nothing here would "
        "find out; a checkpoint in 16 bits, or with --quantization nf4, is known to be right",
        name, method,
    )  # fmt: skip
    return {}


def _quantization(spec: ModelSpec) -> Any:
    from transformers import BitsAndBytesConfig

    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_DTYPES[spec.dtype],
    )


def _keep_differentiable(model: torch.nn.Module) -> None:
    """Keep 4-bit layers, made here or stored so, from packing their weights for inference.

    On CPUs with AVX512-BF16 bitsandbytes does so in eval mode, wherever the input asks for no gradient (as in the first
    layer): a less precise product, without a backward pass. The flag means nothing else to these layers.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # then there is no such layer
        return
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.training = True
