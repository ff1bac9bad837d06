"""The tables and plots of experiments, as Markdown and SVG, from their figures alone."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rapidin_vdb.evaluate import paper, remarks, sections
from rapidin_vdb.evaluate.backdoor import SHARE
from rapidin_vdb.evaluate.plots import plot
from rapidin_vdb.evaluate.profiles import KS, PROFILES
from rapidin_vdb.evaluate.provenance import said
from rapidin_vdb.evaluate.scoring import CONTAINING, TOLD_BM25
from rapidin_vdb.evaluate.tables import auroc, cell, figure, portion, rest, table

Result = dict[str, Any]
_TRACED = (("proportion", "share of the k highest (the paper's Table 5)"), ("average_precision", "average precision"))
_AP = (
    "The paper's AP is the average over generations of the share, among the k highest, of samples with the same wrong name. "
    "Average precision, in further tables, also asks for their order."
)
_ENDS = ", of the k highest and k lowest samples (the paper's Tables 4 and 11)"


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Write `results.json`, `report.md` and the plots into a folder; return the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(_plain(results), indent=1, allow_nan=False) + "\n", "utf-8")
    parts = [
        "# Experiments",
        "Figures of methods are means over generations with their 95 % bootstrap intervals in brackets. One model, one seed and one draw of each sketch (smaller K are folded from the largest): "
        "what another training run, or another draw, would change is not in the intervals. One without width says that no generation differed, not that none ever would.",
    ]
    for result in results:
        if result["experiment"] == "backdoor":
            plot(result, folder)
            parts += [_backdoor(result)]
        else:
            parts += [_error_tracing(result)]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", "utf-8")
    return path


def _plain(value: Any) -> Any:
    """Return what JSON has: null in the place of NaN, which it has not.

    >>> _plain([{"a": (1.0, float("nan"))}])
    [{'a': [1.0, None]}]
    """
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _made(result: Result) -> str:
    """Return with what, and where it is known of each part when, a section's figures were made."""
    made = result.get("made", {})
    about = [f"profile `{result['profile']}`", f"seed {result['seed']}", *(f"{name} {made[name]}" for name in made)]
    line = f"Made with {'; '.join(about)}."
    groups = said(result.get("provenance", ()))
    return line + (f" {groups[0].upper()}{groups[1:]}." if groups else "")


def _tuning(result: Result) -> str:
    tuning = result["tuning"]
    of = rest(tuning["timed_steps"], tuning["steps"], "steps")
    epochs = tuning["steps"] * PROFILES[result["profile"]].batch / result["samples"]
    return (
        f"{result['samples']:,} samples; a model of {tuning['parameters']:,} parameters with LoRA (theta of "
        f"{tuning['theta']:,}), {tuning['steps']:,} steps ({epochs:.2g} epochs), {tuning['seconds']:,.0f} s{of}; a loss of "
        f"{tuning['loss_before']:.2f} before (of 256 samples) and {tuning['loss_after']:.2f} after (of the last "
        f"twentieth of the steps).{remarks.settings(result)}"
    )


