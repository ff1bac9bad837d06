"""What a database costs at sizes that nobody measured: a small model, fed with what was measured. Writes docs/scale.md.

.venv/bin/python benchmarks/scale.py
"""

import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "scale.md"
TIB = 2**40

# Nobody measured these here: what the machines of a cluster are taken to be.
NODE_MEMORY, NODE_MEMORY_RATE = 0.8 * TIB, 300e9  # a server of 1 TiB, of which an index may take 80 %
GPU_MEMORY, GPU_MEMORY_RATE = 0.9 * 141e9, 0.8 * 4.8e12  # an H200
GPU_FLOPS = 0.4 * 989e12  # an H100 or H200 in bfloat16; the share of it that a training step reaches
STORE_RATE = 2e9  # bytes a second that a node reads from an object store
ANSWER_SECONDS = 2.0  # what somebody waits for
FLEET = 100  # nodes that somebody may have

# In a temporary file: an id of 32 letters with two content hashes (page_count * page_size of 300,000, in no order). In
# memory: an index's row id, version and mark, and the order by row id (a query with a streamed index, docs/faults.md).
PLAN_ENTRY, KEY_ENTRY = 121, 35
# What a row weighs as it waits besides its vector, at 300 tokens of which half are the response's (rapidin_vdb/ingest.py).
WAITING = 2048 + 300 * 36 + 150 * 120
COMMIT = 64 * 2**20  # what an ingest writes at once
FRAGMENT = 139  # what a fragment takes in the manifest of every later version: measured, 13 columns


@dataclass(frozen=True)
class Measured:
    """What the benchmarks found on two cores."""

    row_overhead: float
    """Bytes of a row besides its vector."""
    scan_rate: float
    """Bytes of an index in memory that one query passes in a second."""
    product_rate: float
    """Floating-point operations a second of a search with many queries."""
    gemm_rate: float
    """The same of a plain matrix product."""
    stream_rate: float
    """Bytes a second from disk."""
    write_rate: float
    """Bytes a second into a table, commit and all."""
    ratio: dict[str, float]
    """Ingest over a plain training step, by what theta is."""


def load(results: Path = HERE / "results") -> Measured:
    """Return what the benchmarks found."""
    search, ingest = (json.loads((results / f"{name}.json").read_text()) for name in ("search", "ingest"))
    ours = next(entry for entry in ingest["peer"] if entry["kind"] == "lora")
    limits = (search["limits"]["gemm_gflop_per_s"], search["limits_again"]["gemm_gflop_per_s"])
    return Measured(
        row_overhead=ours["bytes_a_sample"]["ours"] - 2 * 65536,
        scan_rate=search["one_query"]["gb_per_s"] * 1e9,
        product_rate=search["hundred_queries"]["gflop_per_s"] * 1e9,
        gemm_rate=sum(limits) / 2 * 1e9,
        stream_rate=search["streamed"]["one_query_gb_per_s"] * 1e9,
        write_rate=search["gib"] * 2**30 / search["write_seconds"]["table"],
        ratio={entry["kind"]: entry["wall_ratio"] for entry in ingest["ratio"]},
    )


def table_bytes(measured: Measured, samples: float, width: int) -> float:
    """Return what the table takes on disk."""
    return samples * (2 * width + measured.row_overhead)


def index_bytes(samples: float, width: int) -> float:
    """Return what an index takes, in memory or on disk."""
    return samples * 2 * width


def scan_seconds(samples: float, width: int, *, rate: float, share: float = 1.0) -> float:
    """Return how long one query takes, among a share of the samples."""
    return share * index_bytes(samples, width) / rate


def product_seconds(samples: float, width: int, queries: int, *, rate: float, share: float = 1.0) -> float:
    """Return how long many queries together take: they are bounded by arithmetic."""
    return share * 2 * samples * width * queries / rate


def step_flops(parameters: float, tokens: float, *, adapter: bool) -> float:
    """Return the arithmetic of a plain forward and backward; of an adapter, no gradient of the base is formed."""
    return (4 if adapter else 6) * parameters * tokens


