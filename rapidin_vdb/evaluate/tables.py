"""Figures of experiments as cells of Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

# Of fewer generations an interval would say nothing.
_FEW = 10


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table.

    >>> print(table(["a"], [["1"]]))
    | a |
    | --- |
    | 1 |
    """
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def cell(text: str) -> str:
    """Return a text as one cell of a table, whatever is in it."""
    text = " ".join(text.split())
    return "".join(f"&#{ord(letter)};" if letter in "|<>&*_`[]\\" else letter for letter in text[:160])


def figure(triple: Sequence[float], digits: int = 3) -> str:
    """Return a mean with its interval.

    >>> figure([0.5, 0.25, 0.75], digits=2)
    '0.50 [0.25, 0.75]'
    """
    mean, low, high = triple
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def portion(value: float, count: int) -> str:
    """Return a share of so many, with its exact binomial 95 % interval.

    >>> portion(0.005, 200)
    '0.5 % [0.0, 2.8]'
    """
    from scipy.stats import binomtest

    interval = binomtest(round(value * count), count).proportion_ci(0.95, method="exact")
    return f"{100 * value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def auroc(at: Mapping[str, Any], generations: int) -> str:
    """Return the auROC of a method at some k: over how many generations, where it is not defined for all.

    >>> auroc({"auroc": [0.97, 0.9, 1.0], "auroc_of": 12}, 100), auroc({"auroc": None, "auroc_of": 0}, 100)
    ('0.970 [0.900, 1.000] (12 of 100)', 'undefined')
    >>> auroc({"auroc": [0.97, 0.97, 0.97], "auroc_of": 1}, 100)
    '0.970 (1 of 100)'
    """
    if at["auroc"] is None:
        return "undefined"
    if at["auroc_of"] < _FEW:
        return f"{at['auroc'][0]:.3f} ({at['auroc_of']} of {generations})"
    return figure(at["auroc"]) + ("" if at["auroc_of"] == generations else f" ({at['auroc_of']} of {generations})")


def rest(timed: int, whole: int, of: str) -> str:
    """Return what seconds are of, where a run before was interrupted.

    >>> rest(3, 10, "steps"), rest(10, 10, "steps")
    (' (of the last 3 of 10 steps: the run before was interrupted)', '')
    """
    return "" if timed == whole else f" (of the last {timed:,} of {whole:,} {of}: the run before was interrupted)"
