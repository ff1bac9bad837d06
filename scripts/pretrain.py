"""Make a small base model: a BPE tokenizer and a Llama, trained as a language model on the records of some files.

scripts/pretrain FILE... --dir base [--minutes 25]

Records are written as prompt and response without any template, all of it with loss. Interrupted, it goes on from its
last state when run again.
"""

import argparse
import json
import random
import time
from pathlib import Path

from rapidin_vdb.corpus import read_corpus
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.gradient.training import new_llama, save, train_tokenizer
from rapidin_vdb.gradient.tuning import Tuning, mean_loss, tune
from rapidin_vdb.records import Encoded

HELD_OUT = 200


def texts_of(files: list[Path], *, seed: int) -> list[str]:
    """Return all records as plain texts, in an order drawn from the seed."""
    texts = []
    for sample in read_corpus(files):
        if not isinstance(sample, CorpusError):
            texts.append(f"{sample.prompt}\n{sample.response}" if sample.prompt else sample.response)
    random.Random(seed).shuffle(texts)
    return texts


def windows(texts: list[str], tokenizer, *, length: int) -> list[Encoded]:
    """Return texts, each with its beginning and end, one after the other, cut into windows of equal length."""
    stream: list[int] = []
    for first in range(0, len(texts), 1000):
        for ids in tokenizer(texts[first : first + 1000], add_special_tokens=False)["input_ids"]:
            stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return [
        Encoded(
            sample_id=f"{place:09d}",
            input_ids=tuple(stream[place : place + length]),
            offsets=((0, 0),) * (length - 1),
            truncated=False,
        )
        for place in range(0, len(stream) - length, length)
    ]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--dir", type=Path, required=True, help="where model and tokenizer go")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--tokens", type=int, help="how many to train on [default: all, once]")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 (faster where the CPU has it)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if (options.dir / "config.json").exists():
        raise SystemExit(f"{options.dir} holds a model already")
    started = time.monotonic()
    texts = texts_of(options.files, seed=options.seed)
    tokenizer = train_tokenizer(texts[HELD_OUT:], vocabulary=options.vocabulary)
    made, held_out = (windows(part, tokenizer, length=options.window) for part in (texts[HELD_OUT:], texts[:HELD_OUT]))
    model = new_llama(
        len(tokenizer), hidden=options.hidden, layers=options.layers, heads=options.heads, seed=options.seed
    )
    epochs = 1.0 if options.tokens is None else options.tokens / (len(made) * options.window)
    tuning = Tuning(
        epochs=epochs, batch=options.batch, learning_rate=options.learning_rate, weight_decay=0.1, seed=options.seed,
        bfloat16=options.bfloat16,
    )  # fmt: skip
    print(
        f"{model.num_parameters():,} parameters, {len(made) * options.window:,} tokens, "
        f"{tuning.steps(len(made)):,} steps",
        flush=True,
    )

    def say(stage: str, step: int, total: int) -> None:
        if step % 50 == 0 or step == total:
            print(f"{step} of {total}, {time.monotonic() - started:.0f} s", flush=True)

    losses = tune(model, made, tuning, state=options.dir / "state", progress=say)
    held = mean_loss(model, held_out[:64])
    save(model, tokenizer, options.dir)
    if (options.dir / "state").is_dir():
        (options.dir / "state").rmdir()
    report = {
        "parameters": model.num_parameters(),
        "tokens": tuning.steps(len(made)) * options.batch * options.window,
        "loss_at_the_end": sum(losses[-50:]) / len(losses[-50:]),
        "loss_held_out": held,
        "seconds": time.monotonic() - started,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
