"""Batched gradients of LoRA of experts, whose tensors no module multiplies by, against plain autograd."""

import dataclasses
import json

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import save_file
from test_batch import SKETCH, assert_close, loaded_from, mixture_of_experts, samples, slow

from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient import RapidGradMaker, load_model
from rapidin_vdb.gradient.adapted_experts import Experts, is_experts
from rapidin_vdb.gradient.contribution import NoRuleError
from rapidin_vdb.gradient.influence import ExactInfluence
from rapidin_vdb.records import ModelSpec

BOTH = ("gate_up_proj", "down_proj")


def adapted(kind: str, tensors, names=(), **options):
    from peft import LoraConfig, get_peft_model

    model = mixture_of_experts(kind)
    model.set_experts_implementation("eager")
    names = [*names, *(f"mlp.experts.{tensor}" for tensor in tensors)]
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj"], target_parameters=names, **options)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "gate.weight" in name or "router.weight" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))  # B begins as zeros, which hide mistakes; and tokens part
    return loaded_from(model)


def of(loaded, *parts):
    """The model with those tensors as theta whose names have one of these parts."""
    theta = {name: tensor for name, tensor in loaded.theta.items() if any(part in name for part in parts)}
    loaded.model.requires_grad_(False)
    for tensor in theta.values():
        tensor.requires_grad_(True)
    return dataclasses.replace(loaded, theta=theta)


