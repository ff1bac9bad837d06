"""What may stand in `--where`: one boolean SQL expression over the table's columns, and nothing behind it."""

import re

from rapidin_vdb.errors import FilterError

# Quoted texts and quoted column names; a doubled quote inside stands for itself.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`")


def checked_filter(where: str) -> str:
    """Return a filter in parentheses, so that nothing can stand behind the expression unseen.

    >>> checked_filter("split = 'train'")
    "(split = 'train')"

    Raises:
        FilterError: empty, more than one statement, a comment, or unbalanced.
    """
    if not where.strip():
        raise FilterError("the filter is empty; leave --where out to search all samples")
    bare = _QUOTED.sub("''", where)
    for sign, what in ((";", "a second statement"), ("--", "a comment"), ("/*", "a comment")):
        if sign in bare:
            raise FilterError(f"the filter holds {what} ({sign}): {where}; wanted one expression")
    if "'" in bare.replace("''", ""):
        raise FilterError(f"a quote is not closed in the filter: {where}")
    depth = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
    if depth != 0:
        raise FilterError(f"the parentheses do not match in the filter: {where}")
    return f"({where})"


def ids_filter(sample_ids: list[str]) -> str:
    """Return the filter that lets exactly these samples through.

    >>> ids_filter(["a", "it's"])
    "sample_id IN ('a', 'it''s')"
    """
    return "sample_id IN (" + ", ".join("'" + sample_id.replace("'", "''") + "'" for sample_id in sample_ids) + ")"
