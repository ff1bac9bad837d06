"""Folders of models as trainers leave them behind: without a tokenizer, quantised, with an adapter beside the weights."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, save_model, tiny_model
from safetensors.torch import load_file, save_file

import rapidin_vdb
from rapidin_vdb.errors import ModelError, ModelNotFoundError, SpecError
from rapidin_vdb.gradient import RapidGradMaker, default_batch_tokens, load_model
from rapidin_vdb.records import Encoded, ModelSpec, SketchSpec

SAMPLE = Encoded(sample_id="s", input_ids=(1, 40, 41, 42, 77, 78, 2), offsets=((0, 1), (1, 2), (2, 2)), truncated=False)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_a_folder_without_a_tokenizer_gets_none_that_knows_no_word(tmp_path, models, architecture):
    folder = tmp_path / "tuned"
    shutil.copytree(models[architecture], folder, ignore=lambda _, names: [name for name in names if "token" in name])
    with pytest.raises(ModelError, match=r"comes without a tokenizer: .* Put the tokenizer's files"):
        load_model(ModelSpec(model=str(folder)), device="cpu")


def test_an_adapter_beside_the_weights_is_not_put_on_unasked(tmp_path, models, adapters):
    folder = shutil.copytree(models["llama"], tmp_path / "both")
    shutil.copytree(adapters["llama"], folder, dirs_exist_ok=True)
    for model in (folder, adapters["llama"]):
        with pytest.raises(ModelError, match=r"holds an adapter .* Give it as --adapter"):
            load_model(ModelSpec(model=str(model)), device="cpu")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, models):
    """A checkpoint that is stored in 4 bits, as they are shared."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = shutil.copytree(models["llama"], tmp_path_factory.mktemp("stored") / "nf4")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(models["llama"], quantization_config=how, device_map={"": "cpu"})
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def test_a_checkpoint_stored_in_four_bits_has_the_gradients_of_its_adapter(quantized, adapters):
    spec = ModelSpec(model=str(quantized), adapter=str(adapters["llama"]))
    loaded = load_model(spec, device="cpu")
    layers = [module for module in loaded.model.modules() if type(module).__module__.startswith("bitsandbytes")]
    assert layers and all(module.training for module in layers), "else they pack their weights for inference"
    rapidgrad, loss = RapidGradMaker(loaded, spec=SketchSpec(width=64, shuffles=5, seed=42), normalize="layer").make(
        SAMPLE
    )
    assert np.isfinite(rapidgrad).all() and np.abs(rapidgrad).max() > 0 and loss > 0


def test_of_weights_stored_in_four_bits_there_is_no_theta_but_by_name(quantized):
    with pytest.raises(SpecError, match=r"14 weights of the model .* are stored quantised and have no gradient"):
        load_model(ModelSpec(model=str(quantized)), device="cpu")
    assert len(load_model(ModelSpec(model=str(quantized), parameters="norm"), device="cpu").theta) == 5


def test_a_width_of_each_layer_its_own_counts_as_the_largest(monkeypatch):
    """As Gemma 3n's configuration has it."""
    monkeypatch.setattr("rapidin_vdb.gradient.memory.free_bytes", lambda device: 1 << 26)
    plain = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 1000}

    def tokens(inner):
        text = SimpleNamespace(**plain, intermediate_size=inner)
        return default_batch_tokens(SimpleNamespace(get_text_config=lambda: text), dtype="float32", device="cpu")

    assert tokens(128) > tokens(4096) == tokens([128, 4096]) > 0


def saved_adapter(model, folder, base, *, embeddings=False, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config).eval()
    config.base_model_name_or_path = base
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    return adapted


@pytest.mark.parametrize(
    ("names", "whole"),
    [("this", ["embed_tokens", "lm_head"]), ("this", None), ("larger", None), ("nobody/here", None)],
)
def test_embeddings_beside_an_adapter_are_put_on_whatever_base_it_names(tmp_path, models, names, whole):
    base = {"this": str(models["llama"]), "larger": str(tmp_path / "larger")}.get(names, names)
    if names == "larger":
        larger = tiny_model("llama")
        larger.resize_token_embeddings(300, mean_resizing=False)
        larger.save_pretrained(base)
    tuned = tiny_model("llama")
    with torch.no_grad():
        tuned.model.embed_tokens.weight.add_(0.1)
    wanted = saved_adapter(tuned, tmp_path / "a", base, embeddings=True, modules_to_save=whole)
    file, ids = tmp_path / "a" / "adapter_model.safetensors", torch.tensor([SAMPLE.input_ids])
    weights = load_file(file)
    assert len(weights) == 4 + (2 if whole is None else 6)
    spec = ModelSpec(model=str(models["llama"]), adapter=str(tmp_path / "a"))
    with torch.no_grad():
        assert torch.equal(load_model(spec, device="cpu").model(ids).logits, wanted(ids).logits)
    if whole is not None:
        # Another than the one that PEFT reads.
        save_file(weights | {name: 2 * weights[name] for name in weights if "modules_to_save" in name}, file)
        with pytest.raises(
            ModelError, match=r"2 of its weights have no place there .*lm_head\.modules_to_save\.weight"
        ):
            load_model(spec, device="cpu")


