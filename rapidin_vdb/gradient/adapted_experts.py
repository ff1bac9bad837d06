"""Experts as they compute: their tensors, and LoRA of these (PEFT's `target_parameters`).

PEFT wraps the module that holds the tensors once for each tensor that it adapts, wrapper within wrapper, and adds the
products of all experts to it while the innermost runs. All factors of a kind stand in one matrix, which no module
multiplies by: A is [experts * rank, columns], B [rows, rank * experts].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rapidin_vdb.gradient.contribution import NoRuleError


def is_experts(module: torch.nn.Module) -> bool:
    """Say whether a module is experts as transformers lays them out, with wrappers around them or without.

    Gate and up stand in one tensor, down in another, each of as many experts; both may have biases.
    """
    weights = {"gate_up_proj": 3, "down_proj": 3}
    biases = {f"{name}_bias": 2 for name in weights}
    _, inner = unwrapped(module)
    parameters = dict(inner.named_parameters(recurse=False))
    held = {name: parameter.dim() for name, parameter in parameters.items()}
    # Of some, more are chosen among than compute (LongCat's, which pass a token on).
    return held in (weights, weights | biases) and len({len(parameter) for parameter in parameters.values()}) == 1


def wrapped_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names and parameters of what stands within a wrapper of experts; see `is_experts`."""
    wrappers, inner = unwrapped(module)
    for wrapper in wrappers:
        for kind in ("lora_A", "lora_B"):
            for adapter, layer in getattr(wrapper, kind).items():
                yield f"{wrapper.parameter_name}.{kind}.{adapter}", layer.weight
    if wrappers:
        yield from inner.named_parameters(recurse=False)


def wrapped_modules(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the modules whose parameters `wrapped_parameters` yields."""
    for wrapper in unwrapped(module)[0]:
        yield from (*wrapper.lora_A.values(), *wrapper.lora_B.values(), wrapper.base_layer)


@dataclass(frozen=True, eq=False)
class Factors:
    """LoRA of one expert's tensor, as far as it stands in the way from what it reads to what it writes."""

    a: Tensor
    """[rank, columns]."""
    b: Tensor
    """[rows, rank]."""
    scale: float
    a_reads: bool
    """Whether A multiplies what is read, and B that; else B does, turned, and A that."""

    @property
    def product(self) -> Tensor:
        """What is added to the expert's matrix, [written, read]."""
        return self.scale * (self.b @ self.a if self.a_reads else self.a.T @ self.b.T)


class Experts:
    """The tensors that a call of experts computes with, wrapped or not."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Look through the wrappers.

        Raises:
            NoRuleError: their adapters are merged, left out, or several at once.
        """
        wrappers, self._base = unwrapped(module)
        for wrapper in wrappers:
            active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            if len(active) != 1 or wrapper.merged or wrapper.disable_adapters:
                raise NoRuleError("experts with adapters of which not exactly one is added")
        self._wrappers = {wrapper.parameter_name: wrapper for wrapper in wrappers}
        self.turned = bool(getattr(self._base, "is_transposed", False))
        """Whether matrices are stored as [read, written]."""

    def tensor(self, name: str) -> Tensor:
        """Return one of the tensors as it is stored, [experts, ...]."""
        return self._base.get_parameter(name).detach()

    def matrix(self, name: str, expert: int) -> Tensor:
        """Return one expert's matrix, [written, read], with what its adapter adds."""
        stored = self.tensor(name)[expert]
        matrix = stored.T if self.turned else stored
        return matrix + self.factors(name, expert).product.to(matrix) if name in self._wrappers else matrix

    def adapter(self, name: str) -> str:
        """Return the name of the adapter that is added to a tensor."""
        wrapper = self._wrappers[name]
        (adapter,) = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]
        return str(adapter)

    def factors(self, name: str, expert: int) -> Factors:
        """Return the adapter of one expert's matrix."""
        wrapper, adapter = self._wrappers[name], self.adapter(name)
        count = len(self.tensor(name))
        a, b = wrapper.lora_A[adapter].weight.detach(), wrapper.lora_B[adapter].weight.detach()
        # PEFT exchanges what A and B multiply where matrices are stored as [written, read]; older ones do not.
        exchanged = bool(getattr(wrapper, "_did_swap_in_out_features", False))
        return Factors(
            a=a.unflatten(0, (count, -1))[expert],
            b=b.unflatten(1, (-1, count))[..., expert],
            scale=wrapper.scaling[adapter],
            a_reads=exchanged != self.turned,
        )

    def gate_up(self, expert: int, read: Tensor) -> Tensor:
        """Return what an expert's gate and up make of states, [tokens, 2 * inner]."""
        written = read @ self.matrix("gate_up_proj", expert).T
        bias = getattr(self._base, "gate_up_proj_bias", None)
        return written if bias is None else written + bias[expert].detach()

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return what gate and up make together, [tokens, inner]."""
        if hasattr(self._base, "_apply_gate"):
            gated: Tensor = self._base._apply_gate(gate_up)
            return gated
        gate, up = gate_up.chunk(2, dim=-1)
        gated = self._base.act_fn(gate) * up
        return gated


def unwrapped(module: Any) -> tuple[list[Any], Any]:
    """Return PEFT's wrappers, each LoRA of a single tensor, from the outermost on, and the module within them all."""
    wrappers = []
    while isinstance(getattr(module, "parameter_name", None), str) and hasattr(module, "lora_A"):
        wrappers.append(module)
        module = module.base_layer
    return wrappers, module
