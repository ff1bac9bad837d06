"""Gradients from repeating a module for each sample, against plain autograd: what a module computes with and no rule knows."""

import logging

import pytest
import torch
import transformers
from conftest import tiny_model
from test_batch import SKETCH, assert_close, loaded_from, samples, slow
from test_fallback import adapted, trainable

from rapidin_vdb.gradient import RapidGradMaker, repeated
from rapidin_vdb.gradient import batch as batch_module
from rapidin_vdb.gradient.contribution import Call, NoRuleError
from rapidin_vdb.gradient.repeated import Repeated, repeating_module

_SIZES = {
    "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4, "head_dim": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ARCHITECTURES = {
    # Convolutions alone; with decays, steps and a gated norm; of which a linear layer is never called; and sinks.
    "Lfm2": _SIZES | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 24},
    "GraniteMoeHybrid": _SIZES
    | _STATES
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 24},
    "Qwen3Next": _SIZES
    | _DELTA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "Mamba": {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "GptOss": _SIZES | {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def made(name: str, **options):
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**ARCHITECTURES[name], **options)
    )
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:  # many begin as ones and zeros, which hide mistakes
                tensor.add_(0.1 * torch.randn_like(tensor))
    return loaded_from(model)


def check_all(loaded, normalize="layer", *, batch=None, checkpointing=False) -> RapidGradMaker:
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize=normalize)
    maker._gradients.checkpointing = checkpointing
    batch = samples() if batch is None else batch
    for _ in range(2):  # the batch that is compared, and one that is not
        for sample, (vector, _) in zip(batch, maker.make_batch(batch), strict=True):
            assert_close(vector, slow(loaded, sample, normalize))
    return maker


