"""How deep an expression is: what Lance's parser and planner recurse over, and end the process where it is too much."""

import re
from dataclasses import dataclass

from rapidin_vdb.errors import FilterError

# What Lance does not understand, or what hides from us where a text begins and ends: `$$'$$` is a text there.
_FOREIGN = re.compile(r"[\[\]{}$?@#\\]|(?<!:):(?!:)|\bARRAY\b", re.IGNORECASE)
# Lists of values are the one thing that is long for good reasons: they are looked at as one value.
_VALUE = r"(?:''|-?\w+(?:\.\w*)?)"
_LIST = re.compile(rf"(?<=[(,])\s*{_VALUE}(?:\s*,\s*{_VALUE})+(?=\s*[,)])")
_PIECE = re.compile(
    r"(?P<call>[^\W\d]\w*)\s*\(|(?P<open>\()|(?P<close>\))|''|\w+|[<>=!]=|<>|\|\||::|\S",
    re.IGNORECASE,
)
_COMPARED = re.compile(r"[<>=!]+")
_OTHERS = re.compile(r"\|\||[-+*/%|&^~]|::|\b(?:IS|IN|NOT|LIKE|ILIKE|SIMILAR|BETWEEN|CASE|CAST)\b", re.IGNORECASE)
_JOINED = re.compile(r"\b(?:AND|OR)\b", re.IGNORECASE)
# They hold whatever AND and comma part, so that each may stand within the one before.
_HOLDING = re.compile(r"\b(?:CASE|INTERVAL|LAMBDA)\b|->", re.IGNORECASE)
_NO_CALLS = frozenset("and or not in like ilike between is".split())
# Seen to end the process: 700 comparisons in a row, which are 1,400 pieces; 20,000 to 60,000 terms of AND and OR, or
# 1,000 in a call. Seen to take twice as long with each: INTERVAL, which Lance answers no more than CASE. Calls and
# ranges take up to three times as long with each that they stand in: coalesce(x, y) becomes CASE WHEN x IS NOT NULL
# THEN x ELSE y END, and x NOT BETWEEN a AND b becomes x < a OR x > b.
_MOST_OPERATORS = 1000
_MOST_OTHERS = 300
_MOST_CHARACTERS = 1 << 24
_MOST_BESIDES = 1 << 18
_MOST_NESTED = 20
_MOST_COPIED = 5
_MOST_PIECES = 250
_MOST_JOINED = 3000
_MOST_HOLDING = 5
_NOT_CLOSED = "the parentheses do not match in the filter"


@dataclass
class _Level:
    """What stands between two parentheses; a run is what stands there between two commas, ANDs or ORs."""

    called: bool
    """Whether a function is called with it."""
    run: int = 0
    """Pieces of the run."""
    ranges: int = 0
    """BETWEENs of the run."""
    waiting: int = 0
    """How many of these wait for their AND."""
    inner: tuple[int, int] = (0, 0)
    """Of the deepest parentheses in the run: pieces, and calls and ranges, one within the other."""
    deepest: tuple[int, int] = (0, 0)
    """The same of all runs that are done, with their own."""

    def end_run(self) -> None:
        self.deepest = _larger(self.deepest, (self.run + self.inner[0], self.ranges + self.inner[1]))
        self.run, self.ranges, self.waiting, self.inner = 0, 0, 0, (0, 0)

    def close(self) -> tuple[int, int]:
        self.end_run()
        return self.deepest[0], self.deepest[1] + self.called

    def part(self, word: str, *, called: bool) -> None:
        """Go on behind a comma, AND or OR, which ends the run unless it is BETWEEN's own, or in a call."""
        waited = word.upper() == "AND" and self.waiting > 0
        self.waiting -= waited
        if waited or (called and word != ","):
            self.run += 1
        else:
            self.end_run()


def _larger(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])


def check_length(where: str) -> None:
    """Refuse a filter too long to be looked at.

    Raises:
        FilterError: it is.
    """
    if len(where) > _MOST_CHARACTERS:
        raise FilterError(f"the filter has {len(where):,} characters; wanted at most {_MOST_CHARACTERS:,}")


def check_depth(bare: str) -> None:
    """Refuse an expression, in which quoted texts are empty, that Lance could not walk in little time and memory.

    >>> check_depth("ok" + " AND ok" * 1000)
    >>> check_depth("ok" + " = ok" * 1000)
    Traceback (most recent call last):
    rapidin_vdb.errors.FilterError: the filter has over 250 words and signs one within the other; wanted at most 250...

    Raises:
        FilterError: a sign that no filter needs, parentheses that do not match, or too much one within the other.
    """
    foreign = _FOREIGN.search(bare)
    if foreign:
        raise FilterError(f"the filter holds {foreign[0]}, which no filter needs; write lists as: column IN ('a', 'b')")
    bare = _LIST.sub("''", bare)
    if len(bare) > _MOST_BESIDES:
        raise _too_deep(f"{len(bare):,} characters besides texts and lists of values", f"{_MOST_BESIDES:,}")
    others = len(_OTHERS.findall(bare))
    operators = others + len(_COMPARED.findall(bare))
    if others > _MOST_OTHERS or operators > _MOST_OPERATORS:
        found = f"{operators:,} operators, {others:,} of them other than comparisons"
        raise _too_deep(found, f"{_MOST_OPERATORS:,} and {_MOST_OTHERS}")
    for pattern, most, what in (
        (_JOINED, _MOST_JOINED, "AND and OR"),
        (_HOLDING, _MOST_HOLDING, "CASE and INTERVAL"),
    ):
        count = sum(1 for _ in pattern.finditer(bare))
        if count > most:
            raise _too_deep(f"{count:,} times {what}", f"{most:,}")
    levels = [_Level(called=False)]
    for piece in _PIECE.finditer(bare):
        here, kind, word = levels[-1], piece.lastgroup, piece["call"] or piece[0]
        if word.upper() in ("AND", "OR", ","):
            here.part(word, called=any(level.called for level in levels))
        elif kind != "close":
            here.run += 1
        if word.upper() == "BETWEEN":
            here.ranges, here.waiting = here.ranges + 1, here.waiting + 1
        if kind in ("call", "open"):
            here = _Level(called=kind == "call" and word.lower() not in _NO_CALLS)
            levels.append(here)
        elif kind == "close":
            if len(levels) == 1:
                raise FilterError(_NOT_CLOSED)
            levels.pop()
            levels[-1].inner = _larger(levels[-1].inner, here.close())
            here = levels[-1]
        if len(levels) > _MOST_NESTED + 1:
            raise _too_deep(f"over {_MOST_NESTED} parentheses one within the other", str(_MOST_NESTED))
        if sum(level.run for level in levels) + here.inner[0] > _MOST_PIECES:
            raise _too_deep(f"over {_MOST_PIECES} words and signs one within the other", str(_MOST_PIECES))
        if sum(level.called + level.ranges for level in levels) + here.inner[1] > _MOST_COPIED:
            raise _too_deep(f"over {_MOST_COPIED} calls and BETWEENs one within the other", str(_MOST_COPIED))
    if len(levels) > 1:
        raise FilterError(_NOT_CLOSED)


def _too_deep(found: str, most: str) -> FilterError:
    return FilterError(
        f"the filter has {found}; wanted at most {most}: write alternatives as a list, column IN ('a', 'b')"
    )
