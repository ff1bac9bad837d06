"""Turn benchmarks/results/gpu.json and search_gpu.json into docs/gpu.md.

.venv/bin/pip install matplotlib; .venv/bin/python benchmarks/report_gpu.py
"""

import json
from typing import Any

from common import RESULTS
from report import DOCS, table

NAMES = {
    "lora": "LoRA of rank 512 on q, k, v, o over NF4",
    "lora-wide": "LoRA of rank 512 on q, k, v, o over NF4",
    "full": "all parameters, bfloat16",
}


def ran_on(result: dict[str, Any]) -> str:
    """Return the command and the machine of a result, in words."""
    on = result["machine"]
    extra = ", ".join(f"{name} {on[name]}" for name in ("triton", "bitsandbytes", "faiss") if on.get(name))
    return f"`{result['command'].strip()}` at commit {on['commit']} on {on['date']}: one {on['device']}, torch {on['torch']}, {extra}"


def ingest(results: dict[str, Any]) -> str:
    """Return the section on ingesting."""
    rows, checks, steps = [], [], []
    for name, r in results.items():
        rows.append(
            [
                NAMES[name], f"{r['gradient_length']:,}", f"{r['width']:,}", f"{r['samples_per_second']:.1f}",
                f"{r['tokens_per_second']:,.0f}", f"{r['hours']:.2f}", f"{r['paper_hours']:.2f}",
                f"{r['times_faster_than_paper']:.0f}", f"{r['ratio_to_plain_step']:.2f}", f"{r['peak_bytes'] / 2**30:.0f}",
            ]
        )  # fmt: skip
        c = r["check"]
        checks.append(
            [
                f"{NAMES[name]}, K = {r['width']:,}", f"{c['batched_against_autograd_in_the_batch']:.4f}",
                f"{c['batched_against_autograd']:.3f}", f"{c['rounding']:.3f}", f"{c['batch_samples']}",
                f"{r['scatter_against_index_add']:.0e}", "yes" if r["map_as_on_cpu"] else "no", f"{r['given_up']}",
            ]
        )  # fmt: skip
        s, timed = r["seconds"], r["timed"]
        steps.append(
            [
                f"{NAMES[name]}, K = {r['width']:,}", f"{timed['samples']:,}", f"{timed['padded_tokens']:,}", f"{r['batch_tokens']:,}",
                f"{s['plain_step']:.1f}", f"{s['gradients_let_go']:.1f}", f"{s['rapidgrads']:.1f}",
                f"{r['compose_seconds']:.0f}", f"{r['build_seconds']:.0f}",
            ]
        )  # fmt: skip
    ran = "\n".join(f"- {NAMES[name]}, K = {r['width']:,}: {ran_on(r)}" for name, r in results.items())
    return f"""## Making RapidGrads

A model of Llama-2-7B's shape with random weights; samples of random tokens as long as Alpaca's ({next(iter(results.values()))["lengths"]}). Batches
are those that an ingest of 52,000 samples forms; as many as the seconds allowed were timed, spread from the lightest to the heaviest, and
extrapolated by their padded tokens. Loading the model and composing the map are not in the hours, nor is the table: lancedb was not installed there.

{table(["theta", "D", "K", "samples/s", "tokens/s", "hours for 52,000", "the paper's", "times as fast", "of a plain step", "peak GiB"], rows)}

The paper's hours are those of its table for one H100. A plain step is a forward and a backward pass over the same tokens that forms the gradients of all trainable
parameters, as training does; below 1 because losses are had at response tokens alone, and adapters are multiplied under TF32 here and in single precision there.

{ran}

### What was timed

{table(["", "samples", "padded tokens", "tokens a batch", "plain step, s", "gradients let go, s", "RapidGrads, s", "map composed, s", "model made, s"], steps)}

"Gradients let go" forms each sample's gradients and sketches none.

### What was checked

{table(["", "batch against autograd, same batch", "batch against the sample alone", "autograd against itself, among copies", "samples", "scatter against float64", "map as on the CPU", "tensors given up"], checks)}

The first column is what is ours: the same sample's RapidGrad, batched and by autograd, in one batch, where all roundings are the same. The next two are what 16 bits
do: alone, or among copies of itself, a sample of this model has another RapidGrad, by autograd too, for any other order of additions changes all roundings behind it. (Random
weights are a hard case: gradients of queries and keys nearly cancel.)
"""


def search(result: dict[str, Any]) -> str:
    """Return the section on searching."""
    names = {1: "one shard", 2: "two shards"}
    rows, filters = [], []
    for e in result["set_ups"]:
        name = f"{e['library']}, {names[len(e['devices'])]}"
        rows.append(
            [
                name, ", ".join(e["devices"]), f"{e['load_seconds']:.1f}", f"{1000 * e['one_seconds']:.1f}",
                f"{1000 * e['both_ends_seconds']:.1f}", f"{1000 * e['hundred_seconds']:.0f}",
                f"{e['queries_with_the_same_ten']} of 100",
                *([f"{e['rounding']['worst']:.1e} of {e['rounding']['bound']:.1e}"] if "rounding" in e else []),
            ]
        )  # fmt: skip
        filters.append([name, *(f"{1000 * f['seconds']:.1f}" for f in e["filtered"])])
    b = result["beside"]
    head = [
        "searched by",
        "devices",
        "loading, s",
        "one query, ms",
        "both ends, ms",
        "100 queries, ms",
        "the ten best",
        "worst rounding, and its bound",
    ]
    wanted = [f"{100 * f['share']:.0f} %, {f['queries']}" for f in result["set_ups"][0]["filtered"]]
    return f"""## Searching

{result["samples"]:,} RapidGrads of width {result["width"]:,} in half precision ({2 * result["samples"] * result["width"] / 2**30:.1f} GiB) in the memory of one GPU, top 10; medians. A search is all of it: candidates, and
their scores again in float64. With one GPU both shards were on it. The paper tells 6.84 s on two H100s, and 97 s on one.

{table(head[: len(rows[0])], rows)}

The same run: a plain sum over the same bytes {1000 * b["sum_seconds"]:.1f} ms, torch's product with one query in half precision and its best ten {1000 * b["torch_one_seconds"]:.1f} ms, with a
hundred {1000 * b["torch_hundred_seconds"]:.1f} ms: bare products. Of a search for a hundred queries some 0.18 s are scores in float64 on the CPU, as it takes where 1 % of the rows match.
"The ten best" counts the queries whose ten are those of a product in single precision.

Milliseconds under a filter, by the share of the rows that match and the queries:

{table(["searched by", *wanted], filters)}

{ran_on(result)}.
Searches by torch came later, and were not run on a GPU; nor were scaled queries, nor the wider bound of FAISS's rounding, with which a second pass comes more often: expect more time. The file of results was put into the form
that it has by now by hand, its figures as they were. FAISS was the one of the `faiss-gpu` wheel, linked with CUDA 13's cuBLAS (that machine has no other), and without code for other GPUs.
"""


def main() -> None:
    """Write the page."""
    results = {name: json.loads(RESULTS.joinpath(f"{name}.json").read_text("utf-8")) for name in ("gpu", "search_gpu")}
    text = "# On GPUs\n\nWritten by `benchmarks/report_gpu.py` from what `scripts/bench gpu` and `scripts/bench search_gpu` measured.\n\n"
    DOCS.joinpath("gpu.md").write_text(text + ingest(results["gpu"]) + "\n" + search(results["search_gpu"]), "utf-8")


if __name__ == "__main__":
    main()
