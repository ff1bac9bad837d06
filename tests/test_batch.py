"""Law 5 of the style: batches change nothing. Every sample's RapidGrad in a batch is plain autograd's on it alone."""

import dataclasses
import json
import logging
import weakref

import numpy as np
import pytest
import torch
from conftest import save_model, tiny_model
from reference import normalized, sample_gradient, sketched

import rapidin_vdb
from rapidin_vdb.errors import ModelError, SpecError
from rapidin_vdb.gradient import (
    ExactInfluence,
    RapidGradMaker,
    TokenRapidGradMaker,
    hooks,
    load_model,
    rapidgrad,
    repeated,
)
from rapidin_vdb.gradient import batch as batch_module
from rapidin_vdb.gradient import forward as forward_module
from rapidin_vdb.gradient.batch import BatchedGradients
from rapidin_vdb.gradient.contribution import Rows
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.precision import adapter_layers
from rapidin_vdb.gradient.probe import ends, to_compare
from rapidin_vdb.gradient.rules import summed_rows
from rapidin_vdb.records import Encoded, ModelSpec, SketchSpec
from rapidin_vdb.sketch import BucketMap, draw_shuffle

SKETCH = SketchSpec(width=128, shuffles=3, seed=7)


def samples(lengths=(5, 9, 30, 12, 9)) -> list[Encoded]:
    draw = np.random.default_rng(1)
    made = []
    for number, length in enumerate(lengths):
        response = int(draw.integers(1, max(length - 1, 2)))
        # Few different tokens, so that embedding rows meet; and the padding token among them.
        ids = (1, *draw.integers(0, 12, length - 1).tolist())
        made.append(
            Encoded(
                sample_id=f"s{number}",
                input_ids=ids,
                offsets=tuple((n, n + 1) for n in range(response)),
                truncated=False,
            )
        )
    return made


def slow(loaded, sample, normalize="layer") -> np.ndarray:
    grads = sample_gradient(loaded.model, loaded.theta, list(sample.input_ids), sample.response_tokens)
    flat = np.concatenate([grad.ravel() for grad in (normalized(grads) if normalize == "layer" else grads)])
    made = BucketMap(SKETCH, len(flat))
    steps, negative = draw_shuffle(SKETCH, made.length), made.negative(0, made.length).numpy()
    return sketched(flat, length=made.length, steps=steps, negative=negative, width=SKETCH.width)


def test_the_sample_that_is_compared_is_padded_and_no_stub():
    """Behind one token, gradients of queries and keys are rounding alone."""
    assert to_compare(samples((2, 30, 9, 8, 12))) == 3
    assert to_compare(samples((2, 5, 3))) == 1


def test_samples_too_short_to_tell_much_do_not_end_the_checks(models, monkeypatch):
    """Batches are sorted by length: the first may be of two tokens each, and of one length as all others."""
    checked = []
    monkeypatch.setattr(rapidgrad, "check", lambda maker, batch: checked.append(len(batch[0].input_ids)) or True)
    loaded = load_model(ModelSpec(model=str(models["llama"]), parameters="all"), device="cpu")
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    for length in (4, 12, 12, 30):
        maker.make_batch(samples((length, length)))
    assert checked == [4, 12]
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    checked.clear()
    for _ in range(6):
        maker.make_batch(samples((4, 4)))
    assert checked == [4] * 4, "where there are none but such, there is an end to it"


