"""The plots of the backdoor experiment, as SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FAMILIES = {"RapidIn": "Reds", "TracIn": "Blues", "influence": "Purples", "": "Greens"}
"""Colour map of the methods whose names begin so."""
_DASHES = {
    "token-wise, refined": (0, (1, 1, 1, 1, 5, 1)),
    "refined": "-.",
    "token-wise": "--",
    "lambda = 100": ":",
    "": "-",
}
"""Line of the methods whose names contain this."""


def _looks(methods: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Return each method's colour and line: hues tell families apart, shades their methods."""
    import matplotlib

    found: dict[str, tuple[Any, Any]] = {}
    for family, colours in _FAMILIES.items():
        of = [name for name in methods if name.startswith(family) and name not in found]
        # Methods that differ by their line only share a shade.
        keys = {name: name.split(", lambda")[0].removesuffix(", token-wise") for name in of}
        shades = list(dict.fromkeys(keys.values()))
        for name in of:
            place = (shades.index(keys[name]) + 1) / len(shades)
            line = next(line for part, line in _DASHES.items() if part in name)
            found[name] = (matplotlib.colormaps[colours](0.3 + 0.6 * place), line)
    return {name: found[name] for name in methods}


def plot(result: dict[str, Any], folder: Path) -> None:
    """Write precision and recall, the scores' histogram, and the sketch's error into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same file from the same figures: no date, no random ids.
    matplotlib.rcParams["svg.hashsalt"] = "rapidin-vdb"
    options: dict[str, Any] = {"metadata": {"Date": None}, "bbox_inches": "tight"}

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, (colour, style) in _looks(list(result["curves"])).items():
        axes.plot(result["recalls"], result["curves"][name], label=name, color=colour, linestyle=style)
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
        if "token-wise" in name or entry["pearson"] is None:
            continue
        width, shuffles = name.split("K = ")[1].rstrip(")").split(", lambda = ")
        lines.setdefault(shuffles, []).append((int(width.replace(",", "")), max(1 - entry["pearson"][0], 1e-9)))
    for shuffles, points in lines.items():
        # They all but coincide.
        style = ("o-", "s--")[len(axes.lines) % 2]
        axes.plot(*zip(*sorted(points), strict=True), style, label=f"lambda = {shuffles}")
    axes.set(xlabel="K", ylabel="1 - Pearson's correlation", xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.savefig(folder / "error.svg", **options)
    pyplot.close("all")
