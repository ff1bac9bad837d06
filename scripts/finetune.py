"""Fine-tune a model on instruction records: LoRA, QLoRA (--quantization nf4), or all of its parameters (--full).

scripts/finetune FILE... --model FOLDER --dir adapter [--rank 512] [--epochs 5] [--batch 128]

Defaults are those of the paper's fine-tuning where it names them: LoRA of rank 512 on q, k, v and o, AdamW, a learning
rate of 5e-5, a cosine after a warm-up, 128 samples a step, 5 epochs, 512 tokens. Interrupted, it goes on from its last
state when run again.
"""

import argparse
import json
import time
from pathlib import Path

from rapidin_vdb.corpus import encode, load_template, read_corpus
from rapidin_vdb.errors import CorpusError, RapidInError
from rapidin_vdb.gradient import LoadedModel, load_model
from rapidin_vdb.gradient.training import linear_layers, save, with_lora
from rapidin_vdb.gradient.tuning import Tuning, tune
from rapidin_vdb.gradient.tuning_state import finished
from rapidin_vdb.records import Encoded, ModelSpec


def checked_modules(model, text: str) -> list[str]:
    """Return the modules that a list names, each of which the model has; PEFT passes over one that it has not."""
    modules = [name.strip() for name in text.split(",") if name.strip()]
    there = [f".{name}" for name, _ in model.named_modules()]
    unknown = [name for name in modules if not any(found.endswith(f".{name}") for found in there)]
    if unknown or not modules:
        what = f"names {', '.join(unknown)}, which the model does not have" if unknown else "names nothing"
        raise SystemExit(f"--modules {what}; its linear layers are: {','.join(linear_layers(model))}")
    return modules


def encoded_samples(files: list[Path], loaded: LoadedModel, *, template: str, max_tokens: int) -> list[Encoded]:
    """Return the tokens of all records that leave some to learn from; say which do not."""
    text = load_template(template, tokenizer=loaded.tokenizer)
    samples = []
    for sample in read_corpus(files):
        if isinstance(sample, CorpusError):
            raise SystemExit(f"{sample}; mend the record, or leave it out")
        samples.append(sample)
    if not samples:
        raise SystemExit(f"there are no records in {', '.join(map(str, files))}; wanted one or more")
    encoded, left_out = [], []
    for result in encode(samples, tokenizer=loaded.tokenizer, template=text, max_tokens=max_tokens):
        if isinstance(result, CorpusError):
            print(f"left out: {result}")
            left_out.append(result)
        else:
            encoded.append(result)
    if not encoded:
        raise SystemExit(f"all {len(samples)} records are left out, the first for this: {left_out[0]}")
    return encoded


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dir", type=Path, required=True, help="where the adapter, or the model, goes")
    parser.add_argument("--full", action="store_true", help="all parameters instead of an adapter")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights: auto is the model's own, but with --full float32, for whatever is smaller than the last "
        "digit of a weight in 16 bits would not be learnt",
    )  # fmt: skip
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--alpha", type=int, help="[default: twice the rank]")
    parser.add_argument("--modules", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--learning-rate", type=float, default=Tuning.learning_rate, help="a small model takes 20 times that"
    )
    parser.add_argument("--warm-up", type=float, default=Tuning.warm_up, help="share of the steps")
    parser.add_argument(
        "--micro-tokens", type=int, help="at once through the model [default: 8192 on a GPU, 1024 on a CPU]"
    )
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16, with the weights as they are")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.full and options.quantization != "none":
        raise SystemExit("--full: quantised weights have no gradient; leave out --quantization")
    for name in ("max_tokens", "rank", "alpha"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {value}; wanted 1 or more")
    tuning = Tuning(
        epochs=options.epochs, batch=options.batch, learning_rate=options.learning_rate, warm_up=options.warm_up,
        micro_tokens=options.micro_tokens, seed=options.seed, bfloat16=options.bfloat16,
    )  # fmt: skip
    if options.dir.exists() and not options.dir.is_dir():
        raise SystemExit(f"--dir {options.dir} is a file; wanted a folder, or a name for one")
    state = options.dir / "state"
    if any((options.dir / name).exists() for name in ("config.json", "adapter_config.json")):
        finished(state)  # as after an end between the two
        raise SystemExit(f"{options.dir} is there already; give another --dir, or remove it")
    started = time.monotonic()
    loaded = load_model(
        ModelSpec(
            model=options.model, quantization=options.quantization,
            dtype="float32" if options.full and options.dtype == "auto" else options.dtype,
            # Of a quantised model nothing is trained but the adapter; what is chosen here is not used, but has to be
            # something that is not quantised.
            parameters="all" if options.quantization == "none" else "norm|ln_|embed_tokens",
        ),
        device=options.device,
    )  # fmt: skip
    model = loaded.model
    modules = [] if options.full else checked_modules(model, options.modules)
    encoded = encoded_samples(options.files, loaded, template=options.template, max_tokens=options.max_tokens)
    if not options.full:
        model = with_lora(model, rank=options.rank, alpha=options.alpha, modules=modules, seed=options.seed)

    def say(stage: str, step: int, total: int) -> None:
        if step % 10 == 0 or step == total:
            print(f"{step} of {total}, {time.monotonic() - started:.0f} s", flush=True)

    losses = tune(model, encoded, tuning, state=state, progress=say)
    save(model, loaded.tokenizer, options.dir)
    finished(state)
    tail = losses[-max(len(losses) // 20, 1) :]
    print(json.dumps({"samples": len(encoded), "steps": len(losses), "loss": sum(tail) / len(tail)}))


if __name__ == "__main__":
    try:
        main()
    except RapidInError as error:
        raise SystemExit(str(error)) from error