def gradient_seconds(measured: Measured, parameters: float, tokens: float, *, adapter: bool, rate: float) -> float:
    """Return how long a sample's RapidGrad takes."""
    return step_flops(parameters, tokens, adapter=adapter) * measured.ratio["lora" if adapter else "full"] / rate


def checks(measured: Measured, results: Path = HERE / "results") -> list[tuple[str, float, float]]:
    """Return what the model says beside what was measured, where it was not fed with that very figure."""
    search, ingest = (json.loads((results / f"{name}.json").read_text()) for name in ("search", "ingest"))
    found = []
    for entry in search["growth"]:
        samples, width, what = entry["samples"], entry["width"], f"{entry['samples']:,} rows x {entry['width']:,}"
        found.append(
            (f"one query, {what}", scan_seconds(samples, width, rate=measured.scan_rate), entry["one_seconds"])
        )
        found.append((f"100 queries, {what}", product_seconds(samples, width, 100, rate=measured.product_rate), entry["hundred_seconds"]))  # fmt: skip
    for entry in search["filter"]:
        if entry["share"] < 0.3:
            continue  # of few rows, what a search costs besides counts
        among = search["samples"], search["width"]
        predicted = (
            scan_seconds(*among, rate=measured.scan_rate, share=entry["share"])
            if entry["queries"] == 1
            else product_seconds(*among, entry["queries"], rate=measured.product_rate, share=entry["share"])
        )
        found.append((f"{entry['queries']} queries among {entry['share']:.0%}", predicted, entry["seconds"]))
    # What share of the rate of products a step reaches is taken on trust, for GPUs: a time is predicted from the other.
    made = {entry["kind"]: entry for entry in ingest["ratio"]}
    lora, full = (
        gradient_seconds(measured, made[kind]["parameters"], 128, adapter=kind == "lora", rate=measured.gemm_rate)
        for kind in ("lora", "full")
    )
    seconds = {kind: 1 / entry["samples_per_second"] for kind, entry in made.items() if kind in ("lora", "full")}
    found.append(("a RapidGrad, all parameters, by LoRA's", seconds["lora"] * full / lora, seconds["full"]))
    return found


