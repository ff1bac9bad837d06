"""Models that batched gradients have no rule for, or nearly got wrong: every RapidGrad is plain autograd's."""

import dataclasses
import logging

import pytest
import torch
from conftest import save_model, tiny_model
from test_batch import SKETCH, _Doubled, assert_close, loaded_from, samples, slow

from rapidin_vdb.errors import GradientError, ModelError
from rapidin_vdb.gradient import RapidGradMaker, load_model
from rapidin_vdb.gradient import sample as sample_module
from rapidin_vdb.gradient.batch import BatchedGradients, LateGradientError
from rapidin_vdb.gradient.rules import rule_for
from rapidin_vdb.records import Encoded, ModelSpec


def maker_of(loaded, normalize="layer") -> RapidGradMaker:
    return RapidGradMaker(loaded, spec=SKETCH, normalize=normalize)


def trainable(model):
    """The model with exactly those tensors as theta that ask for a gradient."""
    loaded = loaded_from(model)
    return dataclasses.replace(loaded, theta={n: t for n, t in loaded.theta.items() if t.requires_grad})


def check_all(maker, batch, normalize="layer") -> None:
    for sample, (vector, _) in zip(batch, maker.make_batch(batch), strict=True):
        assert_close(vector, slow(maker.loaded, sample, normalize))


def test_a_check_that_ran_out_of_memory_is_made_up_for(monkeypatch):
    """The first batch may not fit; its halves are compared all the same."""
    model = tiny_model("llama")
    wrong = _Doubled(16, 16, bias=False)
    wrong.weight = model.model.layers[1].self_attn.q_proj.weight
    model.model.layers[1].self_attn.q_proj = wrong
    maker, stream = maker_of(loaded_from(model)), BatchedGradients.stream

    def scarce(self, batch, receiver):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return stream(self, batch, receiver)

    monkeypatch.setattr(BatchedGradients, "stream", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        maker.make_batch(samples())
    check_all(maker, samples()[:3])
    assert len(maker._gradients.unruled) == 1


def test_a_check_that_takes_more_than_the_batch_looks_at_fewer_samples(monkeypatch):
    """Else batches would be halved for good, for the sake of the first."""
    from rapidin_vdb.gradient import rapidgrad

    maker, looked_at, original = maker_of(loaded_from(tiny_model("llama"))), [], rapidgrad.check
    batch = sorted(samples(), key=lambda sample: len(sample.input_ids))

    def scarce(maker, some):
        looked_at.append([sample.sample_id for sample in some])
        if len(some) > 3:
            raise RuntimeError("CUDA error: out of memory")
        return original(maker, some)

    monkeypatch.setattr(rapidgrad, "check", scarce)
    check_all(maker, batch)
    names = [sample.sample_id for sample in batch]
    assert looked_at[0] == names and len(looked_at[-1]) <= 3
    assert looked_at[-1][0] == names[0] and looked_at[-1][-1] == names[-1], "the shortest and the longest"
    count = len(looked_at)
    maker.make_batch(batch)
    assert len(looked_at) == count, "once"

    def none(maker, some):
        raise MemoryError

    monkeypatch.setattr(rapidgrad, "check", none)
    with pytest.raises(MemoryError):
        maker_of(loaded_from(tiny_model("llama"))).make_batch(batch)


@pytest.mark.parametrize("alone", [True, False])
def test_a_tensor_that_the_loss_does_not_depend_on_has_no_part(alone):
    """As the biases by which some mixtures only choose their experts."""
    model = tiny_model("llama")
    model.unused = torch.nn.Parameter(torch.ones(200))
    if alone:
        model.requires_grad_(False)
        model.unused.requires_grad_(True)
        loaded = trainable(model)
        results = maker_of(loaded).make_batch(samples())
        assert all(isinstance(result, GradientError) and "zero" in str(result) for result in results)
        return
    loaded = loaded_from(model)
    maker = maker_of(loaded)
    check_all(maker, samples())
    assert set(maker._gradients.unruled) == {list(loaded.theta).index("unused")}


def adapted(model, kind: str):
    from peft import LoraConfig, get_peft_model

    options = {
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 5]},
        "tied tokens": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": [9, 3, 5]},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "positions": {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True},
        "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    }[kind]
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:  # B begins as zeros, which hide mistakes
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "tokens"),
        ("gpt2", "tied tokens"),  # its output layer is the same matrix
        ("llama", "embedding"),
        ("gpt2", "positions"),
        ("llama", "dora"),
    ],
)
def test_adapters_of_embeddings_and_others(architecture, kind):
    torch.manual_seed(0)
    loaded = trainable(adapted(tiny_model(architecture), kind))
    maker = maker_of(loaded)
    check_all(maker, samples())
    assert loaded.known_tokens == 259
    assert not [
        name
        for number, name in enumerate(loaded.theta)
        if ("lora_embedding" in name or "trainable_tokens" in name) and number in maker._gradients.unruled
    ]
    assert (loaded.learned_positions is not None) == (architecture == "gpt2")


def test_an_embedding_around_trained_tokens_is_left_to_autograd():
    """PEFT calls another function than the embedding itself. The sample that is compared has trained tokens only."""
    torch.manual_seed(0)
    loaded = loaded_from(adapted(tiny_model("llama"), "tokens"))
    for tensor in loaded.theta.values():
        tensor.requires_grad_(True)
    batch = samples((9, 30, 12))
    batch[0] = dataclasses.replace(batch[0], input_ids=tuple([9, 3, 5] * 3))
    maker = maker_of(loaded)
    check_all(maker, batch)
    assert list(maker._gradients.unruled.values()) == ["TrainableTokensLayer has no rule for base_layer.weight"]


