"""What `gpu.py` measures with: models of a given shape with random weights, and samples of Alpaca-like lengths."""

import gzip
import importlib.util
import json
import math
import os
import random
from pathlib import Path
from typing import Any

# "7b" is Llama 2 7B; with LoRA of rank 512 on q, k, v, o it has D = 536,870,912.
SHAPES = {
    "7b": {"hidden": 4096, "layers": 32, "heads": 32, "inner": 11008, "vocabulary": 32000, "rank": 512},
    "small": {"hidden": 64, "layers": 2, "heads": 2, "inner": 168, "vocabulary": 512, "rank": 8},
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MAX_TOKENS = 512
# No Llama tokenizer is at hand: English text comes to about four characters a token.
_CHARACTERS = 4
# Those of the alpaca template around the instruction.
_TEMPLATE_CHARACTERS = 140


def build(kind: str, *, shape: str, device: str) -> tuple[Any, dict[str, Any]]:
    """Return a LoadedModel with random weights made on its device, and what there is to say about it.

    `kind` is "lora" (NF4 base weights where bitsandbytes is installed, else plain ones) or "full". Computed in bfloat16
    on a GPU, in float32 on a CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rapidin_vdb.gradient import LoadedModel
    from rapidin_vdb.gradient.parameters import choose_parameters
    from rapidin_vdb.gradient.training import with_lora
    from rapidin_vdb.records import ModelSpec

    size, dtype = SHAPES[shape], torch.float32 if device == "cpu" else torch.bfloat16
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    nf4 = kind == "lora" and importlib.util.find_spec("bitsandbytes") is not None
    if nf4:
        _quantise(model, dtype, device)
    if kind == "lora":
        model = with_lora(model, rank=size["rank"], modules=MODULES, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero in a fresh adapter, and so would be half of the gradients
                torch.nn.init.normal_(parameter, std=0.02)
    model.eval()
    if nf4:
        from rapidin_vdb.gradient.model import _keep_differentiable

        _keep_differentiable(model)
    name = str(dtype).removeprefix("torch.")
    spec = ModelSpec(
        model=f"llama-{shape}-random",
        adapter="random" if kind == "lora" else None,
        quantization="nf4" if nf4 else "none",
        dtype=name,  # type: ignore[arg-type]
        parameters="trainable" if kind == "lora" else "all",
    )
    theta = choose_parameters(model, spec)
    loaded = LoadedModel(spec=spec, model=model, tokenizer=None, theta=theta, device=device, dtype=name)
    return loaded, {
        "kind": kind,
        "shape": shape,
        "nf4": nf4,
        "base_dtype": name,
        "theta_dtype": str(next(iter(theta.values())).dtype).removeprefix("torch."),
        "tensors": len(theta),
        "gradient_length": sum(tensor.numel() for tensor in theta.values()),
    }


def _quantise(model: Any, dtype: Any, device: str) -> None:
    """Put 4-bit layers in the place of a model's linear layers, as transformers does when it loads one."""
    import bitsandbytes
    import torch

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not torch.nn.Linear or name == "lm_head":
                continue
            with torch.device("meta"):
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False,
                    compute_dtype=dtype, compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
            weight = bitsandbytes.nn.Params4bit(
                child.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
            )
            layer.weight = weight.to(device)
            setattr(module, name, layer)
    model.is_quantized = model.is_loaded_in_4bit = True  # what PEFT looks at
    if device != "cpu":
        torch.cuda.empty_cache()


def lengths(count: int) -> tuple[list[tuple[int, int]], str]:
    """Return (prompt tokens, response tokens) of so many samples, and where they come from."""
    draw = random.Random(0)
    file = Path(os.environ.get("RAPIDIN_SHARED", "")) / "data" / "instruct" / "alpaca.jsonl.gz"
    if os.environ.get("RAPIDIN_SHARED") and file.is_file():
        known = []
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                asked = record["instruction"] + ("\n" + record["input"] if record.get("input") else "")
                known.append((len(asked), len(record["output"])))
        drawn = draw.choices(known, k=count)
        source = f"characters of {len(known)} Alpaca records, alpaca template, {_CHARACTERS} a token"
    else:
        # The means and spreads of the logarithms of Alpaca's prompt and response lengths.
        drawn = [
            (round(math.exp(draw.gauss(4.28, 0.50))), round(math.exp(draw.gauss(5.14, 1.28)))) for _ in range(count)
        ]
        source = "log-normal, like Alpaca's"
    found = []
    for asked, answered in drawn:
        prompt = 1 + math.ceil((_TEMPLATE_CHARACTERS + asked) / _CHARACTERS)  # and a token that begins the sequence
        response = math.ceil(answered / _CHARACTERS) + 1  # and one that ends it
        prompt = min(prompt, MAX_TOKENS - 1)
        found.append((prompt, min(response, MAX_TOKENS - prompt)))
    return found, source


def make_samples(count: int, *, vocabulary: int) -> tuple[list[tuple[Any, Any]], str]:
    """Return so many samples of random tokens and text, as an ingest has them, and where their lengths are from."""
    from rapidin_vdb.records import Encoded, Sample

    draw = random.Random(1)
    noise = draw.choices(range(3, vocabulary), k=1 << 20)
    letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=4 * MAX_TOKENS))
    sizes, source = lengths(count)
    pairs = []
    for number, (prompt, response) in enumerate(sizes):
        name, begin = f"s{number:06d}", draw.randrange(len(noise) - MAX_TOKENS)
        spans = tuple((place, place + _CHARACTERS) for place in range(0, response * _CHARACTERS, _CHARACTERS))
        pairs.append(
            (
                Sample(
                    sample_id=name, prompt=letters[: prompt * _CHARACTERS], response=letters[: response * _CHARACTERS],
                    split="train", source=None, content_hash=name,
                ),
                Encoded(
                    sample_id=name, input_ids=tuple(noise[begin : begin + prompt + response]), offsets=spans,
                    truncated=prompt + response == MAX_TOKENS,
                ),
            )
        )  # fmt: skip
    return pairs, source


def make_batches(pairs: list[tuple[Any, Any]], batch_tokens: int, width: int) -> list[list[tuple[Any, Any]]]:
    """Return the batches that an ingest forms: from windows of 1,024 samples, sorted by length."""
    from rapidin_vdb.batches import planned_batches

    windows = [pairs[first : first + 1024] for first in range(0, len(pairs), 1024)]
    todo = {sample.sample_id: sample.content_hash for sample, _ in pairs}
    return [batch for window in windows for batch in planned_batches(window, todo, batch_tokens, width=width)]


def padded_tokens(batch: list[tuple[Any, Any]]) -> int:
    """Return how many tokens a batch is computed with."""
    return len(batch) * max(len(encoded.input_ids) for _, encoded in batch)


def stratified(batches: list[list[tuple[Any, Any]]]) -> list[int]:
    """Return batches' numbers so ordered that any beginning is spread from the lightest to the heaviest."""
    order = sorted(range(len(batches)), key=lambda number: (len(batches[number]), padded_tokens(batches[number])))
    golden = (math.sqrt(5) - 1) / 2
    places = dict.fromkeys(int((0.5 + step * golden) % 1 * len(order)) for step in range(4 * len(order)))
    return [order[place] for place in places]