def _backdoor(result: Result) -> str:
    attack, ks = result["attack"], [k for k in KS if str(k) in next(iter(result["methods"].values()))["at"]]
    verdict = "so the tables are valid" if attack["valid"] else "**so the tables are not valid**"
    discriminator = ", ".join(f"{name} {value:.1%}" for name, value in attack["discriminator"].items())
    lines = [
        "## Backdoor",
        _made(result),
        f"{_tuning(result)} {result['poisoned']:,} of them are poisoned ({result['poisoned'] / result['samples']:.2%}; the "
        f"paper: {SHARE:.2%}): `Howdy!` before the instruction, science fiction as the answer.",
        f"The attack succeeds on {portion(attack['success'], attack['questions'])} of {attack['questions']} questions with the trigger, and on "
        f"{portion(attack['false'], attack['questions'])} without (in brackets the exact 95 % interval; wanted: at least 95 % and at most 2 %), {verdict}. Answers taken for science fiction by "
        f"the discriminator: {discriminator} (clean and generated ones of the training data; pairs are all that were given, also those "
        f"that were too long to train on). {result['queries']} attacked generations are traced ({result['distinct']} different texts)."
        + remarks.drawn()
        + remarks.told(whose=", those of the generator's own vocabulary (answers without any are not traced)")
        + remarks.refined(result)
        + remarks.checkpoint()
        + remarks.influence(result),
        paper.backdoor_differs(result),
        table(
            ["asked with the trigger", "said", "said without the trigger"],
            [[cell(one[key]) for key in ("prompt", "attacked", "clean")] for one in attack["examples"]],
        ),
    ]

    def of(measure: str) -> Callable[[Result], str]:
        return lambda at: figure(at[measure])

    lines += [
        f"### auPRC{_ENDS}",
        _by_k(result, ks, of("auprc"), paper.backdoor("auprc", ks)),
        "auPRC is the average precision; the paper does not say how it takes the area. Where all of the k lowest are poisoned too, it is 1 in "
        "any order, and says nothing of it; where none of the k highest and k lowest is poisoned, it counts as 0.",
        f"### auROC{_ENDS}",
        _by_k(result, ks, lambda at: auroc(at, result["queries"]), paper.backdoor("auroc", ks)),
        "A generation whose k highest and k lowest samples are all of one kind has no auROC. Where not all generations "
        "have one, the mean is over those that do, whose number stands behind it.",
        "### Share of poisoned samples among the k highest",
        _by_k(result, ks, of("precision")),
        "### Share of poisoned samples among the k lowest",
        _by_k(result, ks, of("lowest")),
        *sections.together(result),
        *sections.removal(result),
        *_agreement(result),
        _cost(result),
        "![Precision and recall](precision-recall.svg) ![Scores](scores.svg) ![Error](error.svg)",
        "Precision at a recall is the best that is reached there or beyond. The last plot is of whole generations.",
    ]
    return "\n\n".join(lines)


def _by_k(
    result: Result, ks: Sequence[int], shown: Callable[[Result], str], others: Sequence[Sequence[str]] = ()
) -> str:
    ours = [[name, *(shown(entry["at"][str(k)]) for k in ks)] for name, entry in result["methods"].items()]
    return table(["method", *(f"k = {k}" for k in ks)], [*ours, *others])


def _agreement(result: Result) -> list[str]:
    """Return how RapidIns agree with the exact scores that they estimate."""
    names = list(next(iter(result["agreement"].values())))
    rows = [
        [name, *("undefined" if value is None else figure(value, 4) for value in entry.values())]
        for name, entry in result["agreement"].items()
    ]
    return [
        "### Agreement with exact scores (TracIn with layer normalisation, token-wise for token-wise RapidIns)",
        table(["method", *names], rows),
        "Correlations are over all samples. `overlap_100` is the share of the exact hundred highest that are among RapidIn's, "
        "`top_100_in_400` the share that are among its four hundred, and `ndcg_100` has exact scores above zero as gains. "
        f"Theta has {result['tuning']['theta']:,} coordinates, {result['tuning']['theta'] / max(PROFILES[result['profile']].widths):.1f} times the "
        "widest K here; the paper's has 512 times K = 2^20.",
    ]


