"""Turn benchmarks/results/tokens.json into docs/tokens.md.

.venv/bin/python benchmarks/report_tokens.py
"""

import json

from common import RESULTS
from report import DOCS, table


def main() -> None:
    """Write the page."""
    found = json.loads((RESULTS / "tokens.json").read_text())
    machine, entries = found["machine"], found["entries"]
    costs = table(
        [
            "theta",
            "tokens a sample",
            "all of it, wall / CPU",
            "gradient of the query",
            "exact scores",
            "all tokens, in forward mode",
        ],
        [
            [
                entry["kind"],
                f"{entry['tokens_a_sample']}",
                f"{entry['wall_ratio']:.2f} / {entry['cpu_ratio']:.2f}",
                f"{entry['direction_ratio']:.2f}",
                f"{entry['exact_ratio']:.2f}",
                f"{entry['forward_ratio']:.2f}",
            ]
            for entry in entries
        ],
    )
    singles = table(
        ["theta", "tokens a sample", "a token, in samples", "token RapidGrads a second"],
        [
            [
                entry["kind"],
                f"{entry['tokens_a_sample']}",
                f"{entry['token_gradient_in_samples']:.2f}",
                f"{entry['token_gradients_per_second']:.0f}",
            ]
            for entry in entries
        ],
    )
    worst = max(entry["largest_error"] / entry["largest_score"] for entry in entries)
    (DOCS / "tokens.md").write_text(
        f"""# What token-wise influence costs

Written by `benchmarks/report_tokens.py` from one run of `{found["command"]}` at commit {machine["commit"]} on {machine["date"]}:
{machine["processor"]}, {machine["threads"]} threads, torch {machine["torch"]}. The machine was shared: trust ratios.

A Llama of some {entries[0]["parameters"] / 1e6:.0f}M parameters, without a prompt: every token of a sample carries loss.

## `--tokens`: the top {entries[0]["samples"]}

Seconds over those of a plain forward and backward over the same {entries[0]["samples"]} samples, in a batch; medians of runs in which all
parts take turns. `all of it` is the query's full gradient, the samples' exact scores, and the scores of all their tokens; on top of
what the search costs. It does not grow with the number of tokens but by the samples' length.

{costs}

The sums of the token scores differed from the samples' exact scores by at most {worst:.0e} of the largest score.

`--matrix`, and so `--html`, takes another backward pass over the generation and another forward-mode pass over the samples for each
generated token.

## `ingest --token-gradients`

What a token's own RapidGrad (width 4,096) costs on top of the sample's, in units of what the sample costs: each token is an
element of a batch, cut off behind it.

{singles}
""",
        "utf-8",
    )


if __name__ == "__main__":
    main()
