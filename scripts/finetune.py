"""Fine-tune a model on instruction records: LoRA, QLoRA (--quantization nf4), or all of its parameters (--full).

scripts/finetune FILE... --model FOLDER --dir adapter [--rank 512] [--epochs 5] [--batch 128]

Defaults are those of the paper's fine-tuning where it names them: LoRA of rank 512 on q, k, v and o, AdamW, a cosine
after a warm-up, 128 samples a step, 5 epochs, 512 tokens. Interrupted, it goes on from its last state when run again.
"""

import argparse
import json
import time
from pathlib import Path

from rapidin_vdb.corpus import encode, load_template, read_corpus
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.gradient import load_model
from rapidin_vdb.gradient.training import save, with_lora
from rapidin_vdb.gradient.tuning import Tuning, tune
from rapidin_vdb.records import ModelSpec


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dir", type=Path, required=True, help="where the adapter, or the model, goes")
    parser.add_argument("--full", action="store_true", help="all parameters instead of an adapter")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--alpha", type=int, help="[default: twice the rank]")
    parser.add_argument("--modules", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--warm-up", type=float, default=0.03, help="share of the steps")
    parser.add_argument("--micro-tokens", type=int, default=8192, help="tokens that go through the model at once")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16, with the weights as they are")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.full and options.quantization != "none":
        raise SystemExit("--full: quantised weights have no gradient; leave out --quantization")
    done = options.dir / ("config.json" if options.full else "adapter_config.json")
    if done.exists():
        raise SystemExit(f"{options.dir} is there already")
    started = time.monotonic()
    loaded = load_model(
        ModelSpec(
            model=options.model, quantization=options.quantization, dtype=options.dtype,
            # Of a quantised model nothing is trained but the adapter; what is chosen here is not used.
            parameters="all" if options.quantization == "none" else "norm",
        ),
        device=options.device,
    )  # fmt: skip
    template = load_template(options.template, tokenizer=loaded.tokenizer)
    samples = []
    for sample in read_corpus(options.files):
        if isinstance(sample, CorpusError):
            raise sample
        samples.append(sample)
    encoded = []
    for result in encode(samples, tokenizer=loaded.tokenizer, template=template, max_tokens=options.max_tokens):
        if isinstance(result, CorpusError):
            print(f"left out: {result}")
        else:
            encoded.append(result)
    model = loaded.model
    if not options.full:
        model = with_lora(
            model, rank=options.rank, alpha=options.alpha, modules=options.modules.split(","), seed=options.seed
        )
    tuning = Tuning(
        epochs=options.epochs, batch=options.batch, learning_rate=options.learning_rate, warm_up=options.warm_up,
        micro_tokens=options.micro_tokens, seed=options.seed, bfloat16=options.bfloat16,
    )  # fmt: skip

    def say(stage: str, step: int, total: int) -> None:
        if step % 10 == 0 or step == total:
            print(f"{step} of {total}, {time.monotonic() - started:.0f} s", flush=True)

    losses = tune(model, encoded, tuning, state=options.dir / "state", progress=say)
    save(model, loaded.tokenizer, options.dir)
    if (options.dir / "state").is_dir():
        (options.dir / "state").rmdir()
    tail = losses[-max(len(losses) // 20, 1) :]
    print(json.dumps({"samples": len(encoded), "steps": len(losses), "loss": sum(tail) / len(tail)}))


if __name__ == "__main__":
    main()
