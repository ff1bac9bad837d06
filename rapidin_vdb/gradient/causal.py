"""Whether a model is a causal language model: one that predicts each token from those before it."""

from typing import Any

import torch

from rapidin_vdb.errors import ModelError

_WANTED = "Wanted a causal language model, which predicts each token from those before it, such as Llama, Qwen or GPT-2"


def check_kind(config: Any, name: str) -> None:
    """Refuse a kind of model that transformers knows no causal language model of.

    Raises:
        ModelError: says which kind it is.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"the model {name} is {kind_of(config)}, and no such model is loaded here. {_WANTED}")


def kind_of(config: Any) -> str:
    """Return what a configuration says that its model is."""
    classes = ", ".join(getattr(config, "architectures", None) or ())
    return f"of type {config.model_type}" + (f" ({classes})" if classes else "")


def check_causal(model: Any, name: str) -> None:
    """Refuse an encoder: put into a language model's class, its tokens would see those that they are to predict.

    Raises:
        ModelError: what is said of a token depends on the one behind it.
    """
    # Most have no such field, and are causal; of those with a false one, some are all the same (GPT-NeoX).
    if getattr(model.config, "is_decoder", None) is not False:
        return
    texts = (torch.tensor([[1] + 7 * [token]], device=model.device) for token in (1, 2))
    with torch.no_grad():
        one, other = (model(ids).logits[0, 0].float() for ids in texts)
    if float((one - other).norm()) > 8 * torch.finfo(model.dtype).eps * float(one.norm()):
        raise ModelError(
            f"the model {name} is {kind_of(model.config)} and reads its tokens in both directions. {_WANTED}; of this "
            "kind, one that was trained with is_decoder set in its configuration"
        )
