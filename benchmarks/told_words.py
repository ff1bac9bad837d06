"""What a plain search for the wrong name finds in error tracing's published corpus: it needs no model's weights.

scripts/bench told_words --data shared/data

`--data` is that of scripts/bench experiments. The tokenizer decides which records fit, so it is trained anew, on the
same records; the corpus has to come out as published, or nothing is written.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from common import HERE, RESULTS, machine
from experiments import BASE, PAGES, TRACED, records

from rapidin_vdb.corpus import load_template
from rapidin_vdb.evaluate import methods, metrics
from rapidin_vdb.evaluate.corpora import wrong_name
from rapidin_vdb.evaluate.error_tracing import KS, traced_records
from rapidin_vdb.evaluate.profiles import PROFILES
from rapidin_vdb.evaluate.scoring import CONTAINING, TOLD_BM25
from rapidin_vdb.gradient.training import train_tokenizer

sys.path.insert(0, str(HERE.parent / "scripts"))
from pretrain import HELD_OUT, texts_of

DRAWS = 200
"""Orders of ties over which the figures of `CONTAINING` are means."""


def main() -> None:
    """Build the corpus anew, see that it is the published one, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    (published,) = (
        result
        for result in json.loads((PAGES / "results.json").read_text("utf-8"))
        if result["experiment"] == "error-tracing"
    )
    texts = texts_of([*(records(data, name) for name in BASE), data / "tinystories.jsonl"], seed=1)
    tokenizer = train_tokenizer(texts[HELD_OUT:], vocabulary=4096)
    made = traced_records(
        [records(data, name) for name in TRACED], tokenizer=tokenizer, template=load_template("alpaca"),
        profile=PROFILES[published["profile"]], seed=published["seed"],
    )["records"]  # fmt: skip
    kinds = np.array([record["perturbed"] or "" for record in made])
    found = {title: int((kinds == title).sum()) for title in published["perturbed"]}
    if (len(made), found) != (published["samples"], published["perturbed"]):
        raise SystemExit(f"{len(made)} records, of which {found}: not the published corpus, {published['perturbed']}")
    responses = [record["output"] for record in made]
    at: dict[str, dict[str, dict[str, float]]] = {TOLD_BM25: {}, CONTAINING: {}}
    naming = {}
    for title in found:
        told, positive = [[wrong_name(title)]], kinds == title
        scores = {
            TOLD_BM25: [methods.bm25_scores(responses, [" ".join(told[0])])[0][0]],
            CONTAINING: [methods.containing_scores(responses, told, seed=seed)[0] for seed in range(DRAWS)],
        }
        naming[title] = int((scores[CONTAINING][0] >= 1).sum())
        for name, rows in scores.items():
            at[name][title] = {
                str(k): float(np.mean([metrics.average_precision_at(row, positive, k) for row in rows])) for k in KS
            }
    result = {
        "made": {"command": "`scripts/bench told_words --data DATA`", **machine()},
        "samples": len(made),
        "perturbed": found,
        "responses_with_the_name": naming,
        "orders_of_ties": DRAWS,
        "methods": at,
    }
    (RESULTS / "told_words.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (PAGES / "told-words.md").write_text(page(result, published), "utf-8")


def page(result: dict, published: dict) -> str:
    """Return the tables, beside the published figures of token-wise methods, and what they mean."""
    made, titles = result["made"], result["perturbed"]
    token_wise = {name: entry for name, entry in published["methods"].items() if name.endswith("token-wise")}
    naming = result["responses_with_the_name"]
    counts = ", ".join(
        f"{wrong_name(title)}: {naming[title]} responses, {titles[title]} of them perturbed" for title in titles
    )
    lines = [
        "# Error tracing: what the wrong name alone finds",
        f"Made with {'; '.join(f'{name} {value}' for name, value in made.items())}.",
        "**A plain search for the wrong name among the responses finds the perturbed samples better than token-wise "
        "RapidIn does in [error tracing](report.md).** Token-wise RapidIn is told which words of the generation are "
        "asked about: the wrong name. Here baselines are told it too: BM25 with the name as the query and the "
        "responses as documents, and the samples whose responses contain it as a whole word, in an order drawn at "
        f"random (means over {result['orders_of_ties']} orders). They need no model.",
        "What that means: RapidIn is not told which string to look for in the samples. Its focus is on the tokens of "
        "the generation; that the samples hold the same name is what it found out, and where a model says something in "
        "other words than its training data, there is no string to search for. But in this experiment the fault is a "
        f"string, which stands in every perturbed sample and in few others ({counts}), and the string gives it away. "
        "So error tracing shows that token-wise scores find much that scores of whole generations miss; it does not "
        "show that gradients are needed to find these samples.",
        "Average precision of the samples with the same wrong name among the k highest. Each name is one query of its "
        "own to the baselines, so that they have no interval; RapidIn's figure is a mean over generations.",
    ]
    for title in titles:
        rows = [[name, *(f"{entry[title][str(k)]:.3f}" for k in KS)] for name, entry in result["methods"].items()]
        rows += [[name, *(f"{entry['at'][title][str(k)][0]:.3f}" for k in KS)] for name, entry in token_wise.items()]
        head = ["method", *(f"k = {k}" for k in KS)]
        table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        lines += [f"## {title}", "\n".join(table)]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