def test_angles_of_long_samples_are_not_those_of_short_ones(tmp_path, caplog):
    """Beyond a limit, longrope takes other factors, of a whole batch."""
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    config["max_position_embeddings"] = 64
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * half, "long_factor": [8.0] * half,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelSpec(model=str(folder), parameters="all"), device="cpu")
    assert loaded.rotary_limit == 16
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    batch = samples((12, 16, 17, 30))
    together = [vector for vector, _ in maker.make_batch(batch)]
    for sample, vector in zip(batch, together, strict=True):
        np.testing.assert_allclose(vector, maker.make(sample)[0], atol=1e-5)
    influence, tokens = ExactInfluence(maker), TokenRapidGradMaker(maker, width=32)
    direction, norms = influence.direction(batch[0]), {}
    maker.make_batch(batch, norms=norms)
    exact = influence.exact(direction, batch)
    scores, vectors = influence.token_scores(direction, batch, exact), tokens.make(batch, norms)
    for place, sample in enumerate(batch):
        alone = influence.token_scores(direction, [sample], influence.exact(direction, [sample]))[0]
        np.testing.assert_allclose(scores[place], alone, atol=1e-4 * np.abs(alone).max())
        alone = tokens.make([sample], norms)[sample.sample_id]
        np.testing.assert_allclose(vectors[sample.sample_id], alone, atol=2e-3 * np.abs(alone).max())
    assert not caplog.text, "nothing is given up"
    assert [rapidgrad.apart(batch, limit) for limit in (16, None)] == [[[0, 1], [2, 3]], [[0, 1, 2, 3]]]
    made = rapidin_vdb.init(tmp_path / "db", model=str(folder), width=64, parameters="all", shuffles=11)
    assert "beyond 16 tokens, this model turns positions by the length" in caplog.text
    assert "--shuffles 11 leaves coordinates beside their neighbours" in caplog.text
    caplog.clear()
    rapidin_vdb.init(tmp_path / "short", model=str(folder), width=64, parameters="all", max_tokens=16, shuffles=12)
    assert made.fingerprint.max_tokens == 512 and not caplog.text
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match="--max-tokens is 65, but beyond 64 tokens this model turns .*; give 64"):
        rapidin_vdb.init(tmp_path / "dynamic", model=str(folder), width=64, parameters="all", max_tokens=65)


def test_where_memory_is_short_the_ends_of_samples_are_compared():
    short, middle, long = samples((5, 100, 200))
    long = dataclasses.replace(long, offsets=tuple((n, n + 1) for n in range(3)), focus=(1,))
    middle = dataclasses.replace(middle, offsets=tuple((n, n + 1) for n in range(99)))
    cut = ends([short, middle, long])
    assert [len(sample.input_ids) for sample in cut] == [5, 32, 64], "padding too is as it is in the batch"
    assert cut[0] == short and cut[2].input_ids == long.input_ids[-64:] and cut[2].offsets == long.offsets
    assert cut[1].response_tokens == 31 and cut[1].loss_places[0] == 1, "a token before the first that carries loss"
    assert ends([short]) == [short]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_stub_among_others_gives_up_no_rule(architecture, models, adapters):
    spec = ModelSpec(model=str(models[architecture]), adapter=str(adapters[architecture]))
    maker = RapidGradMaker(load_model(spec, device="cpu"), spec=SKETCH, normalize="layer")
    maker.make_batch([samples((2,))[0], *samples((40, 21))])
    assert not maker._gradients.unruled


def assert_close(vector, expected):
    assert np.linalg.norm(vector - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "full", "nf4", "all"])
def test_a_batch_is_its_samples_one_by_one(kind, architecture, normalize, models, adapters):
    adapter = None if kind == "full" else str(adapters[architecture])
    spec = ModelSpec(
        model=str(models[architecture]),
        adapter=adapter,
        quantization="nf4" if kind == "nf4" else "none",
        parameters="all" if kind == "all" else "trainable",
    )
    loaded = load_model(spec, device="cpu")
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize=normalize)
    batch = samples()
    together = maker.make_batch(batch)
    for sample, (vector, _) in zip(batch, together, strict=True):
        assert_close(vector, slow(loaded, sample, normalize))
        assert_close(vector, maker.make(sample)[0])
    assert maker._gradients.unruled == {}, "all of it by batched rules, nothing by falling back"
    assert np.linalg.norm(together[0][0] - together[1][0]) > 0.1 * np.linalg.norm(together[0][0]), "samples differ"


def loaded_from(model, dtype="float32") -> LoadedModel:
    return LoadedModel(
        spec=ModelSpec(model="toy"), model=model.eval(), tokenizer=None, theta=dict(model.named_parameters()), device="cpu", dtype=dtype
    )  # fmt: skip