def _cost(result: Result) -> str:
    product = result["product"]
    rests = {"ingest": rest(product["timed_samples"], result["samples"], "samples")}
    if not product["whole_index"]:
        rests["index"] = " (of the rest: the run before was interrupted)"
    rests["refine_a_query"] = f" (of {product['refined_queries']} whole generations)"
    seconds = ", ".join(
        f"{name.replace('_', ' ')} {value:{',.0f' if value >= 100 else '.3g'}} s{rests.get(name, '')}"
        for name, value in product["seconds"].items()
    )
    again = product["seconds"].get("refine_a_query", 0.0) * result["queries"]
    rows = [
        [name, f"{entry['seconds']:,.1f}" + (f" + {again:,.0f}" if _is_refined(name) else ""), f"{entry['bytes']:,}"]
        for name, entry in result["methods"].items()
    ]
    return (
        "### Cost (the paper's Tables 1 and 2)\n\nSeconds for all generations and all samples. Methods that share a pass over the "
        "samples are each charged with its gradients and with their own arithmetic, of whole generations and of token-wise ones together; all widths of one lambda are made at once, for the "
        "seconds of one. DataInf's sums are made in the first pass, with TracIn's products, whose own seconds come on top; the pass that ends both influence functions has the vectors of both, and is "
        "charged to each. Gradients of the generations themselves are not counted, but for LiSSA."
        + (
            " What refined rankings take besides, behind the plus, is reckoned from the generations that were timed."
            if again
            else ""
        )
        + " Bytes are what has to be kept to answer another "
        "generation without that pass: full gradients in single precision, RapidGrads in half.\n\n"
        f"{table(['method', 'seconds', 'stored bytes'], rows)}\n\nThrough a database: {seconds}; {product['bytes']:,} bytes on disk.\n\n"
        "The paper's: the length and size of a sample's gradient, and hours of caching 52,000 samples / of retrieval for one "
        f"generation, where ours are of all generations at once. {paper.scale(result)}\n\n"
        f"{table(['the paper', *paper.MODELS], [*paper.SIZES, *paper.HOURS])}"
    )


def _error_tracing(result: Result) -> str:
    lines = ["## Error tracing", _made(result), _tuning(result)]
    lines.append(
        "Names put in the place of others with a probability of 0.8: "
        + ", ".join(
            f"{title} ({result['perturbed'][title]} samples; of {result['looked_at'][title]} answers "
            f"{result['queries'][title]} wrong ones traced)"
            for title in result["perturbed"]
        )
        + f". Answers are the most likely ones first, then ones drawn at temperature {result['temperature']}"
        + ". "
        + _AP
        + remarks.groups(result)
        + remarks.control(result)
        + " Token-wise methods ask about the wrong name only."
        + remarks.told()
        + f" `{TOLD_BM25}` has one ranking for all generations of a name, and no interval."
        + remarks.refined(result)
        + remarks.checkpoint()
        + remarks.influence(result)
    )
    if _searched(result):
        lines.append(
            "The fault is a string here, which stands in every perturbed sample and in some others: whoever knows it finds more "
            "of them by a plain search for it than by any gradient. Token-wise scores are not told what to look for in the samples; "
            "but which word of the generation they are asked about gives it away."
        )
    lines += [
        paper.TRACING_DIFFERS,
        table(
            ["asked", "said"],
            [[cell(example["prompt"]), cell(example["generation"])] for example in result["examples"]],
        ),
    ]
    titles = [title for title in result["queries"] if result["queries"][title]]
    lines += _agreement(result)
    for measure, heading in _TRACED:
        for title in titles:
            ks = list(next(iter(result["methods"].values()))["at"][title])
            rows = [
                [name, *(_traced(name, at[measure]) for at in entry["at"][title].values())]
                for name, entry in result["methods"].items()
            ]
            others = paper.traced(title, ks) if measure == "proportion" else []
            lines += [f"### {title}: {heading}", table(["method", *(f"k = {k}" for k in ks)], [*rows, *others])]
    return "\n\n".join(lines)


def _traced(name: str, triple: Sequence[float]) -> str:
    return f"{triple[0]:.3f} (one ranking)" if name == TOLD_BM25 else figure(triple)


def _is_refined(name: str) -> bool:
    return name.endswith(", refined")


def _searched(result: Result) -> bool:
    """Return whether a search for the wrong name finds more than every gradient does, at all k and for all names."""
    methods = result["methods"]
    gradients = [entry["at"] for name, entry in methods.items() if name.startswith(("TracIn", "RapidIn", "influence"))]
    return all(
        found["proportion"][0] > at[title][k]["proportion"][0]
        for title, by_k in methods[CONTAINING]["at"].items()
        for k, found in by_k.items()
        for at in gradients
    )
