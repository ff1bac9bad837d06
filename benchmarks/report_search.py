"""Turn benchmarks/results/search.json into docs/search.md and docs/search.svg.

.venv/bin/pip install matplotlib; .venv/bin/python benchmarks/report_search.py
"""

import json

from common import RESULTS
from report import DOCS, table


def write(result: dict) -> str:
    """Return the page."""
    machine, limits, again = result["machine"], result["limits"], result["limits_again"]
    most = {key: max(limits[key], again[key]) for key in limits}
    one, many, streamed, fresh = (result[key] for key in ("one_query", "hundred_queries", "streamed", "fresh"))
    filters = table(
        ["samples that match", "queries", "seconds", "of them LanceDB's filter", "of the unfiltered time"],
        [
            [
                f"{100 * e['share']:.1f} %", str(e["queries"]), f"{e['seconds']:.3f}", f"{e['filter_seconds']:.3f}",
                f"{100 * e['of_unfiltered']:.1f} %",
            ]
            for e in result["filter"]
        ],
    )  # fmt: skip
    peers = table(
        ["engine", "one query, ms", "100 queries, s"],
        [
            [e["engine"], f"{1000 * e['one_seconds']:.0f}", "" if e["hundred_seconds"] is None else f"{e['hundred_seconds']:.2f}"]
            for e in result["peers"]["engines"]
        ],
    )  # fmt: skip
    growth = table(
        ["samples", "width", "GiB", "one query, ms", "100 queries, s"],
        [
            [
                f"{e['samples']:,}", f"{e['width']:,}", f"{e['gib']:.2f}", f"{1000 * e['one_seconds']:.1f}",
                f"{e['hundred_seconds']:.2f}",
            ]
            for e in result["growth"]
        ],
    )  # fmt: skip
    recall = result["coarse"]["recall"]
    return f"""# What search costs

Written by `benchmarks/report_search.py` from one run of `{result["command"].strip()}` at commit {machine["commit"]} on {machine["date"]}:
{machine["processor"]}, {machine["threads"]} threads, torch {machine["torch"]}. The machine was shared: trust ratios.

![share of the machine's limits, and time by samples](search.svg)

{result["samples"]:,} RapidGrads of width {result["width"]:,} in half precision: {result["gib"]:.1f} GiB, held in memory, recipe `cpu.toml`; top 10. Rows and queries are
normal numbers. Medians, after one call that is not counted. A search is all of it: scan, candidates, and their scores again in float64.

| | seconds | rate | the machine's limit, in the same run | share |
| --- | --- | --- | --- | --- |
| one query | {one["seconds"]:.3f} | {one["gb_per_s"]:.1f} GB/s | {most["memory_gb_per_s"]:.1f} GB/s: a plain sum over the same bytes, all cores | {100 * one["gb_per_s"] / most["memory_gb_per_s"]:.0f} % |
| 100 queries | {many["seconds"]:.2f} | {many["gflop_per_s"]:.0f} GFLOP/s | {most["gemm_gflop_per_s"]:.0f} GFLOP/s: float32 matrix product, 4096 x 4096 x 4096 | {100 * many["gflop_per_s"] / most["gemm_gflop_per_s"]:.0f} % |

The limits were measured before these two ({limits["memory_gb_per_s"]:.1f} GB/s, {limits["gemm_gflop_per_s"]:.0f} GFLOP/s) and after them ({again["memory_gb_per_s"]:.1f}, {again["gemm_gflop_per_s"]:.0f}); the higher one counts.

## Filters

`source = ...` with the scalar index that `index` makes; the time includes LanceDB's.

{filters}

## Streamed from disk

The same rows in {streamed["gib"]:.1f} GiB of files, put out of the page cache before each pass as far as the system agreed. Reading alone:
{streamed["raw_gb_per_s"]:.2f} GB/s. One query: {streamed["one_query_gb_per_s"]:.2f} GB/s ({100 * streamed["one_of_raw"]:.0f} %); 100 queries: {streamed["hundred_queries_gb_per_s"]:.2f} GB/s ({100 * streamed["hundred_of_raw"]:.0f} %), bounded by arithmetic.
More than 100 % says that what lies below the page cache served one pass faster than another (see the log).
With the files in the page cache (those that fit): {streamed["cached_one_gb_per_s"]:.2f} GB/s of {streamed["cached_raw_gb_per_s"]:.2f}.

## Fresh

Writing the table took {result["write_seconds"]["table"]:.0f} s, building the index and loading it {result["write_seconds"]["index_build_and_load"]:.0f} s. Opening it: {fresh["open_seconds"]:.2f} s into memory, {fresh["open_mapped_seconds"]:.2f} s
mapped. {fresh["new_rows"]:,} new rows (1 %) reach an index in memory in {fresh["update_in_memory_seconds"]:.2f} s, and one on disk in {fresh["update_on_disk_seconds"]:.2f} s.

## Coarse to fine

Building took {result["coarse"]["build_seconds"]:.0f} s, recall at {recall["at"]} is {100 * recall["recall"]:.0f} % (normal rows have no near neighbours, which is the hardest case; the figure of
your own database is printed by `index`). One query {1000 * result["coarse"]["one_seconds"]:.0f} ms, 100 queries {result["coarse"]["hundred_seconds"]:.2f} s.

The share is measured at both ends: of the best 10, and of the most negative 10, for up to 32 samples of the database as
queries, each beside itself. Of fewer than 10 results as many candidates are scored again as of 10.
A ranking of such an index says it in its `note`, for the end that was asked for, for it may lack samples. Where as many
candidates are scored again as there are samples to rank, none can be missing, and nothing is said.

## Beside FAISS and LanceDB

The same {result["peers"]["samples"]:,} rows, in memory; LanceDB reads its table from the page cache, and takes one query at a time.

{peers}

## Growth

{growth}

What it costs on GPUs is in [gpu.md](gpu.md).
"""


def plot(result: dict, path) -> None:
    """Draw the shares of the machine's limits, and growth."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    most = {key: max(result["limits"][key], result["limits_again"][key]) for key in result["limits"]}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    shares = {
        "one query\n(memory)": result["one_query"]["gb_per_s"] / most["memory_gb_per_s"],
        "100 queries\n(matrix product)": result["hundred_queries"]["gflop_per_s"] / most["gemm_gflop_per_s"],
    }
    bars = left.bar(list(shares), [100 * share for share in shares.values()], 0.6)
    left.bar_label(bars, fmt="%.0f %%")
    left.axhline(100, color="black", linewidth=0.8)
    left.set_ylabel("% of the machine's limit")
    left.margins(y=0.15)
    wide = [entry for entry in result["growth"] if entry["width"] == result["width"]]
    for key, label in (("one_seconds", "one query"), ("hundred_seconds", "100 queries")):
        right.plot([e["samples"] for e in wide], [e[key] for e in wide], marker="o", label=label)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks([e["samples"] for e in wide], [f"{e['samples']:,}" for e in wide])
    right.minorticks_off()
    right.set_xlabel("samples")
    right.set_ylabel("seconds")
    right.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Write both."""
    result = json.loads((RESULTS / "search.json").read_text("utf-8"))
    (DOCS / "search.md").write_text(write(result), "utf-8")
    plot(result, DOCS / "search.svg")


if __name__ == "__main__":
    main()
