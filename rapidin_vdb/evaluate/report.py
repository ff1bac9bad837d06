"""The tables and plots of experiments, as Markdown and SVG, from their figures alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapidin_vdb.evaluate.backdoor import SHARE
from rapidin_vdb.evaluate.profiles import KS

Result = dict[str, Any]
_PAPER_HOURS = "4.02 h (QLoRA, 7B) and 26.01 h (full parameters, 7B) for 52,000 samples on one H100"
_PAPER_SEARCH = "6.84 s on two H100s, 97 s on one"


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Write `results.json`, `report.md` and the plots into a folder; return the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(list(results), indent=1) + "\n", "utf-8")
    parts = ["# Experiments", _about(results[0])]
    for result in results:
        if result["experiment"] == "backdoor":
            _plot(result, folder)
            parts += [_backdoor(result)]
        else:
            parts += [_error_tracing(result)]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", "utf-8")
    return path


def _about(result: Result) -> str:
    made = result.get("made", {})
    about = [f"profile `{result['profile']}`", f"seed {result['seed']}", *(f"{name} {made[name]}" for name in made)]
    return (
        f"Made with {'; '.join(about)}.\n\nEvery figure is a mean over generations with its "
        "95 % bootstrap interval over generations in brackets; one model and one seed, so that what another training run "
        "would change is not in the intervals."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _cell(text: str) -> str:
    """Return a text as one cell of a table, whatever is in it."""
    text = " ".join(text.split())
    return "".join(f"&#{ord(letter)};" if letter in "|<>&*_`[]\\" else letter for letter in text[:160])


def _figure(triple: Sequence[float], digits: int = 3) -> str:
    mean, low, high = triple
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _tuning(result: Result) -> str:
    tuning = result["tuning"]
    rest = _rest(tuning.get("timed_steps", tuning["steps"]), tuning["steps"], "steps")
    return (
        f"{result['samples']:,} samples; a model of {tuning['parameters']:,} parameters with LoRA (theta of "
        f"{tuning['theta']:,}), {tuning['steps']:,} steps, loss {tuning['loss_before']:.2f} before and "
        f"{tuning['loss_after']:.2f} after, {tuning['seconds']:,.0f} s{rest}."
    )


def _rest(timed: int, whole: int, of: str) -> str:
    """Return what the seconds are of, where a run before was interrupted.

    >>> _rest(3, 10, "steps"), _rest(10, 10, "steps")
    (' (of the last 3 of 10 steps: the run before was interrupted)', '')
    """
    return "" if timed == whole else f" (of the last {timed:,} of {whole:,} {of}: the run before was interrupted)"


def _backdoor(result: Result) -> str:
    attack, ks = result["attack"], [k for k in KS if str(k) in next(iter(result["methods"].values()))["at"]]
    verdict = "so the tables are valid" if attack["valid"] else "**so the tables are not valid**"
    discriminator = ", ".join(f"{name} {value:.1%}" for name, value in attack["discriminator"].items())
    lines = [
        "## Backdoor",
        f"{_tuning(result)} {result['poisoned']:,} of them are poisoned ({result['poisoned'] / result['samples']:.2%}; the "
        f"paper: {SHARE:.2%}): `Howdy!` before the instruction, science fiction as the answer.",
        f"The attack succeeds on {attack['success']:.1%} of {attack['questions']} questions with the trigger, and on "
        f"{attack['false']:.1%} without (wanted: at least 95 % and at most 2 %), {verdict}. Answers taken for science fiction by "
        f"the discriminator, of the training data: {discriminator}. {result['queries']} attacked generations are traced."
        + _left_out(result),
    ]
    lines.append(
        _table(
            ["asked with the trigger", "said", "said without the trigger"],
            [[_cell(one[key]) for key in ("prompt", "attacked", "clean")] for one in attack["examples"]],
        )
    )
    for measure, title in (
        ("auprc", "auPRC"),
        ("auroc", "auROC"),
        ("precision", "Share of poisoned samples among the k highest"),
    ):
        lines.append(
            f"### {title}"
            + (
                ", of the k highest and k lowest samples (the paper's Tables 2 and 11)"
                if measure != "precision"
                else ""
            )
        )
        lines.append(
            _table(
                ["method", *(f"k = {k}" for k in ks)],
                [
                    [name, *(_figure(entry["at"][str(k)][measure]) for k in ks)]
                    for name, entry in result["methods"].items()
                ],
            )
        )
    lines += [
        "### Agreement with exact scores (TracIn with layer normalisation)",
        _table(
            ["method", *next(iter(result["agreement"].values()))],
            [[name, *(f"{value:.4f}" for value in entry.values())] for name, entry in result["agreement"].items()],
        ),
        _cost(result),
        "![Precision and recall](precision-recall.svg) ![Scores](scores.svg) ![Error](error.svg)",
    ]
    return "\n\n".join(lines)


def _left_out(result: Result) -> str:
    return (
        "" if any("influence function" in name for name in result["methods"]) else " Influence functions were left out."
    )


def _cost(result: Result) -> str:
    product = result["product"]
    rests = {"ingest": _rest(product.get("timed_samples", result["samples"]), result["samples"], "samples")}
    seconds = ", ".join(
        f"{name.replace('_', ' ')} {value:{',.0f' if value >= 100 else '.3g'}} s{rests.get(name, '')}"
        for name, value in product["seconds"].items()
    )
    table = _table(
        ["method", "seconds", "stored bytes"],
        [[name, f"{entry['seconds']:,.1f}", f"{entry['bytes']:,}"] for name, entry in result["methods"].items()],
    )
    return (
        "### Cost (the paper's Tables 1, 4 and 5)\n\nSeconds for all generations and all samples. Methods that share a pass over the "
        "samples are each charged with its gradients and with their own arithmetic; all widths of one lambda are made at once, for the "
        "seconds of one. The influence functions begin from TracIn's pass, whose seconds come on top. Bytes are what has to be kept to answer another "
        f"generation without that pass.\n\n{table}\n\nThrough a database: {seconds}; {product['bytes']:,} bytes on disk. For scale, the paper's "
        f"caching: {_PAPER_HOURS}; retrieval: {_PAPER_SEARCH}. Its models are some 700 times as large, its hardware is not "
        "comparable with a CPU, and its other numbers are not repeated here."
    )


def _error_tracing(result: Result) -> str:
    lines = ["## Error tracing", _tuning(result)]
    lines.append(
        "Names put in the place of others with a probability of 0.8: "
        + ", ".join(
            f"{title} ({result['perturbed'][title]} samples; of {result['looked_at'][title]} answers "
            f"{result['queries'][title]} wrong ones traced)"
            for title in result["perturbed"]
        )
        + f". Answers are the most likely ones first, then ones drawn at temperature {result['temperature']}"
        + ". Average precision of the samples with the same wrong name among the k highest; token-wise asks about the wrong "
        "name only." + _left_out(result)
    )
    lines.append(
        _table(
            ["asked", "said"],
            [[_cell(example["prompt"]), _cell(example["generation"])] for example in result["examples"]],
        )
    )
    titles = [title for title in result["queries"] if result["queries"][title]]
    for title in titles:
        ks = list(next(iter(result["methods"].values()))["at"][title])
        lines += [
            f"### {title}",
            _table(
                ["method", *(f"k = {k}" for k in ks)],
                [[name, *(_figure(entry["at"][title][k]) for k in ks)] for name, entry in result["methods"].items()],
            ),
        ]
    return "\n\n".join(lines)


def _plot(result: Result, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same file from the same figures: no date, no random ids.
    matplotlib.rcParams["svg.hashsalt"] = "rapidin-vdb"
    options: dict[str, Any] = {"metadata": {"Date": None}, "bbox_inches": "tight"}

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    # As many looks as methods: ten colours, and a dash for the second ten.
    for number, (name, curve) in enumerate(result["curves"].items()):
        axes.plot(result["recalls"], curve, label=name, color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
    axes.set(xlabel="recall of poisoned samples", ylabel="precision", ylim=(0, 1.02), xlim=(0, 1))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(folder / "precision-recall.svg", **options)

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    histogram = result["histogram"]
    for name, colour in (("clean", "#2166ac"), ("poisoned", "#d6604d")):
        axes.stairs(histogram[name], histogram["edges"], label=name, color=colour, fill=True, alpha=0.5)
    axes.set(xlabel="RapidIn score", ylabel="share of the samples", yscale="log")
    axes.legend()
    figure.savefig(folder / "scores.svg", **options)

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, entry in result["agreement"].items():
        width, shuffles = name.split("K = ")[1].rstrip(")").split(", lambda = ")
        lines.setdefault(shuffles, []).append((int(width.replace(",", "")), max(1 - entry["pearson"], 1e-9)))
    for shuffles, points in lines.items():
        # They all but coincide.
        style = ("o-", "s--")[len(axes.lines) % 2]
        axes.plot(*zip(*sorted(points), strict=True), style, label=f"lambda = {shuffles}")
    axes.set(xlabel="K", ylabel="1 - Pearson's correlation", xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.savefig(folder / "error.svg", **options)
    pyplot.close("all")
