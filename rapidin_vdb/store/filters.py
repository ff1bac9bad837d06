"""What may stand in `--where`: one boolean SQL expression over the table's columns, and nothing behind it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rapidin_vdb.errors import FilterError
from rapidin_vdb.store.telling import first_line

# Quoted texts and quoted column names; a doubled quote inside stands for itself.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`")
# Lance walks an expression by recursion, and ends the process where it is too deep: seen at 1,000 of the first kind in
# a row, and at 3,000 comparisons. Alternatives (AND, OR) are no deeper for being many.
_DEEP = re.compile(r"\|\||[-+*/%|&^~]|::|\b(?:IS|IN|NOT|LIKE|ILIKE|SIMILAR|BETWEEN|CASE|CAST)\b", re.IGNORECASE)
_COMPARED = re.compile(r"[<>=!]+")
_MOST_DEEP = 300
_MOST_OPERATORS = 1000
# How Lance says that an expression was understood, but cannot be had of some row: a text that is no number, a division.
_OF_ITS_VALUES = ("applying filter expression", "Arrow error: ")


def checked_filter(where: str) -> str:
    """Return a filter in parentheses, so that nothing can stand behind the expression unseen.

    >>> checked_filter("split = 'train'")
    "(split = 'train')"

    Raises:
        FilterError: empty, more than one statement, a comment, unbalanced, or too long an expression to be walked.
    """
    if not where.strip():
        raise FilterError("the filter is empty; leave --where out to search all samples")
    bare = _QUOTED.sub("''", where)
    for sign, what in ((";", "a second statement"), ("--", "a comment"), ("/*", "a comment")):
        if sign in bare:
            raise FilterError(f"the filter holds {what} ({sign}): {where}; wanted one expression")
    if "'" in bare.replace("''", ""):
        raise FilterError(f"a quote is not closed in the filter: {where}")
    deep = len(_DEEP.findall(bare))
    operators = deep + len(_COMPARED.findall(bare))
    if deep > _MOST_DEEP or operators > _MOST_OPERATORS:
        raise FilterError(
            f"the filter has {operators:,} operators, {deep:,} of them other than comparisons; wanted at most "
            f"{_MOST_OPERATORS:,} and {_MOST_DEEP}: write alternatives as a list, column IN ('a', 'b')"
        )
    depth = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
    if depth != 0:
        raise FilterError(f"the parentheses do not match in the filter: {where}")
    return f"({where})"


@contextmanager
def understood(where: str, columns: Sequence[str]) -> Iterator[str]:
    """Yield a filter to read by, checked; and tell what Lance says of it, where it is the filter's fault.

    Raises:
        FilterError: it cannot be understood.
    """
    expression = checked_filter(where)
    try:
        yield expression
    except (ValueError, TypeError, RuntimeError) as error:
        # The planner raises ValueErrors; whatever else goes wrong is not the filter's fault.
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _OF_ITS_VALUES):
            raise
        raise FilterError(
            f"the filter {where!r} is not understood: {first_line(error)}. Columns are: {', '.join(columns)}"
        ) from error


def ids_filter(sample_ids: list[str]) -> str:
    """Return the filter that lets exactly these samples through.

    >>> ids_filter(["a", "it's"])
    "sample_id IN ('a', 'it''s')"
    """
    return "sample_id IN (" + ", ".join("'" + sample_id.replace("'", "''") + "'" for sample_id in sample_ids) + ")"
