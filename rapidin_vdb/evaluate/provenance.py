"""Which commit, date and machine made which part of an experiment, and that in one line."""

from collections.abc import Mapping, Sequence
from typing import Any

Made = dict[str, str]
"""What made a step, such as its commit, date and threads."""

_PARTS = {
    "records and tuning": ("records", "questions", "tuning", "adapter"),
    "generations": ("attacked", "clean", "said-"),
    "database": ("product",),
    "tuning again": ("without-", "losses"),
    "figures": ("figures",),
}
_SILENT = ("plan",)


def provenance(steps: Mapping[str, Made | None]) -> list[dict[str, Any]]:
    """Return what made the steps, those of one part and origin together; steps that say nothing are left out.

    >>> provenance({"records": {"commit": "a"}, "tuning": {"commit": "a"}, "TracIn": {"commit": "b"}, "x": None})
    [{'part': 'records and tuning', 'steps': ['records', 'tuning'], 'commit': 'a'}, \
{'part': 'scores', 'steps': ['TracIn'], 'commit': 'b'}]
    """
    groups: list[dict[str, Any]] = []
    for name, made in steps.items():
        if made is None or name in _SILENT:
            continue
        part = next((part for part, names in _PARTS.items() if name.startswith(names)), "scores")
        mine = next((g for g in groups if _origin(g) == made and g["part"] == part), None)
        if mine is None:
            groups.append({"part": part, "steps": [name], **made})
        else:
            mine["steps"].append(name)
    order = ["records and tuning", "generations", "scores", "database", "tuning again", "figures"]
    return sorted(groups, key=lambda group: order.index(group["part"]))


def said(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the same as one line; where a part was made at several times, each names its steps.

    >>> said([{"part": "scores", "steps": ["TracIn"], "commit": "b", "threads": "2"}])
    'scores: commit b, threads 2'
    """
    texts = []
    for part in dict.fromkeys(group["part"] for group in groups):
        mine = [group for group in groups if group["part"] == part]
        origins = [", ".join(f"{name} {value}" for name, value in _origin(group).items()) for group in mine]
        if len(mine) > 1:
            origins = [f"{origin} ({', '.join(g['steps'])})" for g, origin in zip(mine, origins, strict=True)]
        texts.append(f"{part}: {', and '.join(origins)}")
    return "; ".join(texts)


def _origin(group: Mapping[str, Any]) -> Made:
    return {name: value for name, value in group.items() if name not in ("part", "steps")}
