"""LoRA of the router of a mixture of experts, a matrix that is no linear layer: PEFT wraps the module that holds it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.gradient.adapted_experts import unwrapped
from rapidin_vdb.gradient.contribution import Call, Contribution, Dense, NoRuleError, tokens_of
from rapidin_vdb.gradient.experts import is_router


def is_adapted_router(module: torch.nn.Module) -> bool:
    """Say whether a module is PEFT's LoRA of a router's matrix."""
    wrappers, router = unwrapped(module)
    return len(wrappers) == 1 and wrappers[0].parameter_name == "weight" and is_router(router)


def router_factor_rule(name: str) -> Callable[[Any, Call, Tensor, int], Contribution] | None:
    """Return the rule for a factor of the adapter, by its name: A is [rank, columns], B [experts, rank]."""
    _, _, factor = name.partition(".lora_")
    kind, _, adapter = factor.partition(".")
    if not factor:
        return None

    def rule(module: Any, call: Call, delta: Tensor, batch: int) -> Contribution:
        active = [name for name in module.active_adapters if name in module.lora_A]
        if active != [adapter] or module.merged or module.disable_adapters:
            raise NoRuleError("an adapter of a router that is not added, or not alone")
        a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        read, delta = tokens_of(call.read[0], batch).to(a), tokens_of(delta, batch).to(a)
        scale = module.scaling[adapter]
        if kind == "A":
            return Dense(lambda samples: scale * torch.bmm((delta[samples] @ b).transpose(1, 2), read[samples]))
        return Dense(lambda samples: scale * torch.bmm(delta[samples].transpose(1, 2), read[samples] @ a.T))

    return rule
