"""The loss at the output layer: as cross-entropy of all logits, without holding them."""

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import encoded, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rapidin_vdb.gradient import RapidGradMaker, load_model, self_check
from rapidin_vdb.gradient import head as head_module
from rapidin_vdb.gradient.batch import BatchedGradients, LateGradientError
from rapidin_vdb.gradient.forward import TokenLosses
from rapidin_vdb.gradient.head import OutputLayer, find_output_layer
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.training import with_lora
from rapidin_vdb.records import ModelSpec, SketchSpec


def lora_of(model, *, modules=("q_proj", "v_proj"), dtype="float32") -> LoadedModel:
    adapted = with_lora(model, rank=4, modules=modules, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theta = {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    return LoadedModel(
        spec=ModelSpec(model="toy"), model=adapted.eval(), tokenizer=None, theta=theta, device="cpu", dtype=dtype
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 8, 20])
def test_losses_and_gradients_are_those_of_cross_entropy(tokens, bias, monkeypatch):
    monkeypatch.setattr(head_module, "_FEWEST_TOKENS", {"cpu": 8})
    monkeypatch.setattr(head_module, "_LOGIT_BYTES", {"cpu": 1})
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 30, bias=bias).requires_grad_(False)
    layer.weight.mul_(20)
    wanted, shares = torch.randint(30, (tokens,)), torch.rand(tokens) + 0.1
    for brought in (shares, torch.rand(tokens), torch.zeros(tokens)):
        hidden = torch.randn(tokens, 6, requires_grad=True)
        exact = hidden.detach().double().requires_grad_(True)
        logits = F.linear(exact, layer.weight.double(), layer.bias.double() if bias else None)
        expected = F.cross_entropy(logits, wanted, reduction="none")
        losses = OutputLayer(layer).losses(hidden, wanted, shares)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
        (losses * brought).sum().backward()
        (expected * brought).sum().backward()
        torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_what_is_all_but_certain_keeps_its_digits():
    """Of a memorised token, large logits leave a small loss, and a small gradient."""
    layer = torch.nn.Linear(1, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0], [0.9]]))
    hidden = torch.tensor([[100.0]], requires_grad=True)
    losses = OutputLayer(layer).losses(hidden, torch.tensor([0]), torch.ones(1))
    losses.sum().backward()
    first, second = layer.weight.double().flatten().tolist()
    other = math.exp(-100 * (first - second))
    assert float(losses.detach()) == pytest.approx(math.log1p(other), rel=1e-3)
    assert float(hidden.grad) == pytest.approx(other / (1 + other) * (second - first), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_it_is_rounded_where_cross_entropy_is(dtype):
    torch.manual_seed(1)
    layer = torch.nn.Linear(8, 40, bias=False).to(dtype).requires_grad_(False)
    counts, rows = torch.tensor([3, 7, 5]), torch.tensor([0] * 3 + [1] * 7 + [2] * 5)
    wanted, shares = torch.randint(40, (15,)), 1 / counts[rows]
    found = []
    for mine in (True, False):
        torch.manual_seed(2)
        hidden = torch.randn(15, 8, dtype=dtype, requires_grad=True)
        if mine:
            losses = OutputLayer(layer).losses(hidden, wanted, shares)
        else:
            losses = F.cross_entropy(layer(hidden).float(), wanted, reduction="none")
        TokenLosses(losses, rows, counts).means().sum().backward()
        found.append((losses.detach(), hidden.grad))
    assert torch.equal(found[0][0], found[1][0])
    # Two that differ in their last bit in float32 may be rounded apart.
    step = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    torch.testing.assert_close(found[0][1], found[1][1], rtol=step, atol=1e-4)
    assert (found[0][1] != found[1][1]).float().mean() < 0.05


def test_what_backward_brings_is_what_was_expected():
    """To the last bit: in 16 bits there would be a second rounding."""
    brought = []
    counts = torch.arange(1, 400)
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    losses = torch.rand(len(rows), requires_grad=True)
    losses.register_hook(brought.append)
    TokenLosses(losses, rows, counts).means().sum().backward()
    assert torch.equal(brought[0], 1 / counts[rows])


def test_nobody_asks_for_a_gradient():
    layer = torch.nn.Linear(4, 9).requires_grad_(False)
    hidden, wanted = torch.randn(5, 4), torch.randint(9, (5,))
    with torch.no_grad():
        losses = OutputLayer(layer).losses(hidden, wanted, torch.ones(5))
    torch.testing.assert_close(losses, F.cross_entropy(layer(hidden), wanted, reduction="none"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_rapidgrads_are_the_same_with_and_without(architecture, dtype, models, adapters, monkeypatch):
    monkeypatch.setattr(head_module, "_FEWEST_TOKENS", {"cpu": 8})
    monkeypatch.setattr(head_module, "_LOGIT_BYTES", {"cpu": 1})
    spec = ModelSpec(model=str(models[architecture]), adapter=str(adapters[architecture]), dtype=dtype)
    batch = [encoded(number, length) for number, length in enumerate((9, 5, 14, 30))]
    found = []
    for without in (False, True):
        maker = RapidGradMaker(load_model(spec, device="cpu"), spec=SketchSpec(width=128), normalize="layer")
        if without:
            maker._gradients._looked = True
        found.append(maker.make_batch(batch))
        assert (maker._gradients.output is None) == without and not maker._gradients.unruled
    for (one, loss), (other, same) in zip(*found, strict=True):
        assert loss == pytest.approx(same, rel=1e-5)
        # In 16 bits, products of other shapes may be rounded elsewhere.
        bound = 1e-5 if dtype == "float32" else 0.02
        assert np.linalg.norm(one - other) <= bound * np.linalg.norm(other)


def test_where_the_model_goes_on_with_its_logits_they_are_its_own():
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8))
    scaled = CohereForCausalLM(CohereConfig(**sizes))
    for model in (capped, scaled):
        assert find_output_layer(lora_of(model), [1, 2]) is None
    capped.config.final_logit_softcapping = None
    assert find_output_layer(lora_of(capped), [1, 2]) is not None


class Doubling(torch.nn.Linear):
    """A head of its own kind."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def model_that(does) -> LoadedModel:
    """Return a model whose logits are done something to, where `does` says so of them."""
    loaded = lora_of(tiny_model("llama"))
    forward = loaded.inner.forward

    def changed(*given, **named):
        answer = forward(*given, **named)
        if does(answer.logits):
            answer.logits = answer.logits * 2
        return answer

    changed.__signature__ = inspect.signature(forward)
    loaded.inner.forward = changed
    return loaded


def test_a_model_that_goes_on_for_some_batches_only_is_believed(caplog):
    """The pass over two tokens did not show it; nothing is lost, and nothing said twice."""
    loaded = model_that(lambda logits: logits.shape[1] > 2)
    spec, batch = SketchSpec(width=128), [encoded(number, 9) for number in range(3)]
    maker = RapidGradMaker(loaded, spec=spec, normalize="layer")
    found = [maker.make_batch(batch) for _ in range(2)][1]
    assert caplog.text.count("logits are held for a whole batch") == 1 and not maker._gradients.unruled
    for (vector, _), sample in zip(found, batch, strict=True):
        alone = torch.zeros(128)
        maker.add_alone(alone, sample)
        assert np.linalg.norm(vector - alone.numpy()) <= 1e-5 * np.linalg.norm(vector)


@pytest.mark.parametrize("wrong", ["losses", "gradients"])
def test_what_differs_from_autograd_is_found_out(wrong, monkeypatch, caplog):
    forward, backward = head_module._Losses.forward, head_module._Losses.backward

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            losses = forward(ctx, *given)
            return losses + 0.01 if wrong == "losses" else losses

        @staticmethod
        def backward(ctx, delta):
            grads, *others = backward(ctx, delta)
            return grads + 0.01 if wrong == "gradients" else grads, *others

    monkeypatch.setattr(head_module, "_Losses", Wrong)
    maker = RapidGradMaker(lora_of(tiny_model("llama")), spec=SketchSpec(width=128), normalize="layer")
    maker.make_batch([encoded(number, 9) for number in range(3)])
    assert maker._gradients.output is None and not maker._gradients.unruled
    assert "logits are held for a whole batch, which takes more memory (gradients differ" in caplog.text


def test_what_is_given_up_on_the_way_is_not_the_layers_fault(monkeypatch):
    stream, late = BatchedGradients.stream, []

    def late_once(gradients, batch, receiver):
        losses = stream(gradients, batch, receiver)
        if not late:
            late.append(gradients.output)
            gradients.give_up(0, "late")
            raise LateGradientError("late")
        return losses

    monkeypatch.setattr(BatchedGradients, "stream", late_once)
    maker = RapidGradMaker(lora_of(tiny_model("llama")), spec=SketchSpec(width=128), normalize="layer")
    maker.make_batch([encoded(number, 9) for number in range(3)])
    assert late[0] is not None and maker._gradients.output is late[0] and set(maker._gradients.unruled) == {0}


def test_a_wrong_rule_below_a_wrong_layer_takes_no_others_with_it(monkeypatch):
    backward = head_module._Losses.backward
    monkeypatch.setattr(
        head_module._Losses, "backward", lambda ctx, delta: (backward(ctx, delta)[0] + 0.1, *3 * [None])
    )
    maker = RapidGradMaker(lora_of(tiny_model("llama")), spec=SketchSpec(width=128), normalize="layer")
    watched = maker._gradients._rules[0]
    ((number, rule),) = watched.rules

    def wrong(*given):
        part = rule(*given)
        return dataclasses.replace(part, form=lambda samples: part.form(samples).roll(1, 2))

    watched.rules[:] = [(number, wrong)]
    maker.make_batch([encoded(number, 9) for number in range(3)])
    assert maker._gradients.output is None and set(maker._gradients.unruled) == {number}


def test_where_memory_ends_without_the_layer_it_is_not_left(monkeypatch):
    """In the self-check, which tries without; halves are checked anew."""
    agrees = self_check.agrees

    def failing(maker, *given):
        agrees(maker, *given)
        if maker._gradients.output is None:
            raise MemoryError
        return False

    maker = RapidGradMaker(lora_of(tiny_model("llama")), spec=SketchSpec(width=128), normalize="layer")
    batch = [encoded(number, 9) for number in range(3)]
    monkeypatch.setattr(self_check, "agrees", failing)
    with pytest.raises(MemoryError):
        maker.make_batch(batch)
    monkeypatch.undo()
    maker.make_batch(batch)
    assert maker._gradients.output is not None and not maker._gradients.unruled


def test_the_layer_is_itself_again_after_an_error(monkeypatch):
    loaded = lora_of(tiny_model("llama"))
    maker = RapidGradMaker(loaded, spec=SketchSpec(width=128), normalize="layer")
    batch = [encoded(number, 9) for number in range(3)]
    expected = maker.make_batch(batch)
    head = loaded.inner.lm_head

    def fail(*given):
        raise MemoryError("here")

    handle = loaded.inner.model.norm.register_forward_hook(fail)
    with pytest.raises(MemoryError, match="here"):
        maker.make_batch(batch)
    handle.remove()
    assert "forward" not in vars(head)
    for (vector, _), (again, _) in zip(expected, maker.make_batch(batch), strict=True):
        assert np.array_equal(vector, again)


def test_a_layer_that_is_trained_hooked_or_of_another_kind_is_left_alone():
    def found(change) -> OutputLayer | None:
        model = tiny_model("llama")
        change(model)
        return find_output_layer(lora_of(model), [1, 2])

    def doubling(model):
        model.lm_head = Doubling(16, 259, bias=False)

    def in_place(model):
        forward = type(model).forward
        model.forward = lambda *given, **named: doubled(forward(model, *given, **named))

    def doubled(answer):
        answer.logits.mul_(2)
        return answer

    assert found(lambda model: None) is not None
    assert found(doubling) is None and found(in_place) is None
    assert found(lambda model: model.lm_head.register_forward_hook(lambda *given: None)) is None
    assert find_output_layer(lora_of(tiny_model("llama"), modules=("q_proj", "lm_head")), [1, 2]) is None
    whole = tiny_model("llama")
    theta = dict(whole.named_parameters())
    full = LoadedModel(
        spec=ModelSpec(model="toy"), model=whole, tokenizer=None, theta=theta, device="cpu", dtype="float32"
    )
    assert find_output_layer(full, [1, 2]) is None
    biased = tiny_model("llama")
    biased.lm_head = torch.nn.Linear(16, 259)
    for theta in ({"lm_head.bias": biased.lm_head.bias}, {"lm_head.weight": biased.lm_head.weight}):
        assert find_output_layer(dataclasses.replace(full, model=biased, theta=theta), [1, 2]) is None
    theta = {"norm": biased.model.norm.weight}
    assert find_output_layer(dataclasses.replace(full, model=biased, theta=theta), [1, 2]) is not None
    tied = tiny_model("gpt2")
    theta = {"wte": tied.transformer.wte.weight}
    assert find_output_layer(dataclasses.replace(full, model=tied, theta=theta), [1, 2]) is None


class Sizes(TorchDispatchMode):
    """Keeps how many numbers the largest tensor has that is made within."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return made


def test_logits_are_computed_where_there_is_a_loss_alone(monkeypatch):
    maker = RapidGradMaker(lora_of(tiny_model("llama")), spec=SketchSpec(width=128), normalize="layer")
    batch = [encoded(number, 30) for number in range(8)]
    maker.make_batch(batch)
    rows, linear = [], F.linear

    def counting(read, weight, *given):
        if weight is maker.loaded.inner.lm_head.weight:
            rows.append(read.shape[:-1].numel())
        return linear(read, weight, *given)

    monkeypatch.setattr(F, "linear", counting)
    maker.make_batch(batch)
    assert sum(rows) == sum(len(sample.loss_tokens) for sample in batch)


def test_logits_of_a_batch_are_held_in_parts(monkeypatch):
    monkeypatch.setattr(head_module, "_FEWEST_TOKENS", {"cpu": 8})
    monkeypatch.setattr(head_module, "_LOGIT_BYTES", {"cpu": 1})
    batch, largest = [encoded(number, 30) for number in range(8)], {}
    vocabulary, tokens = 259 * 16, sum(len(sample.loss_tokens) for sample in batch)
    for without in (False, True):
        loaded = lora_of(tiny_model("llama"))
        loaded.inner.resize_token_embeddings(vocabulary, mean_resizing=False)
        maker = RapidGradMaker(loaded, spec=SketchSpec(width=128), normalize="layer")
        maker.make_batch(batch)  # checked, which looks at samples alone
        if without:
            maker._gradients.output = None
        with Sizes() as sizes:
            maker.make_batch(batch)
        largest[without] = sizes.largest
    assert largest[True] >= tokens * vocabulary > largest[False], (
        "what is measured shows all logits where there are any"
    )