def small_opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=259, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0,
        )
    )  # fmt: skip


def test_an_embedding_that_is_given_no_ids_falls_back(caplog):
    """OPT makes the numbers of its positions from a mask, inside of the module."""
    loaded = loaded_from(small_opt())
    # Without normalisation: the gradient of a key's bias is zero but for rounding, which that would make as long as others.
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="none")
    batch = samples()
    for sample, (vector, _) in zip(batch, maker.make_batch(batch), strict=True):
        assert_close(vector, slow(loaded, sample, "none"))
    (record,) = caplog.records  # of keys' biases nothing: their noise is not taken for a wrong rule
    assert "embed_positions" in record.getMessage()


def mixture_of_experts(kind: str):
    from transformers import (
        GptOssConfig,
        GptOssForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(3)
    shared = {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=5, **shared))
    if kind == "gpt_oss":  # weights turned, with biases
        model = GptOssForCausalLM(GptOssConfig(num_local_experts=5, head_dim=4, sliding_window=6, **shared))
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks", "proj")):
                torch.nn.init.normal_(parameter, std=0.2)  # as they begin, biases are zero
        return model
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=5, moe_intermediate_size=12, head_dim=4, norm_topk_prob=True, **shared)
    )


@pytest.mark.parametrize(("experts", "normalize"), [("eager", "none"), ("eager", "layer"), ("grouped_mm", "layer")])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_and_their_router_are_batched(kind, experts, normalize):
    model = mixture_of_experts(kind)
    model.set_experts_implementation(experts)
    router = "router" if kind == "gpt_oss" else "gate"
    for name, parameter in model.named_parameters():
        if f"{router}.weight" in name:
            torch.nn.init.normal_(parameter)  # so that tokens part
    loaded = loaded_from(model)
    names = list(loaded.theta)
    assert {f"model.layers.0.mlp.{router}.weight", "model.layers.1.mlp.experts.down_proj"} <= set(names)
    assert (kind == "gpt_oss") == ("model.layers.1.mlp.experts.down_proj_bias" in names)
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize=normalize)
    for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
        assert_close(vector, slow(loaded, sample, normalize))
        assert_close(vector, maker.make(sample)[0])
    # All of it is by batched rules, nothing by falling back.
    assert not maker._gradients.unruled


