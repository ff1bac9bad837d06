"""Law 4: a RapidGrad is that of plain autograd on the sample alone, prompt masked, for every kind of model."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_adapter, save_model
from reference import normalized, sample_gradient, sketched
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from rapidin_vdb.errors import GradientError, ModelError, SpecError
from rapidin_vdb.gradient import RapidGradMaker, default_batch_tokens, fingerprint_of, load_model, weight_bytes
from rapidin_vdb.gradient.objections import judged
from rapidin_vdb.gradient.rapidgrad import normalized as scaled_to_one
from rapidin_vdb.records import Encoded, ModelSpec, SketchSpec
from rapidin_vdb.sketch import BucketMap, draw_shuffle
from rapidin_vdb.sketch.scatter_torch import inverse_norms

SKETCH = SketchSpec(width=64, shuffles=3, seed=7)
SAMPLE = Encoded(sample_id="s", input_ids=(1, 40, 41, 42, 77, 78, 2), offsets=((0, 1), (1, 2), (2, 2)), truncated=False)


def spec_of(kind, architecture, models, adapters, **options) -> ModelSpec:
    adapter = None if kind == "full" else str(adapters[architecture])
    quantization = "nf4" if kind == "nf4" else "none"
    return ModelSpec(model=str(models[architecture]), adapter=adapter, quantization=quantization, **options)


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "full", "nf4"])
def test_rapidgrad_equals_plain_autograd(kind, architecture, normalize, models, adapters):
    loaded = load_model(spec_of(kind, architecture, models, adapters), device="cpu")
    rapidgrad, loss = RapidGradMaker(loaded, spec=SKETCH, normalize=normalize).make(SAMPLE)

    grads = sample_gradient(loaded.model, loaded.theta, list(SAMPLE.input_ids), SAMPLE.response_tokens)
    flat = np.concatenate([grad.ravel() for grad in (normalized(grads) if normalize == "layer" else grads)])
    made = BucketMap(SKETCH, len(flat))
    steps, negative = draw_shuffle(SKETCH, made.length), made.negative(0, made.length).numpy()
    slow = sketched(flat, length=made.length, steps=steps, negative=negative, width=64)
    np.testing.assert_allclose(rapidgrad, slow, atol=2e-5 * np.abs(slow).max() + 1e-7)

    whole = sample_gradient(loaded.model, loaded.theta, list(SAMPLE.input_ids), len(SAMPLE.input_ids) - 1)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(grads, whole, strict=True)), "the mask matters"
    if kind == "full":
        assert sum(grad.size for grad in grads) == sum(p.numel() for p in loaded.model.parameters())
    else:
        assert all("lora_" in name for name in loaded.theta)
    assert loss == pytest.approx(float(np.log(259)), rel=0.2), "a fresh model is near the uniform distribution"


def test_a_model_in_nf4_is_another_than_in_full_precision(models, adapters):
    makers = [
        RapidGradMaker(
            load_model(spec_of(kind, "llama", models, adapters), device="cpu"), spec=SKETCH, normalize="layer"
        )
        for kind in ("lora", "nf4")
    ]
    first, second = (maker.make(SAMPLE)[0] for maker in makers)
    assert 1e-4 < np.abs(first - second).max() < 1


def test_a_gradient_that_is_exactly_zero_stays_zero(models, tmp_path):
    """A fresh LoRA: B is zero, so A has no gradient, and B has one."""
    from conftest import tiny_model
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "fresh")
    loaded = load_model(ModelSpec(model=str(models["llama"]), adapter=str(tmp_path / "fresh")), device="cpu")
    rapidgrad, _ = RapidGradMaker(loaded, spec=SKETCH, normalize="layer").make(SAMPLE)
    grads = normalized(sample_gradient(loaded.model, loaded.theta, list(SAMPLE.input_ids), 3))
    norms = {name: np.linalg.norm(grad) for name, grad in zip(loaded.theta, grads, strict=True)}
    assert {name: round(norm, 6) for name, norm in norms.items()} == {
        name: 0.0 if "lora_A" in name else 1.0 for name in norms
    }
    assert np.isfinite(rapidgrad).all() and rapidgrad.any()


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("trainable", lambda name: "lora_" in name),
        ("all", lambda name: True),
        (r"q_proj.*lora_B|norm", lambda name: ("q_proj" in name and "lora_B" in name) or "norm" in name),
    ],
)
def test_theta_is_chosen_by_name(parameters, expected, models, adapters):
    loaded = load_model(spec_of("lora", "llama", models, adapters, parameters=parameters), device="cpu")
    names = [name for name, _ in loaded.model.named_parameters()]
    assert list(loaded.theta) == [name for name in names if expected(name)]
    rapidgrad, _ = RapidGradMaker(loaded, spec=dataclasses.replace(SKETCH, width=32), normalize="layer").make(SAMPLE)
    assert rapidgrad.any()


def test_what_asks_for_no_gradient_is_left_as_it_was(models, adapters):
    loaded = load_model(spec_of("lora", "llama", models, adapters), device="cpu")
    before = {name: tensor.detach().clone() for name, tensor in loaded.model.named_parameters()}
    RapidGradMaker(loaded, spec=SKETCH, normalize="layer").make(SAMPLE)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.named_parameters())
    assert all(tensor.grad is None for tensor in loaded.model.parameters()), "no gradient is kept"
    assert not loaded.model.training


def test_quantised_weights_are_not_repacked(models, adapters):
    loaded = load_model(spec_of("nf4", "llama", models, adapters), device="cpu")
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    first = maker.make(SAMPLE)[0]
    assert first.tolist() == maker.make(SAMPLE)[0].tolist()
    dropouts = [module for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert not any(module.training for module in dropouts)


def test_gradients_that_cannot_be_stored_are_named(models, tmp_path):
    folder = save_model(tmp_path / "nan", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    maker = RapidGradMaker(load_model(ModelSpec(model=str(folder)), device="cpu"), spec=SKETCH, normalize="layer")
    with pytest.raises(GradientError, match="sample s: the loss is nan"):
        maker.make(SAMPLE)
    weights["model.norm.weight"] = torch.zeros_like(weights["model.norm.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec = ModelSpec(model=str(folder), parameters="q_proj")
    maker = RapidGradMaker(load_model(spec, device="cpu"), spec=SKETCH, normalize="layer")
    with pytest.raises(GradientError, match="sample s: the gradient is zero"):
        maker.make(SAMPLE)


@pytest.mark.parametrize(
    ("loss", "entries", "message"),
    [
        (float("nan"), [1, 1], "sample s: the loss is nan; look at the weights, or make the database with --dtype float32"),
        (float("inf"), [0, 0], "sample s: the loss is inf; look at the weights, or make the database with --dtype float32"),
        (1.5, [float("nan"), 1], "sample s: the gradient is not finite (loss 1.5); look at the weights, or make the database with --dtype float32"),
        (1.5, [1, -float("inf")], "sample s: the gradient is not finite (loss 1.5); look at the weights, or make the database with --dtype float32"),
        (1.5, [0, -0.0], "sample s: the gradient is zero (loss 1.5); where those of many samples are, make the database with other --parameters, or with --dtype float32"),
        (1.5, [1, -70000], "sample s: the RapidGrad reaches 7e+04, beyond half precision (65504); make the database with --normalize layer"),
        (1.5, [0, -1e-9], "sample s: the RapidGrad reaches only 1e-09 and vanishes in half precision; make the database with --normalize layer"),
    ],
)  # fmt: skip
def test_rapidgrads_are_looked_at_before_they_are_stored(loss, entries, message):
    """A bad one between two good ones, which pass whole."""
    vectors = torch.tensor([[1.0, 65519.0], entries, [2.0**-24, 0.0]])
    losses = torch.tensor([1.0, loss, 2.0])
    first, bad, last = judged(vectors, losses, ["a", "s", "b"], half=True)
    assert str(bad) == message
    assert (first[0].tolist(), first[1], last[0].tolist(), last[1]) == ([1, 65504], 1, [2.0**-24, 0], 2)
    whole = judged(vectors, losses, ["a", "s", "b"], half=False)
    assert isinstance(whole[1], GradientError) == ("half precision" not in message)
    assert whole[0][0].tolist() == [1, 65519]


def test_half_precision_is_rounded_as_numpy_rounds_it():
    draw = np.random.default_rng(0)
    vectors = (draw.standard_normal((3, 1 << 16)) * 10.0 ** draw.uniform(-9, 4, (3, 1 << 16))).astype(np.float32)
    # Halfway between two halves, and the last below the smallest.
    vectors[0, :4] = 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25
    found = judged(torch.from_numpy(vectors), torch.ones(3), list("abc"), half=True)
    assert all(np.array_equal(made[0].view(np.uint16), v.astype(np.float16).view(np.uint16)) for made, v in zip(found, vectors, strict=True))  # fmt: skip
    assert found[0][0].dtype == np.float16


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (lambda m, a, t: {"model": str(t / "nowhere")}, ModelError, "no model at .*nowhere: no such folder"),
        (lambda m, a, t: {"model": str(t)}, ModelError, "has no config.json"),
        (lambda m, a, t: {"model": "nobody/nothing"}, ModelError, "the model nobody/nothing cannot be loaded"),
        (lambda m, a, t: {"model": m["llama"], "adapter": str(t)}, ModelError, "has no adapter_config.json"),
        (lambda m, a, t: {"model": m["llama"], "adapter": "nobody/nothing"}, ModelError, "no adapter at nobody/nothing: neither a folder"),
        (lambda m, a, t: {"model": m["gpt2"], "adapter": a["llama"]}, ModelError, "does not fit the model .*Was it made for another model"),
        (lambda m, a, t: {"model": m["llama"], "parameters": "nosuch"}, SpecError, "matches none of the 21 parameters; names look like"),
        (lambda m, a, t: {"model": m["llama"], "parameters": "("}, SpecError, "is no regular expression"),
        (lambda m, a, t: {"model": m["llama"], "quantization": "nf4"}, SpecError, "nf4 weights have no gradient; give --adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded(spec, error, message, models, adapters, tmp_path):
    values = {name: str(value) for name, value in spec(models, adapters, tmp_path).items()}
    with pytest.raises(error, match=message):
        load_model(ModelSpec(**values), device="cpu")


@pytest.mark.parametrize("options", [{"hidden": 32}, {"layers": 3}])
def test_an_adapter_of_a_model_of_another_shape_is_refused(options, models, tmp_path):
    if "layers" in options:
        adapter = save_adapter(tmp_path / "adapter", "llama")
        weights = load_file(adapter / "adapter_model.safetensors")
        weights |= {
            name.replace("layers.0", "layers.2"): tensor.clone()
            for name, tensor in weights.items()
            if "layers.0" in name
        }
        save_file(weights, adapter / "adapter_model.safetensors")
    else:
        adapter = save_adapter(tmp_path / "adapter", "llama", **options)
    with pytest.raises(ModelError, match="does not fit the model"):
        load_model(ModelSpec(model=str(models["llama"]), adapter=str(adapter)), device="cpu")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    folder = save_model(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks weights of 1 parameters, such as model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(ModelSpec(model=str(folder)), device="cpu")


# The fingerprint


def fingerprint(model, adapter=None, **options):
    loaded = load_model(ModelSpec(model=str(model), adapter=adapter and str(adapter), **options), device="cpu")
    return fingerprint_of(
        loaded, template="text", template_text="", max_tokens=9, normalize="layer", sketch=SKETCH, epochs=1.0, learning_rate=1.0
    )  # fmt: skip


def test_a_moved_model_is_the_same_and_a_changed_one_is_not(models, adapters, tmp_path):
    here = fingerprint(models["llama"], adapters["llama"])
    shutil.copytree(models["llama"], tmp_path / "moved")
    shutil.copytree(adapters["llama"], tmp_path / "adapter")
    there = fingerprint(tmp_path / "moved", tmp_path / "adapter")
    assert dataclasses.replace(there, model=here.model, adapter=here.adapter) == here

    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    changed = fingerprint(tmp_path / "moved", tmp_path / "adapter", dtype="bfloat16")
    differing = {
        field.name
        for field in dataclasses.fields(here)
        if getattr(changed, field.name) != getattr(here, field.name) and field.name not in ("model", "adapter")
    }
    assert differing == {"model_hash", "adapter_hash", "dtype"}


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_gpu_gives_the_same_rapidgrad(architecture, models, adapters):
    spec = spec_of("lora", architecture, models, adapters)
    on_cpu, on_gpu = (
        RapidGradMaker(load_model(spec, device=device), spec=SKETCH, normalize="layer").make(SAMPLE)[0]
        for device in ("cpu", "cuda:0")
    )
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-3)


def test_a_large_tensor_is_scaled_to_norm_one_exactly():
    """Torch's own float32 norm of so many numbers errs by 1e-4."""
    grad = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert float(scaled_to_one(grad).double().norm()) == pytest.approx(1, abs=1e-6)
    assert float(1 / inverse_norms(grad.unsqueeze(0))) == pytest.approx(float(grad.double().norm()), rel=1e-6)


