"""Turn benchmarks/results/ingest.json into docs/ingest.md and docs/ingest.svg.

.venv/bin/pip install matplotlib; .venv/bin/python benchmarks/report.py
"""

import json
from pathlib import Path

from common import RESULTS

DOCS = Path(__file__).parent.parent / "docs"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def beside_peer(entries: list[dict]) -> str:
    """Return the section on bergson, or nothing where it was not measured."""
    if not entries:
        return ""

    def both(entry: dict, key: str) -> str:
        return f"{entry[key]['wall']:.2f} / {entry[key]['cpu']:.2f}"

    ratios = table(
        ["theta", "bergson / plain step, wall / CPU", "ours / plain step", "ours / bergson", "ours / bergson without its drawing", "plain step, our process / its"],
        [
            [entry["kind"]] + [
                both(entry, key)
                for key in ("bergson_ratio", "ours_ratio", "ours_to_bergson", "ours_to_bergson_prepared", "plain_to_plain")
            ]
            for entry in entries
        ],
    )  # fmt: skip
    stored = table(
        ["theta", "", "s a sample, wall / CPU", "numbers a sample", "bytes a sample on disk", "parameters seen"],
        [
            [
                entry["kind"], side, both(entry, f"{side}_seconds_a_sample"), f"{entry['numbers_a_sample'][side]:,}",
                f"{entry['bytes_a_sample'][side]:,.0f}", f"{seen:,} of {entry['parameters']:,}",
            ]
            for entry in entries
            for side, seen in (("bergson", entry["parameters_bergson_sees"]), ("ours", entry["parameters"]))
        ],
    )  # fmt: skip
    versions = entries[0]["versions"]
    rounds = " and ".join(f"{len(entry['runs'])} ({entry['kind']})" for entry in entries)
    return f"""## Beside bergson

[bergson](https://github.com/EleutherAI/bergson) {versions["bergson"]} stores a random projection of every sample's gradient too. Its `build`
runs in an environment of its own (torch {versions["torch"]}, transformers {versions["transformers"]}, as ours), on the same model, tokens and batches, in float32, without
loading the model: reading the tokens, gradients, projection, writing the index. Processes of the two take turns, each with a plain
step of its own; medians of {rounds} rounds. bergson draws its projection matrices in every build; our map is composed when a database is opened, which
is not counted, so one column leaves that drawing out.

{ratios}

{stored}

The two do not compute the same. bergson projects a layer's input and its output's gradient to 32 (LoRA) or 34 (full) dimensions each and
multiplies the results: a product-structured sketch, for which no weight gradient is ever formed. For all parameters that is what it saves: the plain step
forms weight gradients, and so must a RapidGrad, which is a sketch of every coordinate of the gradient normalised by layer. bergson takes linear layers
below the head only: no embedding, head or norms. It takes each sample's summed loss, does not normalise by layer, and stores float32;
we store half precision.

"""