class _Scale(torch.nn.Module):
    """A parameter of a module that no rule knows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.factor = torch.nn.Parameter(torch.full((16,), 1.3))

    def forward(self, hidden):
        return self.inner(hidden) * self.factor


def test_a_parameter_without_a_rule_falls_back_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(repeated, "_LARGEST", 15)  # too large for its module to be repeated
    model = tiny_model("llama")
    model.model.layers[0].mlp = _Scale(model.model.layers[0].mlp)
    loaded = loaded_from(model)
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    for _ in range(2):
        for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
            assert_close(vector, slow(loaded, sample))
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "model.layers.0.mlp.factor: gradients one sample at a time, which is slower (_Scale has no rule for factor)"
    ]


class _Doubled(torch.nn.Linear):
    """Looks like a linear layer, and is not one."""

    def forward(self, hidden):
        return super().forward(hidden) + hidden.sum(-1, keepdim=True) * self.weight.sum()


class _Unused(torch.nn.Linear):
    """A layer that its rule is told nothing of: what multiplies is not what is called."""

    def __call__(self, hidden):
        return hidden @ self.weight.T


@pytest.mark.parametrize("place", ["behind", "nowhere"])
def test_a_wrong_rule_of_a_small_gradient_is_found_out(place):
    """Not normalised, a tensor may have hardly a part in the sample that is compared, and a large one in others."""
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    wrong = _Doubled(16, 16, bias=False) if place == "behind" else _Unused(16, 16, bias=False)
    wrong.weight = attention.q_proj.weight
    attention.q_proj = wrong
    with torch.no_grad():
        attention.k_proj.weight.mul_(1e-4)
    loaded = loaded_from(model)
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="none")
    maker.make_batch(samples())
    assert [list(loaded.theta)[number] for number in maker._gradients.unruled] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]
    with torch.no_grad():
        attention.k_proj.weight.mul_(1e4)
    for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
        assert_close(vector, slow(loaded, sample, "none"))


def test_a_rule_that_is_wrong_is_found_out_and_replaced(caplog):
    model = tiny_model("llama")
    wrong = _Doubled(16, 16, bias=False)
    wrong.weight = model.model.layers[1].self_attn.q_proj.weight
    model.model.layers[1].self_attn.q_proj = wrong
    loaded = loaded_from(model)
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
        assert_close(vector, slow(loaded, sample))
    assert "model.layers.1.self_attn.q_proj.weight: gradients one sample at a time" in caplog.text
    assert len(maker._gradients.unruled) == 1


def test_samples_that_see_one_another_are_done_one_by_one(caplog):
    """A model that mixes the samples of a batch cannot be batched, and must not be believed."""
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda module, read, wrote: wrote + wrote.mean(0, keepdim=True))
    loaded = loaded_from(model)
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    for sample, (vector, loss) in zip(samples(), maker.make_batch(samples()), strict=True):
        assert_close(vector, slow(loaded, sample))
        assert loss == pytest.approx(maker.make(sample)[1])
    assert len(maker._gradients.unruled) == len(loaded.theta)


def test_one_bad_sample_does_not_spoil_its_neighbours(models):
    loaded = load_model(ModelSpec(model=str(models["llama"])), device="cpu")
    with torch.no_grad():
        loaded.theta["model.embed_tokens.weight"][200] = float("nan")
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    batch = samples()
    bad = Encoded(sample_id="bad", input_ids=(1, 200, 5, 6), offsets=((0, 1),), truncated=False)
    results = maker.make_batch([*batch[:2], bad, *batch[2:]])
    assert str(results.pop(2)).startswith("sample bad: the loss is nan; ")
    for sample, result in zip(batch, results, strict=True):
        assert_close(result[0], maker.make(sample)[0])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpointing_changes_nothing(kind, architecture, models, adapters):
    adapter = None if kind == "full" else str(adapters[architecture])
    loaded = load_model(ModelSpec(model=str(models[architecture]), adapter=adapter), device="cpu")
    maker, passes = RapidGradMaker(loaded, spec=SKETCH, normalize="layer"), []
    layer = next(m for m in loaded.model.modules() if type(m).__name__ in ("LlamaMLP", "Qwen2MLP", "GPT2MLP"))
    layer.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    plain = maker.make_batch(samples())
    passes.clear()
    assert maker.save_memory() and not maker.save_memory()
    for (vector, loss), (expected, before) in zip(maker.make_batch(samples()), plain, strict=True):
        assert_close(vector, expected)
        assert loss == pytest.approx(before)
    # A sample alone and the batch, to compare them once more as a whole and tensor by tensor, and the batch.
    assert passes == [*[True, False, True] * 2, False, True], "once without keeping anything, once for its backward"
    assert maker._gradients.unruled == {}
    assert not any("forward" in vars(module) for module in loaded.model.modules())


class _Beside(torch.nn.Module):
    """A layer that is also given what the embedding wrote, by name, in a list, or by no argument at all."""

    def __init__(self, layer, way, seen):
        super().__init__()
        self.layer, self.way, self.seen = layer, way, seen

    def forward(self, hidden, **options):
        beside = {"name": options.pop("beside", None), "list": options.pop("several", [None])[0], "none": self.seen}
        found = beside[self.way]
        return self.layer(hidden + (found[-1] if self.way == "none" else found), **options)


def beside(way):
    """A model whose layers are given the embeddings each."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Layer(_Beside, GradientCheckpointingLayer):
        pass

    model, seen = tiny_model("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda module, read, wrote: seen.append(wrote))

    def give(module, given, options):
        return given, options | {"name": {"beside": seen[-1]}, "list": {"several": [seen[-1]]}, "none": {}}[way]

    for number in range(2):
        layer = Layer(model.model.layers[number], way, seen)
        layer.register_forward_pre_hook(give, with_kwargs=True)
        model.model.layers[number] = layer
    return model


def shared(what):
    """A model whose layers share their MLP, or are one and the same."""
    model = tiny_model("llama")
    if what == "mlp":
        model.model.layers[1].mlp = model.model.layers[0].mlp
    else:
        model.model.layers[1] = model.model.layers[0]
        model.config.use_cache = False  # which would take both for one layer's
    return model


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize(
    "make",
    [lambda: shared("mlp"), lambda: shared("layer"), lambda: beside("name"), lambda: beside("list")],
    ids=["shared MLP", "shared layer", "beside by name", "beside in a list"],
)
def test_checkpointing_changes_nothing_where_layers_share(make, normalize):
    """Computed again layer by layer, a shared module must not pass its part in one layer for the whole."""
    loaded = loaded_from(make())
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize=normalize)
    for _ in range(2):
        for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
            assert_close(vector, slow(loaded, sample, normalize))
        maker.save_memory()
    assert maker._gradients.unruled == {}