def nodes_for(samples: float, width: int, memory: float) -> int:
    """Return how many machines hold an index in memory."""
    return max(1, -int(-index_bytes(samples, width) // memory))


def size(count: float) -> str:
    """Return bytes as one reads them."""
    for unit, step in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if count >= step:
            return f"{count / step:,.1f} {unit}"
    return f"{count / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Return seconds as one reads them."""
    if seconds < 1:
        return f"{1000 * seconds:,.0f} ms"
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def exact_nodes(samples: float, width: int) -> int:
    """Return how many nodes hold the rows of an index in memory and pass over them in time."""
    bytes_ = index_bytes(samples, width)
    return max(nodes_for(samples, width, NODE_MEMORY), -int(-bytes_ // (ANSWER_SECONDS * NODE_MEMORY_RATE)))


SAMPLES = (10**6, 10**8, 10**10)
WIDTHS = (4096, 65536, 2**20)
FOLDS = (4096, 2048, 1024)  # 4,096 is what the recipe coarse_to_fine has


def on_gpu(measured: Measured) -> str:
    """Return what was measured on a GPU beside what the model says of it."""
    file = HERE / "results" / "gpu.json"
    if not file.is_file():
        return "None of this was measured on a GPU."
    found = json.loads(file.read_text("utf-8"))
    said = []
    for name, what in (("lora", "LoRA of rank 512 over NF4"), ("full", "all parameters")):
        run = found[name]
        was = 300 * run["seconds_a_padded_token"] + run["seconds_a_sample"]
        model = gradient_seconds(measured, 6.74e9, 300, adapter=name == "lora", rate=GPU_FLOPS)
        said.append(f"{duration(was)} ({what}), where the model has {duration(model)}")
    device = found["lora"]["machine"]["device"]
    return f"On one {device} a model of Llama-2-7B's shape took, by a fit to batches of all lengths ([gpu.md](gpu.md)), {'; and '.join(said)}."


def page(measured: Measured) -> str:
    """Return docs/scale.md."""
    power = {10**6: "10^6", 10**8: "10^8", 10**10: "10^10"}
    storage, search, fleet = [], [], []
    for samples in SAMPLES:
        for width in WIDTHS:
            bytes_ = index_bytes(samples, width)
            nodes, gpus = nodes_for(samples, width, NODE_MEMORY), nodes_for(samples, width, GPU_MEMORY)
            storage.append(
                [power[samples], f"{width:,}", size(table_bytes(measured, samples, width)),
                 duration(table_bytes(measured, samples, width) / measured.write_rate)]
            )  # fmt: skip
            search.append(
                [power[samples], f"{width:,}", duration(scan_seconds(samples, width, rate=measured.scan_rate)),
                 f"{nodes:,}", duration(bytes_ / nodes / NODE_MEMORY_RATE), f"{gpus:,}",
                 duration(bytes_ / gpus / GPU_MEMORY_RATE), duration(bytes_ / FLEET / STORE_RATE)]
            )  # fmt: skip
            wanted = exact_nodes(samples, width)
            folded = next(fold for fold in FOLDS if exact_nodes(samples, fold) <= FLEET)
            fleet.append(
                [power[samples], f"{width:,}", f"{wanted:,}", "yes" if wanted <= FLEET else "no",
                 "" if wanted <= FLEET else f"{folded:,} on {exact_nodes(samples, folded):,}"]
            )  # fmt: skip
    making = []
    for name, parameters in (("1B", 1e9), ("7B", 7e9), ("70B", 70e9)):
        for adapter in (True, False):
            each = gradient_seconds(measured, parameters, 300, adapter=adapter, rate=GPU_FLOPS)
            making.append(
                [name, "LoRA" if adapter else "all", duration(each), *(f"{samples * each / 3600:,.0f}" for samples in SAMPLES)]
            )  # fmt: skip
    versions = 1e8 * (2 * 65536 + WAITING) / COMMIT
    seven = gradient_seconds(measured, 7e9, 300, adapter=True, rate=GPU_FLOPS)
    checked = [[what, duration(said), duration(was), f"{said / was:.2f}"] for what, said, was in checks(measured)]
    return f"""# What it costs at scale

Written by `benchmarks/scale.py`: a small model of costs, fed with what `scripts/bench search` and `scripts/bench ingest` measured on two
cores. Nothing beyond 10^5 samples was run. What the model takes from those runs: a row takes {measured.row_overhead:,.0f} bytes besides its
vector; one query passes {measured.scan_rate / 1e9:.1f} GB/s of an index in memory; many queries together do {measured.product_rate / 1e9:.0f} GFLOP/s; a table is written at
{measured.write_rate / 1e9:.2f} GB/s; making a RapidGrad costs {measured.ratio["lora"]:.2f} (LoRA) or {measured.ratio["full"]:.2f} (all parameters) plain training steps.

What it takes on trust, since it was not measured: a node of 1 TiB, of which an index takes 80 %, read at {NODE_MEMORY_RATE / 1e9:.0f} GB/s; an H200 of
{GPU_MEMORY / 1e9:.0f} GB for an index, read at {GPU_MEMORY_RATE / 1e12:.1f} TB/s; {GPU_FLOPS / 1e12:.0f} TFLOP/s of an H100 or H200 in bfloat16 (40 % of its peak); {STORE_RATE / 1e9:.0f} GB/s a node
from an object store. Change them at the head of the script.

## Storage

The index on disk or in memory takes as much again. Writing is by one process, the only one that commits; on a cluster it is the driver. The rate is
that of a local disk: how fast one process writes into an object store was never measured.

{table(["samples", "width K", "table", "written in"], storage)}
## Making RapidGrads

Hours of one GPU, at 300 tokens a sample; K does not count (the sketch is a few per cent of a step, and in the ratio above).

{table(["model", "theta", "a sample", *(f"GPU hours, {power[samples]}" for samples in SAMPLES)], making)}

{on_gpu(measured)}
## One query, exact

Seconds for the pass over the index; a query's own gradient is one training step more. Many queries in one file share the pass until
arithmetic binds them: on the two cores from about {measured.product_rate / measured.scan_rate:.0f} queries on.

{table(["samples", "width K", "two cores, in memory", "nodes that hold it", "on these", "GPUs that hold it", "on these", f"{FLEET} nodes, read from the store"], search)}
## When exact search ends

How many nodes hold all rows in memory and pass over them within {ANSWER_SECONDS:.0f} s, and whether somebody with {FLEET} of them can ask exactly.

{table(["samples", "width K", "nodes for an exact answer", f"possible with {FLEET}", "else: rows folded to a width, on so many nodes"], fleet)}
The last column is the widest of the folds 4,096, 2,048 and 1,024 whose rows such nodes hold and pass over in the same time. The code cannot do it yet: an index that is coarse to fine
(folded rows in memory, candidates scored at full width from disk) is of one machine, and `query --cluster` is exact only and takes no `--index`. What share of the
exact answer it finds depends on the data (`index` measures and says it), and the narrower the fold, the less. Where that is too little, a smaller K at `init` is the honest
choice, or rows read from disk or the store, which takes as long as the last column of the section before says.

## Where the bottleneck moves

- **Making** dominates everything as long as samples are made once and asked seldom: of a 7B model with LoRA, 10^8 samples take
  {1e8 * seven / 3600:,.0f} GPU hours; passing over all of them at K = 65,536 once takes a hundred nodes {duration(index_bytes(1e8, 65536) / 100 / NODE_MEMORY_RATE)}.
- **The writer.** One process writes {measured.write_rate / 1e9:.2f} GB/s, or {measured.write_rate / (2 * 65536):,.0f} samples a second at K = 65,536. A GPU makes {1 / seven:,.0f} a second of a 7B
  model with LoRA: the driver keeps up with {measured.write_rate / (2 * 65536) * seven:,.0f} GPUs at K = 65,536, and with {measured.write_rate / (2 * 2**20) * seven:,.0f} at K = 2^20, if it does nothing else. But it is one
  thread, which also hands out batches and takes in answers; while it commits, each worker has one batch more to go on with, and then waits. Beyond that,
  workers would have to write fragments themselves, and the driver only commit them.
- **Versions.** A commit is made every {COMMIT // 2**20} MiB, of vectors and what waits with them: {versions:,.0f} of them for 10^8 samples at K = 65,536. Each adds a fragment, and its manifest names all
  that were there before, at {FRAGMENT} bytes each: {size(versions * FRAGMENT)} a commit at the end, and {size(versions**2 / 2 * FRAGMENT)} of manifests in all. Nothing puts fragments together
  while an ingest goes on; `delete --purge` does, and drops older versions with their manifests. At this size commits would have to be larger, or
  compacted on the way.
- **Memory** is what exact search ends at: 10^8 samples at K = 65,536 are {size(index_bytes(1e8, 65536))}.
- **The list of ids.** A plan keeps every id with its content hashes in a temporary file, at up to {PLAN_ENTRY} bytes each, and the keys of an index take {KEY_ENTRY} in memory,
  its ids besides on disk: for 10^8 samples {size(1e8 * PLAN_ENTRY)} of disk in the process that ingests, and {size(1e8 * KEY_ENTRY)} of memory in those that search (on a cluster, each
  node its share); for 10^10 a hundred times that. At 10^10, one table has to become several databases, asked one by one.

## The model beside what was measured

A RapidGrad's time with all parameters is predicted from that with LoRA: which share of the rate of matrix products a training step reaches is
not among these, for a CPU's says nothing of a GPU's. What a search costs whatever the size is not in the model: small tables take longer than it says.

{table(["what", "model", "measured", "model / measured"], checked)}"""


if __name__ == "__main__":
    PAGE.write_text(page(load()), "utf-8")
    print(f"wrote {PAGE}")
