"""What ingest costs, beside a plain training step, the slow way, and itself at other sizes; all in one run.

scripts/bench ingest [--only ratio,slow,memory,scaling] [--small]
"""

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
SHAPES = {
    # hidden, layers, heads; the large one has 33.7M parameters with a vocabulary of 8192
    "large": (512, 8, 8),
    "middle": (256, 8, 8),
    "small": (64, 2, 2),
}


def machine() -> dict[str, str]:
    """Return what the figures were taken on."""
    import torch

    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def make_model(folder: Path, *, shape: str, lora: bool) -> dict[str, str]:
    """Write a Llama with random weights, and an adapter of rank 16 where asked; return the arguments of `init`."""
    import torch

    from rapidin_vdb.gradient.training import new_llama, save, train_tokenizer, with_lora

    hidden, layers, heads = SHAPES[shape]
    tokenizer = train_tokenizer(["a"], vocabulary=259)
    model = new_llama(8192, hidden=hidden, layers=layers, heads=heads, seed=0, tied=False)
    save(model, tokenizer, folder / "model")
    arguments = {"model": str(folder / "model")}
    if lora:
        model = with_lora(model, rank=16, modules=MODULES, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        save(model, tokenizer, folder / "adapter")
        arguments["adapter"] = str(folder / "adapter")
    return arguments


def make_corpus(path: Path, *, samples: int, tokens: int) -> Path:
    """Write records of exactly so many tokens each."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(samples):
            text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=tokens - 1))
            file.write(json.dumps({"id": f"s{number:06d}", "text": text}) + "\n")
    return path


def batches_of(database, corpus: Path, batch_tokens: int) -> list:
    """Return the batches that an ingest of this corpus forms."""
    from rapidin_vdb.plan import Corpus, encoded_windows, planned_batches

    road = database._road(["cpu"], 1, model=None, adapter=None)
    windows = list(
        encoded_windows(Corpus(paths=(corpus,)), tokenizer=road.tokenizer, template=road.template, max_tokens=512)
    )
    todo = {sample.sample_id: sample.content_hash for window in windows for sample, _ in window}
    return [
        [encoded for _, encoded in batch] for window in windows for batch in planned_batches(window, todo, batch_tokens)
    ]


def plain_step(loaded, batch) -> None:
    """One forward and backward of training, gradients of all trainable parameters, over the same tokens."""
    import torch.nn.functional as F

    from rapidin_vdb.gradient.training import padded

    ids, _, labels = padded(batch)
    logits = loaded.model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100).backward()
    for tensor in loaded.theta.values():
        tensor.grad = None


def slow_rapidgrad(loaded, sample, *, spec, steps, negative):
    """The paper's way for one sample: the whole gradient, then 2 * lambda permuted copies of it."""
    import numpy as np
    import torch

    from rapidin_vdb.gradient import stream_gradient
    from rapidin_vdb.gradient.rapidgrad import normalized

    grads: dict[int, torch.Tensor] = {}
    stream_gradient(loaded, sample, lambda number, grad: grads.__setitem__(number, normalized(grad.reshape(-1))))
    flat = torch.cat([grads[number] for number in range(len(loaded.theta))]).numpy()
    vector = np.zeros(len(negative), np.float32)
    vector[: len(flat)] = flat
    vector = np.where(negative, -vector, vector)
    for step in steps:
        vector = vector.reshape(len(step.row_permutation), -1)[step.row_permutation]
        vector = vector.reshape(-1, len(step.column_permutation))[:, step.column_permutation].reshape(-1)
    return vector.reshape(spec.width, -1).sum(1)


class Clock:
    """Wall and CPU seconds of a block."""

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def ratio(kind: str, *, samples: int, repeats: int) -> dict:
    """Ingest beside a plain forward and backward over the same batches of 16 x 128 tokens, and beside the slow way."""
    import numpy as np

    import rapidin_vdb
    from rapidin_vdb.sketch import BucketMap, draw_shuffle

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = make_model(folder, shape="large", lora=kind == "lora")
        corpus = make_corpus(folder / "corpus.jsonl", samples=samples, tokens=128)
        warm = make_corpus(folder / "warm.jsonl", samples=16, tokens=128)
        runs = []
        for number in range(repeats + 1):
            database = rapidin_vdb.init(folder / f"db{number}", template="text", **arguments)
            loaded = database._loaded().loaded
            batches = batches_of(database, corpus, 2048)
            if number == 0:  # compile, fill the caches
                database.ingest(warm, batch_tokens=2048)
                plain_step(loaded, batches[0])
                continue
            database._loaded().maker.make_batch(batches[0])  # the first batch's self-check is not what is measured
            with Clock() as plain:
                for batch in batches:
                    plain_step(loaded, batch)
            with Clock() as ours:
                report = database.ingest(corpus, batch_tokens=2048)
            assert report.added == samples
            runs.append({"plain": vars_of(plain), "ingest": vars_of(ours)})
        fingerprint = database.fingerprint
        made = BucketMap(fingerprint.sketch, fingerprint.gradient_length)
        steps, negative = draw_shuffle(fingerprint.sketch, made.length), made.negative(0, made.length).numpy()
        few = batches[0][: 4 if kind == "lora" else 2]
        with Clock() as slow:
            expected = [
                slow_rapidgrad(loaded, one, spec=fingerprint.sketch, steps=steps, negative=negative) for one in few
            ]
        found = [result[0] for result in database._loaded().maker.make_batch(few)]
        differences = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]
        assert max(differences) < 1e-4, f"the slow way has to give the same: {differences}"
        ours_each = statistics.median(run["ingest"]["wall"] for run in runs) / samples
        return {
            "kind": kind,
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "gradient_length": fingerprint.gradient_length,
            "samples": samples,
            "wall_ratio": statistics.median(run["ingest"]["wall"] / run["plain"]["wall"] for run in runs),
            "cpu_ratio": statistics.median(run["ingest"]["cpu"] / run["plain"]["cpu"] for run in runs),
            "samples_per_second": 1 / ours_each,
            "slow_way_seconds_a_sample": slow.wall / len(few),
            "times_faster_than_slow_way": slow.wall / len(few) / ours_each,
            "runs": runs,
        }