def test_what_checkpointing_gets_wrong_is_found_out(caplog):
    """What a layer takes from elsewhere than its arguments gets its gradient layer by layer."""
    loaded = loaded_from(beside("none"))
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    maker.make_batch(samples())
    maker.save_memory()
    for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
        assert_close(vector, slow(loaded, sample))
    assert list(maker._gradients.unruled) == [list(loaded.theta).index("model.embed_tokens.weight")]
    assert "model.embed_tokens.weight: gradients one sample at a time" in caplog.text
    maker._gradients.unruled.clear()
    with pytest.raises(ModelError, match="more of the gradient of model.embed_tokens.weight came after"):
        maker.stream(samples(), maker.sketcher(len(samples())))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16_is_batched_too(kind, models, adapters):
    adapter = None if kind == "full" else str(adapters["llama"])
    spec = ModelSpec(model=str(models["llama"]), adapter=adapter, dtype="bfloat16")
    maker = RapidGradMaker(load_model(spec, device="cpu"), spec=SKETCH, normalize="layer")
    exact = RapidGradMaker(
        load_model(ModelSpec(model=spec.model, adapter=spec.adapter), device="cpu"), spec=SKETCH, normalize="layer"
    )
    for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
        expected = exact.make(sample)[0]
        length, wanted = np.linalg.norm(vector), np.linalg.norm(expected)
        assert vector @ expected > 0.98 * length * wanted
        assert length == pytest.approx(wanted, rel=0.03), "as long, too"
    assert maker._gradients.unruled == {}


def test_no_gradient_of_a_parameter_is_ever_kept(models):
    loaded = load_model(ModelSpec(model=str(models["llama"])), device="cpu")
    RapidGradMaker(loaded, spec=SKETCH, normalize="layer").make_batch(samples())
    assert all(tensor.grad is None and tensor.requires_grad for tensor in loaded.theta.values())
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_half_precision_is_the_same_rounded(models, adapters):
    spec = ModelSpec(model=str(models["llama"]), adapter=str(adapters["llama"]))
    maker = RapidGradMaker(load_model(spec, device="cpu"), spec=SKETCH, normalize="layer")
    stored = maker.make_batch(samples(), half=True)
    for (vector, loss), (half, same) in zip(maker.make_batch(samples()), stored, strict=True):
        assert half.dtype == np.float16 and half.tolist() == vector.astype(np.float16).tolist() != vector.tolist()
        assert loss == same


@pytest.mark.parametrize("tied", [False, True])
def test_a_tensor_done_in_parts_is_done_whole(tied, models, monkeypatch):
    """What is too large for the whole batch is formed for some samples at a time, down to one."""
    loaded = load_model(ModelSpec(model=str(models["qwen2" if tied else "llama"])), device="cpu")
    maker, parts = RapidGradMaker(loaded, spec=SKETCH, normalize="layer"), []
    whole = maker.make_batch(samples())
    original = maker.sketch.add_batch
    monkeypatch.setattr(
        maker.sketch,
        "add_batch",
        lambda out, *rest, **options: parts.append(len(out)) or original(out, *rest, **options),
    )
    for count in (1, 2):
        parts.clear()
        monkeypatch.setitem(hooks._CHUNK_BYTES, "cpu", count * 4 * 259 * 16)
        for (vector, _), (expected, _) in zip(maker.make_batch(samples()), whole, strict=True):
            assert_close(vector, expected)
        assert parts.count(count) >= 5 // count, "the output layer, at least"