@pytest.mark.parametrize("normalize", ["none", "layer"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_of_these_is_left_to_autograd(name, normalize, caplog):
    caplog.set_level(logging.ERROR, logger="transformers")
    assert not check_all(made(name), normalize)._gradients.unruled
    assert not [one for one in caplog.records if one.name.startswith("rapidin_vdb")], "all samples at once"


@pytest.mark.parametrize("name", ["GraniteMoeHybrid", "GptOss"])
def test_modules_of_checkpointed_layers_are_repeated(name):
    assert not check_all(made(name), checkpointing=True)._gradients.unruled


@pytest.mark.parametrize("fitting", [1, 2, 5])
def test_only_so_many_samples_are_given_parameters_at_once(fitting, monkeypatch):
    loaded, gradients, counts = made("Lfm2"), repeated._gradients, []

    def counting(module, parameters, inputs, delta):
        counts.append(len(delta))
        return gradients(module, parameters, inputs, delta)

    monkeypatch.setattr(repeated, "_gradients", counting)
    monkeypatch.setattr(
        repeated, "_PARAMETER_BYTES", fitting * 4 * loaded.model.model.layers[0].conv.conv.weight.numel()
    )
    assert not check_all(loaded)._gradients.unruled
    assert max(counts) == fitting


class _Scale(torch.nn.Module):
    """A module around another, with a factor; and what a test makes of its forward."""

    def __init__(self, inner, columns=16):
        super().__init__()
        self.inner = inner
        self.factor = torch.nn.Parameter(torch.linspace(0.5, 1.5, columns))

    def forward(self, hidden):
        return self.inner(hidden) * self.factor


class _Asking(_Scale):
    """Asks for a number, which all samples at once cannot give."""

    def forward(self, hidden):
        return super().forward(hidden) * (1.0 if hidden.abs().sum().item() > 0 else 2.0)


class _Asserting(_Scale):
    """Fails in a way of its own."""

    def forward(self, hidden):
        assert not torch._C._functorch.is_batchedtensor(hidden)
        return super().forward(hidden)


class _Otherwise(_Scale):
    """Computes otherwise for all samples at once."""

    def forward(self, hidden):
        return super().forward(hidden) * (1.01 if torch._C._functorch.is_batchedtensor(hidden) else 1.0)


class _Remembering(_Scale):
    """Keeps what it has come to."""

    seen: torch.Tensor | None = None

    def __init__(self, inner):
        super().__init__(inner)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, hidden):
        self.seen, self.mean = hidden.detach(), hidden.detach().mean((0, 1))
        return super().forward(hidden)


class _Tabled(torch.nn.Module):
    """Given a table of positions, whose rows are tokens, not samples."""

    def __init__(self, inner):
        super().__init__()
        self.scale = _ByPlace(inner)

    def forward(self, hidden):
        table = 0.5 + 0.002 * torch.arange(hidden.shape[1] * 16.0).reshape(hidden.shape[1], 16)
        return self.scale(hidden, table=table)


class _ByPlace(_Scale):
    def forward(self, hidden, *, table):
        return super().forward(hidden) * table


class _Marked(torch.nn.Module):
    """Given something that may hold a state."""

    def __init__(self, inner):
        super().__init__()
        self.scale = _WithMark(inner)

    def forward(self, hidden):
        return self.scale(hidden, mark=object())


class _WithMark(_Scale):
    def forward(self, hidden, mark):
        return super().forward(hidden)


def around(kind):
    model = tiny_model("llama")
    model.model.layers[0].mlp = kind(model.model.layers[0].mlp)
    return loaded_from(model)


@pytest.mark.parametrize("kind", [_Asking, _Asserting])
def test_a_module_that_cannot_take_all_is_repeated_sample_by_sample(kind, caplog):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = kind(layer.mlp)
    assert not check_all(loaded_from(model))._gradients.unruled
    (said,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert said.startswith(
        f"{kind.__name__}: repeated one sample at a time for the gradients of factor, which is slower ("
    )


def test_a_module_that_writes_something_else_again_is_left_to_autograd():
    maker = check_all(around(_Otherwise))
    assert list(maker._gradients.unruled.values()) == ["_Otherwise does not write the same when it is repeated"]


def test_what_a_module_remembers_is_not_changed_by_repeating_it():
    loaded, batch = around(_Remembering), samples()
    check_all(loaded).make_batch(batch)
    module = loaded.model.model.layers[0].mlp
    assert module.seen.shape == (len(batch), 30, 16), "of the batch as a whole"
    torch.testing.assert_close(module.mean, module.seen.mean((0, 1)))


def test_a_table_of_positions_is_not_taken_for_samples():
    """Of five tokens, for five samples; and of others."""
    five = samples((5, 5, 5, 5, 5))
    loaded = around(_Tabled)
    assert not check_all(loaded, batch=five)._gradients.unruled
    assert not check_all(loaded)._gradients.unruled


def test_a_module_that_is_given_what_may_keep_a_state_is_left_to_autograd():
    maker = check_all(around(_Marked))
    assert list(maker._gradients.unruled.values()) == ["a module that is given a object"]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("fitting", [0, 1])
def test_memory_that_ends_is_no_fault_of_the_module(fitting, kind, monkeypatch):
    gradients = repeated._gradients

    def ended(module, parameters, inputs, delta):
        if len(delta) > fitting:
            raise kind("DefaultCPUAllocator: can't allocate memory")
        return gradients(module, parameters, inputs, delta)

    maker = RapidGradMaker(made("Lfm2"), spec=SKETCH, normalize="layer")
    maker.make_batch(samples())
    with monkeypatch.context() as patched:
        patched.setattr(repeated, "_gradients", ended)
        for batch in (samples(), samples()[:1])[: 2 - fitting]:
            with pytest.raises(kind, match="allocate memory"):
                maker.make_batch(batch)
    assert not maker._gradients.unruled
    check_all(maker.loaded)


def test_a_module_that_cannot_run_again_is_told():
    class Broken(torch.nn.Linear):
        def forward(self, hidden):
            raise RuntimeError("only once")

    module, wrote = Broken(3, 3), torch.ones(2, 4, 3)
    rule = Repeated(["weight"], told=set()).rule("weight")
    with pytest.raises(NoRuleError, match="Broken cannot be repeated: only once"):
        rule(module, Call((torch.ones(2, 4, 3),), {}, wrote), torch.ones_like(wrote), 2)
    with pytest.raises(NoRuleError, match=r"Broken writes \(8, 3\) for a batch of 2"):
        rule(module, Call((torch.ones(8, 3),), {}, wrote.flatten(0, 1)), torch.ones(8, 3), 2)


def test_what_comes_back_a_second_time_is_another_gradient():
    """As to a checkpointed layer's module; rules of one call share what was made of the same gradient alone."""
    module = _Scale(torch.nn.Identity(), 3)
    read, ones = torch.arange(24.0).reshape(2, 4, 3), torch.ones(2, 4, 3)
    rule = Repeated(["factor"], told=set()).rule("factor")
    call = Call((read,), {}, module(read).detach())
    for delta in (ones, 2 * ones):
        made = rule(module, call, delta, 2).form(slice(0, 2))
        torch.testing.assert_close(made, (delta * read).sum(1))


def test_a_tensor_at_home_in_two_modules_is_left_to_autograd():
    model = tiny_model("llama")
    model.model.layers[0].mlp = _Scale(model.model.layers[0].mlp)
    model.model.layers[1].mlp = _Scale(model.model.layers[1].mlp)
    model.model.layers[1].mlp.factor = model.model.layers[0].mlp.factor
    maker = check_all(loaded_from(model))
    assert list(maker._gradients.unruled.values()) == ["_Scale has no rule for factor"]


def test_a_part_that_the_output_does_not_depend_on_has_no_gradient():
    model = tiny_model("llama")
    model.model.layers[0].mlp = _Scale(model.model.layers[0].mlp)
    model.model.layers[0].mlp.unused = torch.nn.Parameter(torch.ones(5))
    assert not check_all(loaded_from(model))._gradients.unruled


@pytest.mark.parametrize("checkpointing", [False, True])
def test_magnitudes_of_dora_are_had_from_the_layers_they_stand_in(checkpointing):
    """They stand in containers that nobody calls."""
    loaded = trainable(adapted(tiny_model("llama"), "dora"))
    maker = check_all(loaded, checkpointing=checkpointing)
    assert any("magnitude" in name for name in loaded.theta) and not maker._gradients.unruled


def test_a_layer_that_is_checkpointed_is_repeated_plainly():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.input_layernorm = _Norm(layer.input_layernorm)
    for checkpointing in (False, True):
        assert not check_all(loaded_from(model), checkpointing=checkpointing)._gradients.unruled


class _Norm(torch.nn.Module):
    """One that no rule knows, without modules of its own."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, hidden):
        return self.weight * hidden / (1 + hidden.abs().mean(-1, keepdim=True))


class _Uncalled(_Scale):
    def __call__(self, hidden):
        return self.forward(hidden)


def test_a_module_that_is_not_called_is_told():
    maker = check_all(around(_Uncalled))
    assert list(maker._gradients.unruled.values()) == ["_Uncalled is not called"]


def test_adapters_under_tf32_are_repeated_without(monkeypatch, caplog):
    """On a GPU their products are a function of autograd's own, which all samples at once cannot take."""
    loaded = around(_Scale)
    layers = [loaded.model.model.layers[0].mlp.inner.down_proj]
    monkeypatch.setattr(batch_module, "adapter_layers", lambda loaded: layers)
    maker = check_all(loaded)
    assert not maker._gradients.unruled
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_which_module_is_repeated():
    model, small = tiny_model("llama"), torch.zeros(3)
    assert repeating_module(model, "model.layers.0.self_attn", small) == "model.layers.0.self_attn"
    assert repeating_module(model, "model.layers.0.self_attn.q_proj", small) == "model.layers.0.self_attn"
    assert repeating_module(model, "model", small) is None, "it embeds"
    assert repeating_module(model, "lm_head", small) is None, "the whole model"
    assert repeating_module(model, "model.layers.0.self_attn", torch.zeros(1).expand((1 << 20) + 1)) is None
