"""What a search costs with 52,000 RapidGrads of width 65,536 in a GPU's memory: one shard and two, torch and FAISS.

scripts/bench search_gpu [--samples 52000] [--width 65536] [--small]

Beside it, in the same run: a plain sum over the same bytes, and the same products by torch. With one GPU, both shards
are on it. Without one, `--small` shows that it runs. Where FAISS cannot use the GPU, torch alone is measured.
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

HERE = Path(__file__).parent
try:
    import rapidin_vdb  # noqa: F401
except ImportError:  # not installed
    sys.path.insert(0, str(HERE.parent))

from common import RESULTS, Clock, machine, median_seconds  # noqa: E402
from rows import in_memory_index, queries_of, vectors_of  # noqa: E402

from rapidin_vdb.errors import SpecError  # noqa: E402
from rapidin_vdb.index import ShardedIndex  # noqa: E402
from rapidin_vdb.index.library import faiss, gpu_count  # noqa: E402
from rapidin_vdb.recipe import IndexRecipe, Library  # noqa: E402

TOP = 10
# Seconds of one query among 52,000 samples, as the paper has them: on two H100s, and on one.
PAPER = {"two H100s": 6.84, "one H100": 97.0}


def beside(rows: np.ndarray, queries: np.ndarray, device: str, repeats: int) -> tuple[dict[str, float], np.ndarray]:
    """Return what the device does at most with the same rows, and the best rows in single precision."""

    def waited(call: Any) -> Any:
        def run() -> None:
            call()
            if device != "cpu":
                torch.cuda.synchronize()

        return run

    there = torch.from_numpy(rows).view(torch.float16).to(device)
    asked = torch.from_numpy(queries).to(device)
    half = asked.half()
    said = {
        "sum_seconds": median_seconds(waited(lambda: there.view(torch.float32).sum()), repeats),
        "torch_one_seconds": median_seconds(waited(lambda: (there @ half[0]).topk(TOP)), repeats),
        "torch_hundred_seconds": median_seconds(waited(lambda: (half @ there.T).topk(TOP)), repeats),
    }
    scores = torch.cat([asked @ block.float().T for block in there.split(4096)], dim=1)
    return said, scores.topk(TOP).indices.cpu().numpy()


def rounding(index: ShardedIndex) -> dict[str, float]:
    """Return how far a search's scores are from float64 at the worst, beside the products of norms, and their bound.

    Asked are rows themselves: where all products are positive, what a sum loses at each step adds up.
    """
    worst = 0.0
    for shard in index.shards:
        rows = shard.take(np.arange(0, shard.rows, max(1, shard.rows // 16))[:16]).view(np.float16)
        ((scores, numbers),) = shard.search(rows.astype(np.float32), TOP, None, both=False)
        for row, found, places in zip(rows.astype(np.float64), scores, numbers, strict=True):
            near = shard.take(places).view(np.float16).astype(np.float64)
            norms = np.linalg.norm(row) * np.linalg.norm(near, axis=1)
            worst = max(worst, float((np.abs(found - near @ row) / norms).max()))
    return {"worst": worst, "bound": max(shard.rounding for shard in index.shards)}


def measure(rows: np.ndarray, queries: np.ndarray, best: np.ndarray, recipe: IndexRecipe, repeats: int) -> dict:
    """Time one set-up, and count how many of the best rows it finds."""
    with Clock() as loaded:
        index = in_memory_index(rows, recipe)
    found = index.search(queries, TOP)
    agreeing = sum(
        {int(name[1:]) for name, _ in ranked} == set(truth.tolist()) for ranked, truth in zip(found, best, strict=True)
    )
    said: dict[str, Any] = {
        "devices": recipe.devices, "library": recipe.library,
        "rounding": rounding(index), "load_seconds": loaded.wall, "queries_with_the_same_ten": agreeing,
        "one_seconds": median_seconds(lambda: index.search(queries[:1], TOP), repeats),
        "hundred_seconds": median_seconds(lambda: index.search(queries, TOP), repeats),
        "both_ends_seconds": median_seconds(lambda: index.search_both(queries[:1], TOP), repeats),
        "filtered": [],
    }  # fmt: skip
    for share in (0.01, 0.1, 0.5):
        among = np.flatnonzero(np.random.default_rng(2).random(len(rows)) < share)
        for count in (1, len(queries)):
            seconds = median_seconds(lambda a=among, n=count: index.search(queries[:n], TOP, among=a), 2)  # type: ignore[misc]
            said["filtered"].append({"share": share, "queries": count, "seconds": seconds})
    return said


def libraries(*, small: bool) -> tuple[list[str], str]:
    """Return what can search here, and which FAISS there is."""
    try:
        version, usable = str(faiss().__version__), small or gpu_count() > 0
    except SpecError as error:
        version, usable = f"none: {error}"[:200], False
    return [library for library in get_args(Library) if usable or library != "faiss"], version


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=52_000)
    parser.add_argument("--width", type=int, default=65_536)
    parser.add_argument("--small", action="store_true", help="few narrow rows on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "search_gpu.json", help="where results are written")
    options = parser.parse_args()
    small = options.small or not torch.cuda.is_available()
    known, version = libraries(small=small)
    count, width, repeats = (2000, 1024, 2) if small else (options.samples, options.width, 10)
    gpus = 1 if small else torch.cuda.device_count()
    device = "cpu" if small else "cuda:0"
    named = "cpu" if small else torch.cuda.get_device_name(0)
    result: dict[str, Any] = {
        "command": "scripts/bench search_gpu " + " ".join(sys.argv[1:]),
        "machine": machine() | {"faiss": version, "device": named},
        "samples": count, "width": width, "gpus": gpus, "paper_seconds": PAPER, "set_ups": [],
    }  # fmt: skip
    rows = np.concatenate([block.view(np.uint16) for block in vectors_of(count, width)])
    queries = queries_of(100, width)
    result["beside"], best = beside(rows, queries, device, repeats)
    print(json.dumps(result), file=sys.stderr, flush=True)
    for devices in (("cuda:0",), ("cuda:0", f"cuda:{min(1, gpus - 1)}")):
        for library in known:
            gc.collect()
            if not small:
                torch.cuda.empty_cache()
            recipe = IndexRecipe(name="gpu", devices=devices, shards_per_device=1, library=library)
            result["set_ups"].append(measure(rows, queries, best, recipe, repeats))
            print(json.dumps(result["set_ups"][-1]), file=sys.stderr, flush=True)
    if small:
        print(json.dumps(result))
    else:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
