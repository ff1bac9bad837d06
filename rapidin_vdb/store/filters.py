"""What may stand in `--where`: one boolean SQL expression over the table's columns, and nothing behind it."""

import re

from rapidin_vdb.errors import FilterError

# Quoted texts and quoted column names; a doubled quote inside stands for itself.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`")
# Lance walks an expression by recursion, and ends the process where it is too deep: seen at 1,000 of the first kind in
# a row, and at 3,000 comparisons. Alternatives (AND, OR) are no deeper for being many.
_DEEP = re.compile(r"\|\||[-+*/%|&^~]|::|\b(?:IS|IN|NOT|LIKE|ILIKE|SIMILAR|BETWEEN|CASE|CAST)\b", re.IGNORECASE)
_COMPARED = re.compile(r"[<>=!]+")
_MOST_DEEP = 300
_MOST_OPERATORS = 1000


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


def ids_filter(sample_ids: list[str]) -> str:
    """Return the filter that lets exactly these samples through.

    >>> ids_filter(["a", "it's"])
    "sample_id IN ('a', 'it''s')"
    """
    return "sample_id IN (" + ", ".join("'" + sample_id.replace("'", "''") + "'" for sample_id in sample_ids) + ")"