def write(result: dict) -> str:
    """Return the page."""
    machine = result["machine"]
    ratios = table(
        ["theta", "coordinates", "ingest / plain step, wall", "CPU", "samples a second", "the slow way, s a sample", "times faster"],
        [
            [
                entry["kind"], f"{entry['gradient_length']:,}", f"{entry['wall_ratio']:.2f}", f"{entry['cpu_ratio']:.2f}",
                f"{entry['samples_per_second']:.1f}", f"{entry['slow_way_seconds_a_sample']:.2f}",
                f"{entry['times_faster_than_slow_way']:.1f}",
            ]
            for entry in result["ratio"]
        ],
    )  # fmt: skip
    samples = table(
        ["samples", "peak MiB", "seconds"],
        [[f"{e['samples']:,}", f"{e['peak_mib']:,.0f}", f"{e['seconds']:.1f}"] for e in result["memory_by_samples"]],
    )
    batch = table(
        ["tokens a batch", "peak MiB", "MiB before the first batch"],
        [
            [f"{e['batch_tokens']:,}", f"{e['peak_mib']:,.0f}", f"{e['before_mib']:,.0f}"]
            for e in result["memory_by_batch"]
        ],
    )
    scaling = table(
        ["coordinates D", "lambda", "width K", "s a batch", "s a plain step", "ratio", "s for init"],
        [
            [
                f"{e['gradient_length']:,}", str(e["shuffles"]), f"{e['width']:,}", f"{e['batch_seconds']:.2f}",
                f"{e['plain_seconds']:.2f}", f"{e['ratio']:.2f}", f"{e['init_seconds']:.1f}",
            ]
            for e in result["scaling"]
        ],
    )  # fmt: skip
    return f"""# What ingest costs

Written by `benchmarks/report.py` from one run of `{result["command"].strip()}` at commit {machine["commit"]} on {machine["date"]}:
{machine["processor"]}, {machine["threads"]} threads, torch {machine["torch"]}. The machine was shared: trust ratios.

![ratio of ingest to a plain step, and peak memory](ingest.svg)

## Beside a plain training step

A Llama of 33.7 million parameters (hidden 512, 8 layers, vocabulary 8,192), batches of 16 samples of 128 tokens, width 65,536,
lambda 20. *Ingest* is everything but loading the model: reading and checking the records, tokens, gradients, sketch, commit.
*Plain* is one forward and backward over the same batches, with gradients of the trainable parameters, no optimizer. Medians of
three runs that alternate the two. LoRA is of rank 16 on q, k, v, o. The slow way takes one sample at a time and makes 2 * lambda
permuted copies of its gradient; it gives the same RapidGrads (checked in the run). With a LoRA of rank 16 even a plain step takes
about half as long as the slow way: no ingest could be five times faster. *r = 512* is the paper's rank, on the same layers.

{ratios}

What is likely to keep LoRA cheap: a gradient is formed of nothing but the adapter's matrices, and logits are computed
at tokens with a loss alone, which makes room for the sketch and the commit. What a full-parameter ingest pays beyond a plain step is one pass over every sample's
gradient of every tensor, where training needs only their sum.

{beside_peer(result.get("peer", []))}## Memory

By the number of samples (Llama of 2 layers, LoRA, 2,048 tokens a batch, 32-token samples, width 8,192): a commit holds at most
64 MiB of RapidGrads, of which these 16,000 samples have 262 MB.

{samples}

By the batch (the 33.7M Llama, all parameters, 64 samples of 128 tokens, width 65,536):

{batch}

## Time against lambda, K and D

Batches of 16 x 128 tokens; the map is composed when a model is loaded, and kept where memory has room for it, so that lambda costs nothing afterwards.

{scaling}
"""


def plot(result: dict, path: Path) -> None:
    """Draw the ratios and the memory."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = [entry["kind"] for entry in result["ratio"]]
    for offset, key, label in ((-0.2, "wall_ratio", "wall"), (0.2, "cpu_ratio", "CPU")):
        bars = left.bar([n + offset for n in range(len(names))], [e[key] for e in result["ratio"]], 0.38, label=label)
        left.bar_label(bars, fmt="%.2f")
    left.axhline(1, color="black", linewidth=0.8)
    left.set_xticks(range(len(names)), names)
    left.set_ylabel("ingest / plain forward + backward")
    left.margins(y=0.15)
    left.legend(frameon=False)
    by_samples = result["memory_by_samples"]
    right.plot([e["samples"] for e in by_samples], [e["peak_mib"] for e in by_samples], marker="o")
    right.set_xticks([e["samples"] for e in by_samples], [f"{e['samples']:,}" for e in by_samples])
    right.set_xlabel("samples")
    right.set_ylabel("peak memory, MiB")
    right.set_ylim(0, 1.15 * max(e["peak_mib"] for e in by_samples))
    figure.savefig(path)


def main() -> None:
    """Write both."""
    result = json.loads((RESULTS / "ingest.json").read_text("utf-8"))
    (DOCS / "ingest.md").write_text(write(result), "utf-8")
    plot(result, DOCS / "ingest.svg")


if __name__ == "__main__":
    main()
