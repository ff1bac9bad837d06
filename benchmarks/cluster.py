"""Ingest on Ray beside the same on this machine: overhead at equal workers, 1 to 2 workers, and what a kill costs.

scripts/bench cluster [--samples 400]

Every worker has one thread. Each run is a process of its own; its rate is that between the first batch and the last, so
that loading models does not count.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import RESULTS, machine
from ingest import make_corpus, make_model

TOKENS, BATCH = 128, 8
PAGE = Path(__file__).parent.parent / "docs" / "cluster.md"


def worker_pids() -> set[int]:
    """Return the processes that hold the model on Ray."""
    import psutil

    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any("ray::GradientWorker" in word for word in process.info["cmdline"] or ())
    }


class Watch:
    """Notes when batches are done; and kills a worker once, when so much is."""

    def __init__(self, *, kill_at: int | None) -> None:
        self._kill_at = kill_at
        self.times: list[tuple[float, int]] = []
        self.killed: float | None = None
        self.process: float | None = None
        """Seconds from the kill to a new process; none where it was not seen before the end."""
        self.batch: float | None = None
        """Seconds from the kill to the first batch done by a worker that was asked for after it; none likewise."""
        self._later: list[object] = []

    def listen(self) -> None:
        """Hear of every worker that is asked for, and of every batch that one has done."""
        from rapidin_vdb.cluster.crew import Crew

        start, done = Crew._start, Crew._done

        def started(crew: Crew, **how: bool) -> None:
            start(crew, **how)
            if self.killed is not None:
                self._later.append([*crew._starting.values()][-1])

        def made(crew: Crew, ref: object, waiting: object) -> list:
            actor = crew._busy[ref][0]
            found = done(crew, ref, waiting)
            if found and self.batch is None and any(actor is later for later in self._later):
                self.batch = time.perf_counter() - self.killed
            return found

        Crew._start, Crew._done = started, made

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a progress."""
        if stage != "ingest" or not done:
            return
        self.times.append((time.perf_counter(), done))
        if self._kill_at is not None and done >= self._kill_at:
            self._kill_at = None
            before = worker_pids()
            os.kill(min(before), signal.SIGKILL)
            self.killed = time.perf_counter()
            threading.Thread(target=self._look, args=(before,), daemon=True).start()

    def _look(self, before: set[int]) -> None:
        while not worker_pids() - before:
            time.sleep(0.1)
        self.process = time.perf_counter() - self.killed

    @property
    def rate(self) -> float:
        """Samples a second after the first batch."""
        (first, some), (last, all_) = self.times[0], self.times[-1]
        return (all_ - some) / (last - first)


def once(folder: Path, *, workers: int, on_ray: bool, kill: bool, samples: int) -> dict:
    """Ingest the corpus into a new database."""
    import torch

    import rapidin_vdb

    torch.set_num_threads(1)
    name = f"db-{workers}-{on_ray}-{kill}-{time.time_ns()}"
    database = rapidin_vdb.init(
        folder / name, width=65536, template="text", **json.loads((folder / "init.json").read_text())
    )
    options = {"device": "cpu", "batch_tokens": BATCH * TOKENS, "workers_per_device": workers}
    if on_ray:
        # So many CPUs as workers: each gets one thread, as on the other side.
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        import ray

        ray.init(
            address="local", num_cpus=workers, include_dashboard=False, object_store_memory=256 << 20,
            log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
        options["cluster"] = "local"
    watch = Watch(kill_at=samples // 4 if kill else None)
    if kill:
        watch.listen()
    started = time.perf_counter()
    report = database.ingest(folder / "corpus.jsonl", progress=watch, **options)
    assert report.added == samples == database.count()
    return {
        "workers": workers, "on_ray": on_ray, "killed": kill, "samples_per_second": watch.rate,
        "seconds": time.perf_counter() - started, "process_after": watch.process, "batch_after": watch.batch,
    }  # fmt: skip


def page(result: dict) -> str:
    """Return docs/cluster.md."""
    found = {(run["workers"], run["on_ray"], run["killed"]): run for run in result["runs"]}

    def rate(*which) -> float:
        return found[which]["samples_per_second"]

    rows = "\n".join(
        f"| {workers} | {rate(workers, False, False):.1f} | {rate(workers, True, False):.1f} | "
        f"{rate(workers, False, False) / rate(workers, True, False):.2f} |"
        for workers in (1, 2)
    )
    kill, whole, made = found[2, True, True], found[2, True, False], result["machine"]
    process, batch = (
        "not seen before the end" if kill[name] is None else f"after {kill[name]:.1f} s"
        for name in ("process_after", "batch_after")
    )
    return f"""# What Ray costs

Written by `benchmarks/cluster.py` from one run of `{result["command"]}` at commit {made["commit"]} on {made["date"]}: {made["processor"]},
{os.cpu_count()} cores, torch {made["torch"]}. {result["samples"]} samples of {TOKENS} tokens, batches of {BATCH}, the 33.7M Llama with LoRA, width 65,536; one
thread a worker. Rates are those between the first batch and the last. {result["remark"]}

| workers | samples a second, this machine's processes | on Ray | local / Ray |
| --- | --- | --- | --- |
{rows}

From 1 to 2 workers: {rate(2, False, False) / rate(1, False, False):.2f} times as fast here, {rate(2, True, False) / rate(1, True, False):.2f} times on Ray.

A worker killed (`kill -9`) after a quarter of the samples: another process stood in its place {process}; the first batch that the new
worker, with its model loaded, had done came {batch}. The other worker went on meanwhile. The whole ingest took {kill["seconds"]:.0f} s instead of
{whole["seconds"]:.0f}. All samples were there, once.
"""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--remark", default="The machine was shared: trust ratios.")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options.folder, samples=options.samples, **json.loads(options.once))))
        return
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "init.json").write_text(json.dumps(make_model(folder, shape="large", lora=True)))
        make_corpus(folder / "corpus.jsonl", samples=options.samples, tokens=TOKENS)
        plan = [(1, False, False), (1, True, False), (2, False, False), (2, True, False), (2, True, True)]
        for workers, on_ray, kill in plan:
            wanted = json.dumps({"workers": workers, "on_ray": on_ray, "kill": kill})
            done = subprocess.run(
                [sys.executable, __file__, "--once", wanted, "--folder", name, "--samples", str(options.samples)],
                check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(runs[-1], flush=True)
    result = {
        "command": "scripts/bench cluster", "machine": machine(), "samples": options.samples, "remark": options.remark,
        "runs": runs,
    }  # fmt: skip
    (RESULTS / "cluster.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(result), "utf-8")


if __name__ == "__main__":
    main()