def test_a_gpu_gives_a_batch_most_of_its_free_memory_beside_what_gradients_take(monkeypatch):
    """Reckoned for Llama-2-7B: of 77 GiB, 5,098 tokens were seen to take 36 with the model (docs/gpu.md)."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)

    def tokens(free, device, **options):
        monkeypatch.setattr("rapidin_vdb.gradient.memory.free_bytes", lambda device: free << 30)
        return default_batch_tokens(config, dtype="bfloat16", device=device, **options)

    alone = tokens(77, "cuda:0")
    assert 4500 < alone < 5500
    assert 0.4 * alone < tokens(77, "cuda:0", workers=2) < 0.5 * alone
    assert 1.5 * tokens(30, "cpu") < tokens(30, "cuda:0")
    assert 1 <= tokens(1, "cuda:0") < 40 and tokens(0, "cuda:0") == 1
    assert tokens(10_000, "cuda:0") == 32768 and tokens(10_000, "cpu") == 4096
    # Models that are still to be loaded take theirs first.
    assert tokens(38, "cuda:0", workers=2) == tokens(38 + 2 * 13, "cuda:0", workers=2, weights=13 << 30)
    assert tokens(38, "cuda:0") == tokens(38 + 13, "cuda:0", weights=13 << 30) > tokens(38, "cuda:0", weights=13 << 30)
    assert tokens(10, "cuda:0", weights=13 << 30) == 1


@pytest.mark.parametrize(
    ("name", "dense", "sparse"),
    [
        ("mixtral", {"intermediate_size": 256}, {"num_experts_per_tok": 2}),
        ("qwen2_moe", {"intermediate_size": 128}, {"moe_intermediate_size": 64, "num_experts_per_tok": 4}),
        ("deepseek_v3", {"intermediate_size": 96}, {"moe_intermediate_size": 64, "num_experts_per_tok": 2}),
    ],
)
def test_a_batch_leaves_room_for_all_experts_a_token_goes_through(name, dense, sparse, monkeypatch):
    """A mixture is reckoned as a plain model that is as wide as its experts in use are together."""
    widths = {"mixtral": 2 * 256, "qwen2_moe": 4 * 64 + 256, "deepseek_v3": 2 * 64 + 64}
    monkeypatch.setattr("rapidin_vdb.gradient.memory.free_bytes", lambda device: 1 << 26)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 64}
    shared = {"qwen2_moe": {"shared_expert_intermediate_size": 256}, "deepseek_v3": {"n_shared_experts": 1}}
    mixture = AutoConfig.for_model(name, **sizes, **dense, **sparse, **shared.get(name, {}))
    plain = LlamaConfig(**sizes, intermediate_size=widths[name])
    found, wanted = (default_batch_tokens(each, dtype="float32", device="cpu") for each in (mixture, plain))
    assert found == wanted < 4096


def test_the_bytes_of_weights_are_known_before_they_are_loaded():
    """So that models that several workers are still to load are left room."""
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=100,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert weight_bytes(config, dtype="float32", quantization="none") == 4 * total
    assert weight_bytes(config, dtype="bfloat16", quantization="none") == 2 * total
    assert weight_bytes(config, dtype="float16", quantization="int8") == 2 * (total - linear) + linear
    assert weight_bytes(config, dtype="bfloat16", quantization="nf4") == 2 * (total - linear) + linear * 9 // 16


@pytest.mark.parametrize(
    ("stored", "wanted", "told"),
    [
        (None, {}, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, False),
        ({"quant_method": "mxfp4"}, {"dequantize": True}, False),
        ({"quant_method": "gptq", "bits": 4}, {}, True),
        (SimpleNamespace(quant_method=SimpleNamespace(value="awq")), {}, True),
    ],
)
def test_a_checkpoint_that_is_quantised_itself(stored, wanted, told, caplog):
    """Where its kernels may hand no gradient on, it is dequantised, or that is said."""
    from rapidin_vdb.gradient import model as module

    options = module._of_quantized("there", SimpleNamespace(quantization_config=stored))
    found = options.get("quantization_config")
    assert ({} if found is None else found.get_loading_attributes()) == wanted
    assert ("there is quantised (" in caplog.text) == told


def test_an_adapter_is_read_where_the_model_is(models, adapters, monkeypatch):
    """By PEFT's own choice it would be on the first GPU, whatever the model is on."""
    import peft

    asked, original = [], peft.PeftModel.from_pretrained

    def watched(*arguments, **options):
        asked.append(options["torch_device"])
        return original(*arguments, **options)

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", watched)
    load_model(spec_of("adapter", "llama", models, adapters), device="cpu")
    assert asked == ["cpu"]

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", full)
    with pytest.raises(ModelError, match="cpu has no memory for the adapter .*: CUDA out of memory"):
        load_model(spec_of("adapter", "llama", models, adapters), device="cpu")
