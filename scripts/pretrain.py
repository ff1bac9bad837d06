"""Make a small base model: a BPE tokenizer and a Llama, trained as a language model on the records of some files.

scripts/pretrain FILE... --dir base [--tokens 7000000]

Records are written as prompt and response without any template, all of it with loss. Interrupted, it goes on from its
last state when run again.
"""

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

from rapidin_vdb.corpus import read_corpus
from rapidin_vdb.errors import CorpusError, RapidInError
from rapidin_vdb.gradient.training import POSITIONS, new_llama, save, train_tokenizer
from rapidin_vdb.gradient.tuning import Tuning, mean_loss, tune
from rapidin_vdb.gradient.tuning_state import finished
from rapidin_vdb.records import Encoded

HELD_OUT = 200


def texts_of(files: list[Path], *, seed: int) -> list[str]:
    """Return all records as plain texts, in an order drawn from the seed."""
    texts, left_out = [], []
    for sample in read_corpus(files):
        if isinstance(sample, CorpusError):
            left_out.append(sample)
        else:
            texts.append(f"{sample.prompt}\n{sample.response}" if sample.prompt else sample.response)
    if left_out:
        print(f"left out: {len(left_out)} records, the first for this: {left_out[0]}")
    if len(texts) <= HELD_OUT:
        raise SystemExit(
            f"{len(texts)} records were found; wanted more than {HELD_OUT}, for that many are held out to measure the "
            "loss; give more files"
        )
    random.Random(seed).shuffle(texts)
    return texts


def windows(texts: list[str], tokenizer, *, length: int) -> list[Encoded]:
    """Return texts, each with its beginning and end, one after the other, cut into windows of equal length.

    What is left at the end, shorter than a window, is dropped.
    """
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
        for place in range(0, len(stream) - length + 1, length)
    ]


def check(options: argparse.Namespace) -> None:
    """Refuse what makes no model, before anything is read."""
    least = {"vocabulary": 259, "hidden": 8, "layers": 1, "heads": 1, "window": 2, "tokens": 1}
    for name, wanted in least.items():
        if (value := getattr(options, name)) is not None and value < wanted:
            raise SystemExit(f"--{name} is {value}; wanted {wanted} or more")
    if options.window > POSITIONS:
        raise SystemExit(f"--window is {options.window}; wanted no more than {POSITIONS}, which the model will know")
    # A head is turned in pairs of numbers.
    if options.hidden % (2 * options.heads):
        raise SystemExit(f"--hidden is {options.hidden}; wanted a multiple of twice --heads, {2 * options.heads}")
    if options.dir.exists() and not options.dir.is_dir():
        raise SystemExit(f"--dir {options.dir} is a file; wanted a folder, or a name for one")


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
    check(options)
    tuning = Tuning(
        batch=options.batch, learning_rate=options.learning_rate, warm_up=0.03, weight_decay=0.1,
        seed=options.seed, bfloat16=options.bfloat16,
    )  # fmt: skip
    state = options.dir / "state"
    if (options.dir / "config.json").exists():
        finished(state)  # as after an end between the two
        raise SystemExit(f"{options.dir} holds a model already; give another --dir, or remove it")
    started = time.monotonic()
    texts = texts_of(options.files, seed=options.seed)
    tokenizer = train_tokenizer(texts[HELD_OUT:], vocabulary=options.vocabulary)
    made, held_out = (windows(part, tokenizer, length=options.window) for part in (texts[HELD_OUT:], texts[:HELD_OUT]))
    for what, found in {"to train on": made, "held out": held_out}.items():
        if not found:
            raise SystemExit(
                f"the texts {what} are shorter than one window of {options.window} tokens; give more records, or a "
                "smaller --window"
            )
    model = new_llama(
        len(tokenizer), hidden=options.hidden, layers=options.layers, heads=options.heads, seed=options.seed
    )
    epochs = 1.0 if options.tokens is None else options.tokens / (len(made) * options.window)
    tuning = dataclasses.replace(tuning, epochs=epochs)
    print(
        f"{model.num_parameters():,} parameters, {len(made) * options.window:,} tokens, "
        f"{tuning.steps(len(made)):,} steps",
        flush=True,
    )

    def say(stage: str, step: int, total: int) -> None:
        if step % 50 == 0 or step == total:
            print(f"{step} of {total}, {time.monotonic() - started:.0f} s", flush=True)

    losses = tune(model, made, tuning, state=state, progress=say)
    held = mean_loss(model, held_out[:64])
    save(model, tokenizer, options.dir)
    finished(state)
    report = {
        "parameters": model.num_parameters(),
        "tokens": tuning.steps(len(made)) * options.batch * options.window,
        "loss_at_the_end": sum(losses[-50:]) / len(losses[-50:]),
        "loss_held_out": held,
        "seconds": time.monotonic() - started,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except RapidInError as error:
        raise SystemExit(str(error)) from error
