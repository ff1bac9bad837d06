"""What ingest costs, beside a plain training step, the slow way, a peer, and itself at other sizes; all in one run.

scripts/bench ingest [--only ratio,peer,memory,scaling] [--small] [--peer-python PATH]
"""

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import HERE, RESULTS, Clock, machine

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
SHAPES = {
    # hidden, layers, heads; the large one has 33.7M parameters with a vocabulary of 8192
    "large": (512, 8, 8),
    "middle": (256, 8, 8),
    "small": (64, 2, 2),
}


def make_model(folder: Path, *, shape: str, lora: bool, rank: int = 16) -> dict[str, str]:
    """Write a Llama with random weights, and an adapter where asked; return the arguments of `init`."""
    import torch

    from rapidin_vdb.gradient.training import new_llama, save, train_tokenizer, with_lora

    hidden, layers, heads = SHAPES[shape]
    tokenizer = train_tokenizer(["a"], vocabulary=259)
    model = new_llama(8192, hidden=hidden, layers=layers, heads=heads, seed=0, tied=False)
    model.config.max_position_embeddings = 2048  # bergson wants no batch of more tokens; nothing computed depends on it
    model.name_or_path = str(folder / "model")  # where bergson looks for the adapter's model
    save(model, tokenizer, folder / "model")
    arguments = {"model": str(folder / "model")}
    if lora:
        model = with_lora(model, rank=rank, modules=MODULES, seed=0)
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
    from rapidin_vdb.batches import planned_batches
    from rapidin_vdb.compute import road_here
    from rapidin_vdb.intake import Corpus, encoded_windows

    road = road_here(database._loaded())
    windows = list(
        encoded_windows(Corpus(paths=(corpus,)), tokenizer=road.tokenizer, template=road.template, max_tokens=512)
    )
    todo = {sample.sample_id: sample.content_hash for window in windows for sample, _ in window}
    return [
        [encoded for _, encoded in batch]
        for window in windows
        for batch in planned_batches(window, todo, batch_tokens, width=database.fingerprint.sketch.width)
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


def one_round(database, corpus: Path, samples: int) -> dict[str, dict[str, float]]:
    """A plain step over every batch, and an ingest of the same into an empty database."""
    loaded = database._loaded().loaded
    batches = batches_of(database, corpus, 2048)
    database._loaded().maker.make_batch(batches[0])  # the first batch's self-check is not what is measured
    with Clock() as plain:
        for batch in batches:
            plain_step(loaded, batch)
    with Clock() as ours:
        report = database.ingest(corpus, batch_tokens=2048)
    assert report.added == samples
    return {"plain": vars_of(plain), "ingest": vars_of(ours)}


def ratio(kind: str, *, samples: int, repeats: int) -> dict:
    """Ingest beside a plain forward and backward over the same batches of 16 x 128 tokens, and beside the slow way."""
    import numpy as np

    import rapidin_vdb
    from rapidin_vdb.sketch import BucketMap, draw_shuffle

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = make_model(folder, shape="large", lora=kind != "full", rank=512 if kind == "lora, r = 512" else 16)
        corpus = make_corpus(folder / "corpus.jsonl", samples=samples, tokens=128)
        warm = make_corpus(folder / "warm.jsonl", samples=16, tokens=128)
        runs = []
        for number in range(repeats + 1):
            shuffles = 100 if kind == "lora, lambda = 100" else 20
            database = rapidin_vdb.init(folder / f"db{number}", template="text", shuffles=shuffles, **arguments)
            loaded = database._loaded().loaded
            batches = batches_of(database, corpus, 2048)
            if number == 0:  # compile, fill the caches
                database.ingest(warm, batch_tokens=2048)
                plain_step(loaded, batches[0])
                continue
            runs.append(one_round(database, corpus, samples))
        fingerprint = database.fingerprint
        made = BucketMap(fingerprint.sketch, fingerprint.gradient_length)
        steps, negative = draw_shuffle(fingerprint.sketch, made.length), made.negative(0, made.length).numpy()
        few = batches[0][: 2 if fingerprint.gradient_length > 1 << 20 else 8]
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


def peer_python() -> str:
    """Return the Python of bergson's environment, which is made the first time."""
    requirements = HERE / "peer-requirements.txt"
    folder = HERE.parent / ".venv-bergson"
    python, done = str(folder / "bin" / "python"), folder / ".installed"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not done.exists() or done.read_text() != wanted:
        print(f"installing bergson into {folder.name} (a few minutes the first time) ...", file=sys.stderr, flush=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [*install, "--constraint", str(requirements), "torch"],
            [*install, "--no-deps", "--requirement", str(requirements)],
        ):
            subprocess.run(command, check=True, stdout=sys.stderr)
        done.write_text(wanted)
    return python


def ours_once(kind: str, *, folder: str, samples: int) -> dict:
    """One round of ours in a process of its own, on what `peer` made."""
    import rapidin_vdb

    home = Path(folder)
    arguments = {"model": str(home / "model")} | ({"adapter": str(home / "adapter")} if kind == "lora" else {})
    with tempfile.TemporaryDirectory() as name:
        warm = rapidin_vdb.init(Path(name) / "warm", template="text", **arguments)
        warm.ingest(home / "warm.jsonl", batch_tokens=2048)
        plain_step(warm._loaded().loaded, batches_of(warm, home / "warm.jsonl", 2048)[0])
        del warm
        database = rapidin_vdb.init(Path(name) / "db", template="text", **arguments)
        made = one_round(database, home / "corpus.jsonl", samples)
        size = sum(file.stat().st_size for file in (Path(name) / "db").rglob("*") if file.is_file())
        return made | {"numbers_a_sample": database.fingerprint.sketch.width, "bytes_a_sample": size / samples}


def peer(kind: str, *, samples: int, repeats: int, python: str) -> dict:
    """Ingest and bergson's `build`, each beside a plain step of its own process, taking turns."""
    import rapidin_vdb

    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = make_model(folder, shape="large", lora=kind == "lora")
        database = rapidin_vdb.init(folder / "db", template="text", shuffles=1, **arguments)
        for part, count in (("corpus", samples), ("warm", 16)):
            corpus = make_corpus(folder / f"{part}.jsonl", samples=count, tokens=128)
            batches = batches_of(database, corpus, 2048)
            assert {len(batch) for batch in batches} == {16}
            with (folder / f"{part}-ids.jsonl").open("w") as file:
                for encoded in (encoded for batch in batches for encoded in batch):
                    ids = list(encoded.input_ids)
                    assert len(ids) == 128
                    file.write(json.dumps({"input_ids": ids, "length": len(ids)}) + "\n")
        del database
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
        for ours in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # set when our package is imported
            environment.pop(ours, None)
        command = [python, str(HERE / "peer.py"), "--model", arguments["model"]]
        command += ["--adapter", arguments["adapter"]] if kind == "lora" else []
        command += ["--data", str(folder / "corpus-ids.jsonl"), "--warm", str(folder / "warm-ids.jsonl")]
        # Numbers a sample: 64 adapter matrices * 32 * 32 = 65,536; 56 linear layers * 34 * 34 = 64,736.
        command += ["--dim", "32" if kind == "lora" else "34"]
        for number in range(repeats):
            with tempfile.TemporaryDirectory() as indexes:
                done = subprocess.run([*command, "--folder", indexes], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(done.stderr)
            theirs = json.loads(done.stdout.splitlines()[-1])
            ours = apart("ours_once", kind=kind, folder=str(folder), samples=samples)
            runs.append({"bergson": theirs, "ours": ours})
            print(f"peer {kind}: round {number + 1} of {repeats}", file=sys.stderr, flush=True)

    def middle(of) -> dict[str, float]:
        return {clock: statistics.median(of(run, clock) for run in runs) for clock in ("wall", "cpu")}

    last = runs[-1]
    return {
        "kind": kind,
        "samples": samples,
        "bergson_ratio": middle(lambda run, of: run["bergson"]["build"][of] / run["bergson"]["plain"][of]),
        "ours_ratio": middle(lambda run, of: run["ours"]["ingest"][of] / run["ours"]["plain"][of]),
        "ours_to_bergson": middle(lambda run, of: run["ours"]["ingest"][of] / run["bergson"]["build"][of]),
        "ours_to_bergson_prepared": middle(
            lambda run, of: run["ours"]["ingest"][of] / (run["bergson"]["build"][of] - run["bergson"]["drawing"][of])
        ),
        "plain_to_plain": middle(lambda run, of: run["ours"]["plain"][of] / run["bergson"]["plain"][of]),
        "bergson_seconds_a_sample": middle(lambda run, of: run["bergson"]["build"][of] / samples),
        "ours_seconds_a_sample": middle(lambda run, of: run["ours"]["ingest"][of] / samples),
        "numbers_a_sample": {side: last[side]["numbers_a_sample"] for side in ("bergson", "ours")},
        "bytes_a_sample": {side: last[side]["bytes_a_sample"] for side in ("bergson", "ours")},
        "parameters": last["bergson"]["parameters"],
        "parameters_bergson_sees": last["bergson"]["parameters_seen"],
        "versions": last["bergson"]["versions"],
        "runs": runs,
    }


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
    parser.add_argument("--only", default="ratio,peer,memory,scaling", help="which parts, by comma")
    parser.add_argument("--small", action="store_true", help="fewer samples, to see that it runs")
    parser.add_argument("--peer-python", help="the Python of an environment with bergson, instead of making one")
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart:
        function, values = json.loads(options.apart)
        print(json.dumps(globals()[function](**values)))
        return
    parts, few = options.only.split(","), options.small
    python = (options.peer_python or peer_python()) if "peer" in parts else ""
    result: dict = {"command": "scripts/bench ingest " + " ".join(sys.argv[1:]), "machine": machine()}
    if "ratio" in parts:
        result["ratio"] = [
            apart("ratio", kind=kind, samples=32 if few else 96, repeats=1 if few else 3)
            for kind in ("lora", "lora, lambda = 100", "lora, r = 512", "full")
        ]
    if "peer" in parts:
        # For LoRA the two are close: more rounds, that a shared machine's moods do not decide.
        result["peer"] = [
            apart("peer", kind=kind, python=python, samples=32 if few else 96, repeats=1 if few else rounds)
            for kind, rounds in (("lora", 7), ("full", 3))
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
        (RESULTS / "ingest.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