@pytest.mark.parametrize("options", [{"embeddings": True}, {"trainable_token_indices": {"embed_tokens": [4, 261]}}])
def test_an_adapter_of_a_resized_vocabulary_is_told_both_sizes(tmp_path, models, options):
    tuned = tiny_model("llama")
    tuned.resize_token_embeddings(262, mean_resizing=False)
    saved_adapter(tuned, tmp_path / "a", str(models["llama"]), **options)
    with pytest.raises(ModelError, match=r"of 262 tokens, and the model's has 259\..*resize_token_embeddings\(262\)"):
        load_model(ModelSpec(model=str(models["llama"]), adapter=str(tmp_path / "a")), device="cpu")


def test_an_adapter_that_cannot_be_put_on_as_it_was_trained_is_refused(tmp_path, models):
    """Its weights are taken from the model's anew at each load, at random or not at all."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    spec, ids = ModelSpec(model=str(models["llama"]), adapter=str(tmp_path)), torch.tensor([SAMPLE.input_ids])
    for how in ("pissa", "olora", "orthogonal", "pissa_niter_4", "corda", "lora_ga"):
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        config.init_lora_weights = how if how not in ("corda", "lora_ga") else True
        wanted = get_peft_model(AutoModelForCausalLM.from_pretrained(models["llama"]), config).eval()
        wanted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data += 0.3
        config.init_lora_weights = how
        wanted.save_pretrained(tmp_path, save_embedding_layers=False)
        if how in ("pissa", "olora", "orthogonal"):
            with torch.no_grad():
                torch.testing.assert_close(load_model(spec, device="cpu").model(ids).logits, wanted(ids).logits)
        else:
            with pytest.raises(ModelError, match=f"began as {how}: .*path_initial_model_for_weight_conversion=FOLDER"):
                load_model(spec, device="cpu")


def test_weights_that_the_model_does_not_use_are_told(tmp_path, caplog):
    folder = save_model(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # which its class declares as not needed
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelSpec(model=str(folder)), device="cpu")
    assert "not used" not in caplog.text
    names = [f"model.layers.0.self_attn.{name}_proj.bias" for name in "kqvo"]
    weights |= {name: torch.ones(16) for name in names}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelSpec(model=str(folder)), device="cpu")
    first = ", ".join(sorted(names)[:3])
    assert f"{folder}: 4 weights of the checkpoint are not used by the model, such as {first}; is" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "16", "Field 'hidden_size' expected int, got str"),
        ("num_attention_heads", 3, "is not a multiple of the number of attention heads"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_told(tmp_path, field, value, message):
    folder = save_model(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"the configuration of the model .*{message}.* Mend its config.json"):
        load_model(ModelSpec(model=str(folder)), device="cpu")


@pytest.mark.parametrize("kind", ["T5", "Bert", "BertLMHead", "GPTNeoX"])
def test_what_is_no_causal_language_model_is_told_as_what_it_is(tmp_path, kind):
    import transformers

    if kind == "T5":
        config = transformers.T5Config(vocab_size=259, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        name = kind.removesuffix("LMHead")
        config = getattr(transformers, f"{name}Config")(
            vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24
        )
        suffix = {"Bert": "Model", "BertLMHead": "ForMaskedLM", "GPTNeoX": "ForCausalLM"}[kind]
        model = getattr(transformers, f"{name}{suffix}")(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    if kind == "GPTNeoX":  # is_decoder is false there, too
        assert load_model(ModelSpec(model=str(tmp_path)), device="cpu").theta
        return
    message = {
        "T5": r"is of type t5 \(T5ForConditionalGeneration\), and no such model is loaded here. Wanted a causal",
        "Bert": r"lacks weights of 6 parameters, .*: it is of type bert \(BertModel\), and was read as BertLMHeadModel",
        "BertLMHead": r"of type bert \(BertForMaskedLM\) and reads its tokens in both directions. Wanted a causal",
    }[kind]
    with pytest.raises(ModelError, match=message):
        load_model(ModelSpec(model=str(tmp_path)), device="cpu")


def test_who_has_moved_is_asked_for_and_who_is_refused_is_not(models, adapters, tmp_path):
    """A database may be older than what refuses its adapter: to say that it has moved would lead nowhere."""
    model, adapter = (
        shutil.copytree(kind["llama"], tmp_path / name) for kind, name in ((models, "m"), (adapters, "a"))
    )
    rapidin_vdb.init(tmp_path / "db", model=str(model), adapter=str(adapter), width=64)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ModelError, match="began as pissa_niter_4") as caught:
        rapidin_vdb.open(tmp_path / "db").load()
    assert "has moved" not in str(caught.value)
    for gone in (adapter / "adapter_model.safetensors", adapter, model / "model.safetensors", model):
        shutil.move(gone, tmp_path / f"elsewhere-{gone.name}")
        with pytest.raises(ModelNotFoundError, match="If it has moved since init, say where it is: --model FOLDER"):
            rapidin_vdb.open(tmp_path / "db").load()
