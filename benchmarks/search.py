"""What search costs, beside what the machine could do at most, LanceDB and FAISS; all in one run.

scripts/bench search [--gib 12] [--only one,many,filter,streamed,fresh,peers,growth,coarse] [--small] [--folder DIR]
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, Clock, machine, median_seconds
from rows import in_memory_index, queries_of, vectors_of

from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.index import ShardedIndex, list_manifests, load_index
from rapidin_vdb.recipe import read_recipe
from rapidin_vdb.records import Encoded, Fingerprint, ParameterShape, Sample, SketchSpec
from rapidin_vdb.store import Row, SampleTable

PARTS = ("one", "many", "filter", "streamed", "fresh", "peers", "growth", "coarse")


def rows_of(count: int, width: int, *, first: int = 0) -> Iterator[list[Row]]:
    """Yield rows for the table; 1 %, 10 % and 50 % of them have sources of their own."""
    number = first
    for block in vectors_of(count, width, seed=first):
        rows = []
        for vector in block:
            place = number * 7919 % 100
            source = "one" if place == 0 else "ten" if place <= 10 else "half" if place <= 60 else "rest"
            name = f"s{number:08d}"
            sample = Sample(sample_id=name, prompt=None, response="a", split="train", source=source, content_hash=name)
            encoded = Encoded(sample_id=name, input_ids=(1, 2), offsets=((0, 1),), truncated=False)
            rows.append(Row(sample=sample, encoded=encoded, loss=1.0, vector=vector))
            number += 1
        yield rows


def fill(table: SampleTable, count: int, width: int, *, first: int = 0) -> None:
    """Add rows in commits of 512 MiB."""
    waiting: list[Row] = []
    seen = table.snapshot().version
    for rows in rows_of(count, width, first=first):
        waiting += rows
        if len(waiting) * width * 2 >= 512 << 20:
            seen, waiting = table.append(waiting, seen=seen).seen, []
    if waiting:
        table.append(waiting, seen=seen)


def fingerprint(width: int) -> Fingerprint:
    """Return a fingerprint of no model: search needs none."""
    return Fingerprint(
        model="none", model_hash="", adapter=None, adapter_hash=None, quantization="none", dtype="float32",
        tokenizer_hash="", template="text", template_text="", max_tokens=512, loss="none", normalize="layer",
        parameters="all", theta=(ParameterShape(name="w", shape=(width,)),), sketch=SketchSpec(width=width),
        epochs=1.0, learning_rate=1.0,
    )  # fmt: skip


def limits(array: np.ndarray, repeats: int) -> dict:
    """Return what this machine does at most: a plain sum over the same bytes, and a large matrix product."""
    flat = torch.from_numpy(array).view(torch.float32).reshape(-1)
    seconds = median_seconds(lambda: flat.sum(), repeats)
    left, right = torch.randn(4096, 4096), torch.randn(4096, 4096)
    gemm = median_seconds(lambda: left @ right, repeats)
    return {"memory_gb_per_s": array.nbytes / seconds / 1e9, "gemm_gflop_per_s": 2 * 4096**3 / gemm / 1e9}


def largest_array(index: ShardedIndex) -> np.ndarray:
    """Return the rows of the first shard, at most 4 GiB of them."""
    (array, *_) = index.shards[0].source.arrays
    return array[: max(1, (4 << 30) // (2 * array.shape[1]))]


def forget(paths: list[Path]) -> None:
    """Put files out of the page cache, as far as the system agrees."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(paths: list[Path]) -> None:
    """Read files from the beginning to the end."""
    buffer = memoryview(bytearray(16 << 20))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def streamed(folder: Path, index_files: list[Path], manifest, queries: np.ndarray, repeats: int) -> dict:
    """Search an index on disk, cold, beside reading its file; the two in turn."""
    recipe = replace(read_recipe("streamed"), name=manifest.name).to_dict()
    index = load_index(folder, replace(manifest, recipe=recipe))
    size = sum(path.stat().st_size for path in index_files)
    raw, one, many = [], [], []
    calls = [
        (raw, lambda: read_all(index_files)),
        (one, lambda: index.search(queries[:1], 10)),
        (many, lambda: index.search(queries, 10)),
    ]
    forget(index_files)
    read_all(index_files)  # not counted: what lies below the page cache is slower the first time
    for turn in range(repeats):
        # Each comes first once: what lies below the page cache may remember the last pass.
        for seconds, call in calls[turn % 3 :] + calls[: turn % 3]:
            forget(index_files)
            with Clock() as clock:
                call()
            seconds.append(clock.wall)
    middle = [sorted(seconds)[len(seconds) // 2] for seconds in (raw, one, many)]
    warm = median_seconds(lambda: index.search(queries[:1], 10), repeats)
    warm_raw = median_seconds(lambda: read_all(index_files), repeats)
    return {
        "gib": size / 2**30, "raw_gb_per_s": size / middle[0] / 1e9, "one_query_gb_per_s": size / middle[1] / 1e9,
        "hundred_queries_gb_per_s": size / middle[2] / 1e9, "one_of_raw": middle[0] / middle[1],
        "hundred_of_raw": middle[0] / middle[2], "cached_one_gb_per_s": size / warm / 1e9,
        "cached_raw_gb_per_s": size / warm_raw / 1e9,
    }  # fmt: skip


def filtered(table: SampleTable, index: ShardedIndex, queries: np.ndarray, repeats: int) -> list[dict]:
    """Search 1 %, 10 % and 50 % of the samples, the filter included."""
    snapshot = table.snapshot()
    whole = {1: median_seconds(lambda: index.search(queries[:1], 10), repeats)}
    whole[len(queries)] = median_seconds(lambda: index.search(queries, 10), repeats)
    result = []
    for source in ("one", "ten", "half"):
        where = f"source = '{source}'"
        rows = median_seconds(lambda where=where: snapshot.row_ids(where), repeats)
        for count, all_of_it in whole.items():
            part = queries[:count]
            seconds = median_seconds(
                lambda part=part, where=where: index.search(part, 10, among=snapshot.row_ids(where)), repeats
            )
            result.append(
                {
                    "share": len(snapshot.row_ids(where)) / index.samples, "queries": count, "seconds": seconds,
                    "filter_seconds": rows, "of_unfiltered": seconds / all_of_it,
                }
            )  # fmt: skip
    return result


def fresh(table: SampleTable, folder: Path, count: int, width: int) -> dict:
    """Add 1 % of the rows, and bring the index up to date, in memory and on disk; beside building it."""

    def keeper() -> IndexKeeper:
        return IndexKeeper(folder)

    recipe = read_recipe("cpu")
    before = table.snapshot()
    resident, on_disk = keeper(), keeper()
    with Clock() as opened:
        resident.fresh(before)
    fill(table, max(count // 100, 1), width, first=count)
    after = table.snapshot()
    with Clock() as in_memory:
        index = resident.fresh(after)
    assert index.samples == count + max(count // 100, 1)
    del resident, index
    streamed_recipe = replace(recipe, residence="mapped")
    with Clock() as updated:
        manifest = next(known for known in list_manifests(folder) if known.name == "cpu")
        assert on_disk._extended(manifest, after, progress=lambda *_: None) is not None
    with Clock() as mapped:
        load_index(folder, replace(list_manifests(folder)[0], recipe=streamed_recipe.to_dict()))
    return {
        "open_seconds": opened.wall, "open_mapped_seconds": mapped.wall, "update_in_memory_seconds": in_memory.wall,
        "update_on_disk_seconds": updated.wall, "new_rows": max(count // 100, 1),
    }  # fmt: skip


def peers(rows: np.ndarray, queries: np.ndarray, repeats: int) -> list[dict]:
    """One query and a hundred: ours, FAISS in three forms, LanceDB's own brute force; on the same rows."""
    import faiss
    import lancedb
    import pyarrow as pa

    count, width = rows.shape
    halves = rows.view(np.float16)
    result = []

    def add(name: str, search, repeats: int = repeats) -> None:
        one = median_seconds(lambda: search(queries[:1]), repeats)
        many = median_seconds(lambda: search(queries), max(1, repeats // 2)) if name != "LanceDB" else None
        result.append({"engine": name, "one_seconds": one, "hundred_seconds": many})

    ours = in_memory_index(rows, read_recipe("cpu"))
    add("ours, float16", lambda part: ours.search(part, 10))
    scalar = faiss.IndexShards(width, True, False)
    kept = []
    for begin, end in ((0, count // 2), (count // 2, count)):
        part = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        part.add_sa_codes(np.ascontiguousarray(halves[begin:end]).view(np.uint8))
        kept.append(part)
        scalar.add_shard(part)
    add("FAISS scalar quantizer float16, a shard a core", lambda part: scalar.search(part, 10))
    flat = faiss.IndexFlatIP(width)
    for begin in range(0, count, 512):
        flat.add(halves[begin : begin + 512].astype(np.float32))
    add("FAISS IndexFlatIP float32", lambda part: flat.search(part, 10))
    wanted = [name for name, _ in ours.search(queries[:1], 10)[0]]
    assert [f"s{number:08d}" for number in flat.search(queries[:1], 10)[1][0]] == wanted, "the peers find the same"
    with tempfile.TemporaryDirectory() as name:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(halves.reshape(-1)), width)
        data = pa.table({"number": pa.array(range(count)), "vector": vectors})
        table = lancedb.connect(name).create_table("t", data.to_batches(64), schema=data.schema)
        query = queries[0].astype(np.float16)

        def search(part: np.ndarray) -> None:
            table.search(query).distance_type("dot").select(["number"]).limit(10).to_arrow()

        add("LanceDB", search, max(1, repeats // 2))
    return result


def growth(rows: np.ndarray, repeats: int) -> list[dict]:
    """One query and a hundred against N, and against K with the same bytes."""
    result = []
    width = rows.shape[1]
    for count in (len(rows) // 4, len(rows) // 2, len(rows)):
        result.append(measured(rows[:count], repeats))
    for narrower in (4, 16):
        result.append(measured(rows[: len(rows) // 2].reshape(-1, width // narrower), repeats))
    return result


def measured(rows: np.ndarray, repeats: int) -> dict:
    """Return what one query and a hundred cost on some rows."""
    count, width = rows.shape
    index, queries = in_memory_index(rows, read_recipe("cpu")), queries_of(100, width)
    return {
        "samples": count, "width": width, "gib": rows.nbytes / 2**30,
        "one_seconds": median_seconds(lambda: index.search(queries[:1], 10), repeats),
        "hundred_seconds": median_seconds(lambda: index.search(queries, 10), max(1, repeats // 2)),
    }  # fmt: skip


def coarse(table: SampleTable, folder: Path, queries: np.ndarray, repeats: int) -> dict:
    """Build the coarse index, and search it beside the exact one. Normal rows have no near neighbours: a hard case."""
    keeper = IndexKeeper(folder)
    with Clock() as built:
        info = keeper.build(table.snapshot(), read_recipe("coarse_to_fine"))
    index = keeper.fresh(table.snapshot(), name="coarse_to_fine")
    return {
        "build_seconds": built.wall, "recall": info.recall,
        "one_seconds": median_seconds(lambda: index.search(queries[:1], 10), repeats),
        "hundred_seconds": median_seconds(lambda: index.search(queries, 10), max(1, repeats // 2)),
    }  # fmt: skip


def resident(
    table: SampleTable, folder: Path, parts: list[str], queries: np.ndarray, repeats: int, note: Callable[..., None]
) -> None:
    """Search the whole table, held in memory, beside the machine's limits."""
    index = IndexKeeper(folder).fresh(table.snapshot())
    size = 2 * index.width * index.samples
    most = limits(largest_array(index), repeats)
    note("limits", most)
    if "one" in parts:
        seconds = median_seconds(lambda: index.search(queries[:1], 10), 2 * repeats)
        rate = size / seconds / 1e9
        note("one_query", {"seconds": seconds, "gb_per_s": rate, "of_limit": rate / most["memory_gb_per_s"]})
    if "many" in parts:
        seconds = median_seconds(lambda: index.search(queries, 10), repeats)
        rate = size * len(queries) / seconds / 1e9  # two operations for each two bytes
        note("hundred_queries", {"seconds": seconds, "gflop_per_s": rate, "of_limit": rate / most["gemm_gflop_per_s"]})
    note("limits_again", limits(largest_array(index), repeats))
    if "filter" in parts:
        note("filter", filtered(table, index, queries, repeats))


def main() -> None:
    """Measure what is asked for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, help="size of the table [default: half of the memory]")
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, by comma")
    parser.add_argument("--small", action="store_true", help="a small table, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where to put tables [default: a temporary folder]")
    options = parser.parse_args()
    parts, width, repeats = options.only.split(","), 65536, 5
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gib = 0.125 if options.small else options.gib or memory / 2
    count = int(gib * 2**30) // (2 * width)
    queries = queries_of(100, width)
    result: dict = {"command": "scripts/bench search " + " ".join(sys.argv[1:]), "machine": machine()}
    result |= {"samples": count, "width": width, "gib": gib}

    def note(name: str, value: object) -> None:
        result[name] = value
        print(f"{name}: {json.dumps(value)}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        table = SampleTable.create(str(Path(name, "db")), fingerprint(width))
        with Clock() as written:
            fill(table, count, width)
        table.ensure_scalar_indices()
        folder = Path(name, "db", "indexes")
        with Clock() as built:
            IndexKeeper(folder).build(table.snapshot(), read_recipe("cpu"))
        note("write_seconds", {"table": written.wall, "index_build_and_load": built.wall})
        resident(table, folder, parts, queries, repeats, note)
        few = np.concatenate([block.view(np.uint16) for block in vectors_of(min(count, 8192), width)])
        if "peers" in parts:
            note("peers", {"samples": len(few[:4096]), "engines": peers(few[:4096], queries, repeats)})
        if "growth" in parts:
            note("growth", growth(few, repeats))
        manifest = list_manifests(folder)[0]
        files = [folder / "cpu" / f"{part.name}.rows.npy" for part in manifest.parts]
        if "streamed" in parts:
            note("streamed", streamed(folder, files, manifest, queries, 3))
        if "fresh" in parts:
            note("fresh", fresh(table, folder, count, width))
        if "coarse" in parts:
            note("coarse", coarse(table, folder, queries, repeats))
    if not options.small:
        RESULTS.joinpath("search.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