def compare(loaded, normalize="layer") -> RapidGradMaker:
    maker = RapidGradMaker(loaded, spec=SKETCH, normalize=normalize)
    for sample, (vector, _) in zip(samples(), maker.make_batch(samples()), strict=True):
        assert_close(vector, slow(loaded, sample, normalize))
    return maker


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize("tensors", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_adapters_of_experts_are_batched(kind, tensors, normalize):
    loaded = of(adapted(kind, tensors), "lora_")
    assert sum("experts" in name for name in loaded.theta) == 2 * 2 * len(tensors)
    assert compare(loaded, normalize)._gradients.unruled == {}


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_so_are_the_tensors_that_they_adapt(kind):
    """An expert's gradients depend on the adapters of its other tensors, which are not in theta here."""
    loaded = of(adapted(kind, BOTH, use_rslora=True), "experts.base_layer.base_layer", "router", "mlp.gate")
    assert any(name.endswith("gate_up_proj") for name in loaded.theta)
    assert compare(loaded)._gradients.unruled == {}


def test_adapters_that_are_not_added_have_no_rule():
    model = adapted("mixtral", BOTH).model
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert Experts(experts).factors("down_proj", 4).a.shape == (3, 24)
    model.disable_adapter_layers()
    with pytest.raises(NoRuleError, match="not exactly one"):
        Experts(experts)


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_adapters_of_routers_are_batched(kind, normalize):
    """PEFT's `all-linear` takes them too."""
    router = "router" if kind == "gpt_oss" else "gate"
    loaded = of(adapted(kind, (), names=[f"mlp.{router}.weight"]), "lora_", f"{router}.base_layer")
    assert sum(f".{router}.lora_" in name for name in loaded.theta) == 2 * 2
    assert (kind == "gpt_oss") == any(name.endswith("router.base_layer.bias") for name in loaded.theta)
    assert compare(loaded, normalize)._gradients.unruled == {}


def test_a_router_whose_adapter_is_left_out_has_no_rule():
    loaded = of(adapted("mixtral", (), names=["mlp.gate.weight"]), "gate.lora_", "o_proj")
    loaded.model.disable_adapter_layers()
    maker = compare(of(loaded, "gate.lora_", "o_proj"))  # for that asks them for no gradient
    assert "an adapter of a router that is not added, or not alone" in maker._gradients.unruled.values()


def test_an_adapter_that_is_not_active_has_no_rule():
    """Its rank may be another than that of the one that is."""
    from peft import LoraConfig

    loaded = adapted("mixtral", BOTH)
    names = [f"mlp.experts.{tensor}" for tensor in BOTH]
    loaded.model.add_adapter("other", LoraConfig(r=5, target_modules=["q_proj"], target_parameters=names))
    loaded = of(loaded_from(loaded.model), "experts.lora_", "experts.base_layer.lora_")
    maker = compare(loaded)
    given_up = [name for number, name in enumerate(loaded.theta) if number in maker._gradients.unruled]
    assert given_up == [name for name in loaded.theta if ".other." in name] != []
    assert set(maker._gradients.unruled.values()) == {"an adapter of experts that is not active"}


def test_more_choices_than_experts_are_no_experts():
    """LongCat's are chosen among more than there are: some pass a token on."""
    model = mixture_of_experts("mixtral")
    experts = model.model.layers[0].mlp.experts
    assert is_experts(experts)
    experts.gate_up_proj = torch.nn.Parameter(torch.cat([experts.gate_up_proj.detach()] * 2))
    assert not is_experts(experts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_scores_have_the_adapters_of_experts(dtype, caplog):
    """Forward mode would leave them out: no module is called that it could watch."""
    loaded = of(adapted("mixtral", BOTH[1:]), "lora_")
    loaded.model.to(getattr(torch, dtype))
    influence = ExactInfluence(RapidGradMaker(dataclasses.replace(loaded, dtype=dtype), spec=SKETCH, normalize="layer"))
    query, *others = samples()
    direction = influence.direction(query)
    influence.token_scores(direction, others, influence.exact(direction, others))
    assert "by double differentiation" in caplog.text and "did not sum" not in caplog.text


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_tokens_are_sent_as_they_were_chosen(kind):
    """Against a look at each expert by itself; some choices are of no expert here."""
    from rapidin_vdb.gradient.experts import _sent

    draw = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(9, generator=draw)[:3] for _ in range(4 * 5)]).unflatten(0, (4, 5)) - 1
    found = dict(_sent(chosen.to(kind), 6))
    flat = chosen.flatten(0, 1)
    for expert in range(6):
        places, choices = torch.where(flat == expert)
        sent = found.pop(expert)
        assert torch.equal(sent.places, places) and torch.equal(sent.choices, choices)
        assert torch.equal(sent.samples, places // 5)
        assert sent.counts == [int((chosen[sample] == expert).sum()) for sample in range(4)]
        assert sent.within.tolist() == [n for count in sent.counts for n in range(count)]
    assert found == {}
    (only,) = _sent(torch.full((2, 3, 1), 4), 6)
    assert only[0] == 4 and only[1].counts == [3, 3]
    assert list(_sent(torch.full((2, 3, 1), 7), 6)) == []


@pytest.mark.parametrize("filled", [0, 1_000])
@pytest.mark.parametrize("alone", [False, True])
def test_sums_over_tokens_are_the_same_filled_up_or_one_by_one(monkeypatch, filled, alone):
    from rapidin_vdb.gradient import experts

    monkeypatch.setattr(experts, "_FILLED", filled)
    draw = torch.Generator().manual_seed(4)
    chosen = torch.randint(0, 2, (5, 7, 1), generator=draw)
    chosen[3] = 1  # a sample without any token there
    sent = dict(experts._sent(chosen, 2))[0]
    left, right = (torch.randn(sum(sent.counts), columns, generator=draw) for columns in (3, 4))
    found = experts._summed(left, None if alone else right, sent)
    for sample in range(5):
        mine = sent.samples == sample
        wanted = left[mine].sum(0) if alone else left[mine].T @ right[mine]
        torch.testing.assert_close(found[sample], wanted)
    assert not found[3].any()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_adapter_of_each_expert_by_itself_is_placed(kind, tmp_path):
    """As PEFT saved it under transformers 4, where experts were modules; against its products added to the tensors."""
    model = mixture_of_experts(kind).eval()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    holder, names = ("block_sparse_moe", "w1 w3 w2") if kind == "mixtral" else ("mlp", "gate_proj up_proj down_proj")
    weights = {}
    with torch.no_grad():
        for layer, part in enumerate(model.model.layers):
            inner = part.mlp.experts.down_proj.shape[2]
            for expert in range(5):
                added = []
                for name, rows in zip(names.split(), (inner, inner, 16), strict=True):
                    a, b = torch.randn(2, 16 + inner - rows), torch.randn(rows, 2)
                    place = f"base_model.model.model.layers.{layer}.{holder}.experts.{expert}.{name}"
                    weights |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
                    added.append(3 / 2 * b @ a)
                part.mlp.experts.gate_up_proj[expert] += torch.cat(added[:2])
                part.mlp.experts.down_proj[expert] += added[2]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": names.split()}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, adapter / "adapter_model.safetensors")
    spec = ModelSpec(model=str(tmp_path / "model"), adapter=str(adapter))
    ids = torch.tensor([[1, 40, 41, 42, 77, 78, 2]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(spec, device="cpu").model(ids).logits, model(ids).logits)
    for lost in ("experts.1.", "lora_B"):  # of one layer; and of all
        kept = {name: tensor for name, tensor in weights.items() if lost not in name or "layers.1" in name}
        save_file(kept, adapter / "adapter_model.safetensors")
        with pytest.raises(ModelError, match="does not fit the model"):
            load_model(spec, device="cpu")
    save_file(weights | {name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ModelError, match=r"of its weights have no place there .*layers\.2"):
        load_model(spec, device="cpu")