@pytest.mark.parametrize("trained", [[1, 2], [1, 2, 3, 5]])
def test_trained_tokens_of_another_adapter_do_not_take_the_place_of_the_active_ones(trained):
    from peft import LoraConfig

    torch.manual_seed(0)
    model = adapted(tiny_model("llama"), "tokens")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=trained))
    model.set_adapter("b")
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("trainable_tokens" in name or "lora_" in name)
    maker = maker_of(trainable(model))
    check_all(maker, samples())
    names = list(maker.loaded.theta)
    (rows,) = [names[number] for number in maker._gradients.unruled if "trainable_tokens" in names[number]]
    assert rows.endswith("default")


def test_a_norm_that_is_called_a_layer_norm_and_is_none_has_no_rule():
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    assert rule_for(CohereLayerNorm(8), "weight") is not None and rule_for(T5LayerNorm(8), "weight") is None


def test_what_an_adapter_measures_itself_by_is_not_waited_for():
    """DoRA multiplies its own matrices to take their norm, which has no part in a gradient: none is kept for it."""
    torch.manual_seed(0)
    maker = maker_of(trainable(adapted(tiny_model("llama"), "dora")))
    maker.make_batch(samples())
    kept = []
    from rapidin_vdb.gradient.hooks import Run

    finish = Run.finish

    def watched(self):
        kept.extend(number for number, pending in self.pending.items() if pending.contributions)
        finish(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "finish", watched)
        check_all(maker, samples())
    assert kept == []


def test_a_tied_embedding_that_is_scaled_is_batched():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, sliding_window=8,
    )  # fmt: skip
    maker = maker_of(loaded_from(Gemma3ForCausalLM(config)))
    check_all(maker, samples())
    names = list(maker.loaded.theta)
    assert not [names[number] for number in maker._gradients.unruled if "embed" in names[number]]


def test_a_model_that_multiplies_its_embeddings_in_place():
    from transformers import CTRLConfig, CTRLLMHeadModel

    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=259, n_positions=64, n_embd=16, dff=24, n_layer=2, n_head=2)
    maker = maker_of(loaded_from(CTRLLMHeadModel(config)), "none")
    check_all(maker, samples(), "none")


@pytest.mark.parametrize("focus", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_sample_of_two_tokens_is_the_same_in_any_batch(architecture, focus):
    """Its queries and keys have no gradient; padded, they had one of rounding noise, scaled to the length of others."""
    maker = maker_of(loaded_from(tiny_model(architecture)))
    stub = Encoded(sample_id="stub", input_ids=(1, 50), offsets=((0, 1),), truncated=False)
    asked = stub
    if focus:  # on the first token: behind it, nothing matters
        offsets = tuple((n, n + 1) for n in range(9))
        asked = dataclasses.replace(stub, input_ids=(1, 50, *range(8)), offsets=offsets, focus=(0,))
    norms = {}
    (first, _), *others = maker.make_batch([asked, *samples()], norms=norms)
    assert_close(first, slow(maker.loaded, stub))
    assert_close(first, maker.make(asked)[0])
    for sample, (vector, _) in zip(samples(), others, strict=True):
        assert_close(vector, slow(maker.loaded, sample))
    assert set(norms) == {"stub", *(sample.sample_id for sample in samples())}


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), lambda: adapted(tiny_model("llama"), "dora")])
def test_without_any_rule_no_batch_is_run_and_layers_are_computed_twice_where_memory_is_short(make, monkeypatch):
    maker = maker_of(trainable(make()))
    maker._gradients.give_up_all("asked for")
    monkeypatch.setattr(BatchedGradients, "stream", lambda *_: pytest.fail("a batch was run"))
    check_all(maker, samples())
    checkpointed, streamed = [], sample_module.checkpointed_layers

    def watched(model, *, hooks):
        checkpointed.append(model)
        return streamed(model, hooks=hooks)

    monkeypatch.setattr(sample_module, "checkpointed_layers", watched)
    assert maker.save_memory()
    check_all(maker, samples())
    assert len(checkpointed) >= len(samples())


def test_a_tensor_that_comes_late_is_given_up_and_the_batch_done_again(monkeypatch, caplog):
    maker, stream, failed = maker_of(loaded_from(tiny_model("llama"))), BatchedGradients.stream, []
    maker.make_batch(samples())

    def late(self, batch, receiver):
        losses = stream(self, batch, receiver)
        if len(failed) < 2:
            failed.append(len(failed))
            self.give_up(failed[-1], "asked for")
            raise LateGradientError("late")
        return losses

    monkeypatch.setattr(BatchedGradients, "stream", late)
    with caplog.at_level(logging.WARNING):
        check_all(maker, samples())
    assert set(maker._gradients.unruled) == {0, 1}
    assert caplog.text.count("the batch is done again") == 2


def test_an_adapter_that_learns_a_prompt_is_refused_and_said_to_be_one(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    save_model(tmp_path / "base", "llama")
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "prompt")
    spec = ModelSpec(model=str(tmp_path / "base"), adapter=str(tmp_path / "prompt"))
    with pytest.raises(ModelError, match=r"learns a prompt \(PROMPT_TUNING\).*such as LoRA"):
        load_model(spec, device="cpu")