def vars_of(clock: Clock) -> dict[str, float]:
    """Return a clock's readings."""
    return {"wall": clock.wall, "cpu": clock.cpu}


def peak(*, shape: str, lora: bool, samples: int, tokens: int, batch_tokens: int, width: int) -> dict:
    """Ingest in a process of its own, and return its peak memory."""
    import rapidin_vdb

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = make_model(folder, shape=shape, lora=lora)
        corpus = make_corpus(folder / "corpus.jsonl", samples=samples, tokens=tokens)
        database = rapidin_vdb.init(folder / "db", template="text", width=width, **arguments)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report = database.ingest(corpus, batch_tokens=batch_tokens)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "samples": samples, "batch_tokens": batch_tokens, "peak_mib": after, "before_mib": before,
            "seconds": report.seconds,
        }  # fmt: skip


def scaling(*, shuffles: int, width: int, shape: str, lora: bool, batches: int = 4) -> dict:
    """Seconds a batch of 16 x 128 tokens takes at some lambda, K and D, and a plain step in the same run."""
    import rapidin_vdb

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = make_model(folder, shape=shape, lora=lora)
        corpus = make_corpus(folder / "corpus.jsonl", samples=16 * batches, tokens=128)
        with Clock() as started:
            database = rapidin_vdb.init(folder / "db", template="text", width=width, shuffles=shuffles, **arguments)
        maker, loaded = database._loaded().maker, database._loaded().loaded
        made = batches_of(database, corpus, 2048)
        maker.make_batch(made[0])
        plain_step(loaded, made[0])
        ours, plain = [], []
        for batch in made:
            with Clock() as clock:
                plain_step(loaded, batch)
            plain.append(clock.wall)
            with Clock() as clock:
                maker.make_batch(batch)
            ours.append(clock.wall)
        return {
            "shuffles": shuffles, "width": width, "gradient_length": database.fingerprint.gradient_length,
            "batch_seconds": statistics.median(ours), "plain_seconds": statistics.median(plain),
            "ratio": statistics.median(a / b for a, b in zip(ours, plain, strict=True)), "init_seconds": started.wall,
        }  # fmt: skip


def apart(function: str, **options: object) -> dict:
    """Run one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--apart", json.dumps([function, options])], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{function} {options}: { {k: v for k, v in result.items() if k != 'runs'} }", file=sys.stderr, flush=True)
    return result


def main() -> None:
    """Measure what is asked for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="ratio,memory,scaling", help="which parts, by comma")
    parser.add_argument("--small", action="store_true", help="fewer samples, to see that it runs")
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart:
        function, values = json.loads(options.apart)
        print(json.dumps(globals()[function](**values)))
        return
    parts, few = options.only.split(","), options.small
    result: dict = {"command": "scripts/bench ingest " + " ".join(sys.argv[1:]), "machine": machine()}
    if "ratio" in parts:
        result["ratio"] = [
            apart("ratio", kind=kind, samples=32 if few else 96, repeats=1 if few else 3) for kind in ("lora", "full")
        ]
    if "memory" in parts:
        shared = {"lora": True, "tokens": 32, "batch_tokens": 2048, "width": 8192}
        result["memory_by_samples"] = [
            apart("peak", shape="small", samples=samples, **shared)
            for samples in ((500, 1000) if few else (1000, 4000, 16000))
        ]
        full = {"shape": "large", "lora": False, "samples": 64, "tokens": 128, "width": 65536}
        result["memory_by_batch"] = [apart("peak", batch_tokens=tokens, **full) for tokens in (512, 1024, 2048, 4096)]
    if "scaling" in parts:
        base = {"shuffles": 20, "width": 65536, "shape": "large", "lora": True}
        changes: list[dict] = [{}, {"shuffles": 100}]
        if not few:
            changes += [{"width": 4096}, {"width": 1 << 19}, {"lora": False}, {"lora": False, "shuffles": 100}]
            changes += [{"lora": False, "width": 1 << 20}, {"lora": False, "shape": "middle"}]
        result["scaling"] = [apart("scaling", **base | change) for change in changes]
    text = json.dumps(result, indent=1)
    print(text)
    if not few:
        (HERE / "results" / "ingest.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
