"""What a coarse index may have missed, in words, by what was measured when it was built."""

import logging
from dataclasses import replace
from pathlib import Path

from rapidin_vdb.index import Searchable, ShardedIndex, looked_at, readable_manifest
from rapidin_vdb.question import Question

logger = logging.getLogger(__name__)

_ENDS = {"recall": "the best", "recall_harmful": "the most negative"}


def with_what_coarse_finds(folder: Path, index: ShardedIndex) -> ShardedIndex:
    """Warn where an index is not exact; return it with what was measured of it, for the notes of its rankings."""
    if not index.recipe.coarse_width:
        return index
    manifest = readable_manifest(folder, index.recipe.name)
    if manifest is not None:
        # The same object, where it may be: what is known of an index goes by that.
        index = index if index.recall == manifest.recall else replace(index, recall=manifest.recall)
        logger.warning("%s", _measured(index, ("recall", "recall_harmful")))
    return index


def coarse_note(index: Searchable, question: Question, samples: int) -> str | None:
    """Say that an index may have missed some of so many samples or tokens, and how much of the answer it finds.

    None where it cannot: it is exact, or looked at all of them at full width.
    """
    if not isinstance(index, ShardedIndex) or not index.recipe.coarse_width:
        return None
    if looked_at(index.recipe.refine, max(question.top_k, question.refine)) >= samples:
        return None
    ends = ("recall", "recall_harmful") if question.both else ("recall_harmful" if question.harmful else "recall",)
    level = "" if question.level == "sample" else f" --level {question.level}"
    return (
        f"{_measured(index, ends)}, so that {question.level}s may be missing here; an exact one misses none: "
        f"rapidin-vdb index DB{level}"
    )


def _measured(index: ShardedIndex, ends: tuple[str, ...]) -> str:
    """Return what was measured of a coarse index at some ends, in words."""
    name, recall = index.recipe.name, index.recall or {}
    found = [f"{100 * recall[end]:.0f} % of {_ENDS[end]} {recall['at']}" for end in ends if end in recall]
    if not found:
        of = f" of {_ENDS[ends[0]]}" if recall else ""
        return f"the index {name} is not exact, and what it finds{of} was not measured"
    # Of one that was built before both ends were measured.
    rest = "".join(f", and was not measured at {_ENDS[end]}" for end in ends if end not in recall)
    return f"the index {name} is not exact: it found {' and '.join(found)} when it was built{rest}"
