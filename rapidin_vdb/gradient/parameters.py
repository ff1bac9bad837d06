"""Which of a model's parameters are theta."""

import re
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.errors import SpecError
from rapidin_vdb.records import ModelSpec


def choose_parameters(model: torch.nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Return theta by name, in the order of `named_parameters`; these ask for a gradient from then on, no others.

    Raises:
        SpecError: the selection matches nothing, or takes in what has no gradient.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())  # a tied tensor stands once
    if spec.parameters == "trainable":
        chosen = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
        if spec.quantization != "none" and spec.adapter is None:
            raise SpecError(f"{spec.quantization} weights have no gradient; give --adapter, or --quantization none")
        packed = [name for name, tensor in named.items() if not tensor.is_floating_point()]
        if packed and spec.adapter is None:
            raise SpecError(
                f"{len(packed)} weights of the model {spec.model} are stored quantised and have no gradient, such as "
                f"{packed[0]}; give --adapter, a checkpoint in 16 bits, or --parameters REGEX for some of the others"
            )
    elif spec.parameters == "all":
        chosen = named
    else:
        try:
            pattern = re.compile(spec.parameters)
        except re.error as error:
            raise SpecError(f"--parameters {spec.parameters} is no regular expression: {error}") from error
        chosen = {name: tensor for name, tensor in named.items() if pattern.search(name)}
    frozen = [name for name, tensor in chosen.items() if not tensor.is_floating_point()]
    if frozen:
        raise SpecError(
            f"--parameters {spec.parameters} takes in quantised weights, which have no gradient: {frozen[0]}"
        )
    if not chosen:
        raise SpecError(
            f"--parameters {spec.parameters} matches none of the {len(named)} parameters; "
            f"names look like {next(iter(named))}"
        )
    for name, tensor in named.items():
        if tensor.is_floating_point():
            tensor.requires_grad_(name in chosen)
    return chosen


def without_part(model: Any) -> dict[int, str]:
    """Return the parameters that have no part in the loss of any text, by their ids: of each the name of its part.

    Of models that read images or sounds too: all that stands beside their text model, with its embedding and output
    layer. The gradients of these are zero.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "get_decoder"):
        return {}
    if config.get_text_config(decoder=True) is config:
        return {}
    text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    within = {id(parameter) for part in text if part is not None for parameter in part.parameters()}
    found: dict[int, str] = {}
    for name, module in model.named_modules():  # a module comes before what is in it
        held = [id(parameter) for parameter in module.parameters()]
        if not within.intersection(held):
            found |= {one: name for one in held if one not in found}
    return found
