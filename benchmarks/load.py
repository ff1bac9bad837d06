"""A database of many small rows: what each command takes in time and memory, as the number of rows grows.

scripts/bench load [--rows 100000 300000 1000000]

Everything is the product's own but the gradients, which are drawn at random: they are measured by scripts/bench ingest.
Each command runs in a process of its own, so that its peak of memory is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import RESULTS, machine

WIDTH = 256
SOURCES = 100
STEPS = (
    "start", "ingest", "again", "index", "query", "filter", "index, streamed", "query, streamed", "delete",
    "query after", "verify",
)  # fmt: skip


def write_corpus(path: Path, rows: int) -> None:
    """Write records of some twenty tokens, a hundredth of them of each source."""
    with path.open("w") as file:
        for number in range(rows):
            file.write(
                f'{{"id": "row-{number:08d}", "instruction": "Say {number % 997}", '
                f'"output": "{number} is {number * 7}", "source": "s{number % SOURCES:02d}", "stars": {number % 5}}}\n'
            )


def make(folder: Path) -> None:
    """Make a model of a few thousand parameters, and a database for it."""
    import rapidin_vdb
    from rapidin_vdb.gradient.training import new_llama, save, train_tokenizer

    tokenizer = train_tokenizer([f"Say {n} {n} is {n * 7}" for n in range(1000)], vocabulary=300)
    save(new_llama(len(tokenizer), hidden=16, layers=1, heads=2, seed=0), tokenizer, folder / "model")
    rapidin_vdb.init(folder / "db", model=str(folder / "model"), parameters="all", width=WIDTH)


def step(name: str, folder: Path) -> dict[str, float]:
    """Run one command on a database; return what it took."""
    import rapidin_vdb
    from rapidin_vdb.engine import Made
    from rapidin_vdb.ingest import ingest
    from rapidin_vdb.intake import Corpus

    database = rapidin_vdb.open(folder / "db")
    engine = database._loaded()
    draw = np.random.default_rng(0)

    def drawn(batches) -> Iterator:
        for batch in batches:
            vectors = draw.standard_normal((len(batch), WIDTH), dtype=np.float32).astype(np.float16)
            yield batch, [Made(vector, 1.0) for vector in vectors]

    own = OwnMemory()
    started, busy, outcome = time.perf_counter(), time.process_time(), 0
    if name in ("ingest", "again"):
        report = ingest(
            database._table, Corpus(paths=(folder / "corpus.jsonl",)), drawn, tokenizer=engine.loaded.tokenizer,
            template=engine.template, batch_tokens=8192,
        )  # fmt: skip
        outcome = report.added
    elif name == "index":
        outcome = database.index("cpu").samples
    elif name == "index, streamed":
        outcome = database.index("streamed").samples
    elif name == "query, streamed":
        outcome = database.query("Say 5", "5 is 35", top_k=10, index="streamed")[0].searched
    elif name in ("query", "query after"):
        outcome = database.query("Say 5", "5 is 35", top_k=10)[0].searched
    elif name == "filter":
        outcome = database.query("Say 5", "5 is 35", top_k=10, where="source = 's07'")[0].searched
    elif name == "delete":
        outcome = database.delete(where="source = 's13'")
    elif name == "verify":
        report = database.verify()
        outcome = report.samples
        assert report.findings == (), report.findings
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "mebibytes": status("VmHWM"),
        "own_mebibytes": own.peak(),
        "rows": outcome,
    }


def status(name: str) -> float:
    """Return what the system says of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


class OwnMemory:
    """The most memory that was the process's own, not mapped from files: looked at a hundred times a second."""

    def __init__(self) -> None:
        self._peak, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while True:
            self._peak = max(self._peak, status("RssAnon"))
            if self._done.wait(0.01):
                return

    def peak(self) -> float:
        """Stop looking."""
        self._done.set()
        self._thread.join()
        return self._peak


def measure(rows: int) -> dict:
    """Run all commands on a database of so many rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", rows)
        make(folder)
        found = {"rows": rows, "corpus_bytes": (folder / "corpus.jsonl").stat().st_size, "steps": {}}
        for step_name in STEPS:
            done = subprocess.run(
                [sys.executable, __file__, "--step", step_name, "--folder", name],
                check=True,
                capture_output=True,
                text=True,
            )
            found["steps"][step_name] = json.loads(done.stdout.splitlines()[-1])
            print(rows, step_name, found["steps"][step_name], flush=True)
        found["bytes"] = sum(path.stat().st_size for path in (folder / "db").rglob("*") if path.is_file())
        left = rows - rows // SOURCES
        wanted = {
            "ingest": rows, "again": 0, "index": rows, "query": rows, "filter": rows // SOURCES,
            "index, streamed": rows, "query, streamed": rows, "delete": rows // SOURCES,
            "query after": left, "verify": left,
        }  # fmt: skip
        assert all(found["steps"][name]["rows"] == count for name, count in wanted.items()), found
        return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--remark", default="The machine was shared.")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(options.step, options.folder)))
        return
    entries = [measure(rows) for rows in options.rows]
    if options.rows == parser.get_default("rows"):
        result = {"command": "scripts/bench load", "machine": machine(), "width": WIDTH, "entries": entries}
        result["remark"] = options.remark
        (RESULTS / "load.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