def test_a_gpu_takes_gradients_as_they_come(models):
    """In bfloat16 twice as many fit; sums of several calls, and a CPU's, are float32."""
    loaded = load_model(ModelSpec(model=str(models["llama"]), dtype="bfloat16"), device="cpu")
    number = list(loaded.theta).index("lm_head.weight")

    class Kinds:
        def dense(self, number, first, grads):
            kinds.setdefault(number, (grads.dtype, tuple(grads.shape)))

        def rows(self, number, sample, ids, grads):
            kinds.setdefault(number, (grads.dtype, tuple(grads.shape)))

    kinds, gradients = {}, batch_module.BatchedGradients(loaded)
    gradients.stream(samples(), Kinds())
    assert kinds[number] == (torch.bfloat16, (5, 259 * 16))
    run = hooks.Run(gradients, 5, Kinds())
    chunk = hooks._CHUNK_BYTES["cpu"] // (4 * 259 * 16)
    assert (run._chunk(number, 1), run._chunk(number, 2)) == (chunk, chunk)
    gradients.loaded = dataclasses.replace(loaded, device="cuda:0")
    fitting = hooks._CHUNK_BYTES["cuda"] // (259 * 16)
    assert (run._chunk(number, 1), run._chunk(number, 2)) == (fitting // 2, fitting // 4)


def test_rows_of_a_batch_are_each_samples_own_summed():
    draw = torch.Generator().manual_seed(0)
    ids, delta = torch.randint(-1, 4, (3, 9), generator=draw), torch.randn(3, 9, 5, generator=draw)
    ids[1] = -1  # a sample that touches nothing
    found = summed_rows(Rows(ids, delta.bfloat16()), 4)
    assert [rows.tolist() for rows, _ in found] == [sorted(set(row.tolist()) - {-1}) for row in ids]
    for sample, (rows, grads) in enumerate(found):
        for row, grad in zip(rows, grads, strict=True):
            torch.testing.assert_close(grad, delta.bfloat16().float()[sample, ids[sample] == row].sum(0))
    assert len(found[0][0]) > 2 and found[0][1].dtype == torch.float32


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes of every float32 matrix product how long its sums are, and whether TF32 is allowed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            left, right = args[-2:]
            if left.dtype == torch.float32:
                self.seen.append((right.shape[-2], torch.backends.cuda.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_is_computed_under_tf32_on_a_gpu_and_nothing_else_is(checkpointing, models, adapters, monkeypatch):
    """As on a GPU, where the switch has an effect; a CPU does not look at it."""
    spec = ModelSpec(model=str(models["llama"]), adapter=str(adapters["llama"]), dtype="bfloat16")
    loaded = load_model(spec, device="cpu")
    on_gpu = dataclasses.replace(loaded, device="cuda:0")
    assert adapter_layers(loaded) == [] == adapter_layers(dataclasses.replace(on_gpu, dtype="float32"))
    layers = adapter_layers(on_gpu)
    assert {id(layer.weight) for layer in layers} == {id(tensor) for tensor in loaded.theta.values()}
    # Another product in float32, of one term each, as of rotary positions.
    mlp = next(module for module in loaded.model.modules() if type(module).__name__ == "LlamaMLP")
    mlp.register_forward_hook(
        lambda _, read, wrote: wrote + (wrote.detach().float()[..., :1] @ torch.ones(1, 16)).bfloat16()
    )
    plain = RapidGradMaker(loaded, spec=SKETCH, normalize="layer").make_batch(samples())
    monkeypatch.setattr(batch_module, "adapter_layers", lambda loaded: layers)
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    if checkpointing:
        assert maker.save_memory()
    maker.make_batch(samples())  # and the self-check, by plain autograd
    before = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    with _Products() as products:
        made = maker.make_batch(samples())
    assert before == (torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision())
    assert before[0] != "tf32"
    assert {allowed for terms, allowed in products.seen if terms == 1} == {before[0]}
    assert {allowed for terms, allowed in products.seen if terms != 1} == {"tf32"}
    # Forward, backward and the gradient of each layer, but for the first layers' backward, which nobody needs.
    assert len([terms for terms, _ in products.seen if terms != 1]) >= (3 + checkpointing) * len(layers) - 4
    for (vector, _), (expected, _) in zip(made, plain, strict=True):
        np.testing.assert_allclose(vector, expected, atol=2e-3 * np.abs(expected).max())
    assert maker._gradients.unruled == {}
    assert not any("forward" in vars(module) for module in loaded.model.modules())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_all_logits_or_those_with_a_loss_make_the_same(architecture, models, monkeypatch):
    """Whether nearly all tokens carry a loss decides only what is copied."""
    loaded = load_model(ModelSpec(model=str(models[architecture]), parameters="all"), device="cpu")
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    wanted = [slow(loaded, sample) for sample in samples()]
    for most in (0.0, 2.0):
        monkeypatch.setattr(forward_module, "_MOST", most)
        for found, row in zip(maker.make_batch(samples()), wanted, strict=True):
            np.testing.assert_allclose(found[0], row, atol=2e-6 * np.linalg.norm(row))
    assert not maker._gradients.unruled


def test_backward_lets_go_of_the_inputs_that_it_has_used(models):
    """What a layer was given is needed until its output's gradient is there: not until all of backward is over."""
    loaded = load_model(ModelSpec(model=str(models["llama"]), parameters="all"), device="cpu")
    last = loaded.model.model.layers[1].mlp.down_proj
    given: list[weakref.ref] = []
    still: list[bool] = []
    first = loaded.model.model.layers[0].self_attn.q_proj
    handles = [
        last.register_forward_hook(lambda module, read, wrote: given.append(weakref.ref(read[0].untyped_storage()))),
        first.register_full_backward_hook(lambda module, into, out: still.append(given[-1]() is not None)),
    ]
    BatchedGradients(loaded).stream(samples(), Nobody())
    for handle in handles:
        handle.remove()
    assert still == [False]


class Nobody:
    """Takes gradients, and keeps none."""

    def dense(self, number, first, grads): ...

    def rows(self, number, sample, ids, grads): ...


def test_tokens_of_a_model_whose_embedding_is_tuned_sum_to_the_sample(models):
    """Rows of an embedding have the scale of their token too."""
    loaded = load_model(ModelSpec(model=str(models["llama"]), parameters="all"), device="cpu")
    maker, norms = RapidGradMaker(loaded, spec=SKETCH, normalize="layer"), {}
    batch = samples((12, 30, 7))
    made = maker.make_batch(batch, norms=norms)
    tokens = TokenRapidGradMaker(maker, width=SKETCH.width).make(batch, norms)
    for sample, (vector, _) in zip(batch, made, strict=True):
        total = tokens[sample.sample_id].astype(np.float64).sum(0)
        np.testing.assert_allclose(total, vector, atol=5e-3 * np.abs(vector).max())


def test_a_token_that_the_model_does_not_know_is_an_error_in_its_place(models):
    loaded = load_model(ModelSpec(model=str(models["llama"]), parameters="all"), device="cpu")
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize="layer")
    batch = samples((9, 12, 30, 5))
    known = loaded.known_tokens
    batch[1] = dataclasses.replace(batch[1], input_ids=(*batch[1].input_ids[:-1], known))
    batch[3] = dataclasses.replace(batch[3], input_ids=(*batch[3].input_ids[:-1], known - 1))
    first, unknown, third, last = maker.make_batch(batch)
    assert str(unknown) == f"sample s1: token id {known}, but the model knows only {known} tokens"
    for sample, (vector, _) in ((batch[0], first), (batch[2], third), (batch[3], last)):
        np.testing.assert_allclose(vector, slow(loaded, sample), atol=1e-4 * np.abs(vector).max())
