"""What may stand in `--where`: one boolean SQL expression over the table's columns, and nothing behind it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rapidin_vdb.errors import FilterError, out_of_handles
from rapidin_vdb.store.depth import check_depth, check_length
from rapidin_vdb.store.telling import first_line, is_panic

# Quoted texts and quoted column names; a doubled quote inside stands for itself.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`(?:[^`]|``)*`")
# What may stand before a parenthesis: functions of one row that give the same each time and take no more memory than
# what they are given, and SQL's own words. Lance knows others that end the process, as `repeat`, or draw by lot.
FUNCTIONS = (
    "abs ascii bit_length btrim char_length character_length coalesce concat concat_ws contains ends_with exp "
    "greatest ifnull initcap instr isnan iszero least left length ln log log10 log2 lower ltrim nullif nvl "
    "octet_length power regexp_count regexp_like reverse right round rtrim split_part sqrt starts_with strpos "
    "trunc upper"
).split()
_BEFORE_PARENTHESES = {*FUNCTIONS, *"and between cast decimal ilike in is like not or try_cast".split()}
_CALLED = re.compile(r"([^\W\d]\w*|'')\s*\(")
_CHANGING = re.compile(r"\b(?:current_(?:date|time|timestamp)|localtime(?:stamp)?)\b", re.IGNORECASE)
# How Lance says that an expression was understood, but cannot be had of some row: a text that is no number, a division,
# a part of what has none.
_OF_ITS_VALUES = ("applying filter expression", "Arrow error: ", "LanceError(Arrow)", "Cannot access field at argument")
_UNKNOWN = re.compile(r"No field named \"?(\w+)\"?$")
_GAVE_UP = "Encountered internal error"


def checked_filter(where: str) -> str:
    """Return a filter in parentheses, so that nothing can stand behind the expression unseen.

    >>> checked_filter("split = 'train'")
    "(split = 'train')"

    Raises:
        FilterError: empty, more than one statement, a comment, unbalanced, too long an expression to be walked, or with
            a function that is none of those which a filter may use.
    """
    if not where.strip():
        raise FilterError("the filter is empty; leave --where out to search all samples")
    check_length(where)
    bare = _QUOTED.sub("''", where)
    for sign, what in ((";", "a second statement"), ("--", "a comment"), ("/*", "a comment")):
        if sign in bare:
            raise FilterError(f"the filter holds {what} ({sign}): {where}; wanted one expression")
    if any(quote in bare.replace("''", "") for quote in "'\"`"):
        raise FilterError(f"a quote is not closed in the filter: {where}")
    check_depth(bare)
    called = [name for name in _CALLED.findall(bare) if name.lower() not in _BEFORE_PARENTHESES]
    called += _CHANGING.findall(bare)
    if called:
        name = "what is quoted" if called[0] == "''" else called[0]
        raise FilterError(f"the filter calls {name}: {where}; wanted functions among: {', '.join(FUNCTIONS)}")
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
        if _GAVE_UP in str(error) and not out_of_handles(error):
            raise _unanswered(where, error) from error
        # The planner raises ValueErrors; whatever else goes wrong is not the filter's fault.
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _OF_ITS_VALUES):
            raise
        # Lance goes on to name columns of ours that nobody asks for, in that form.
        said = first_line(error).split(" Valid fields are", 1)[0].rstrip(".")
        name = _UNKNOWN.search(said)
        hint = f" Is {name[1]} a text? Texts take single quotes: '{name[1]}'." if name else ""
        raise FilterError(
            f"the filter {where!r} is not understood: {said}.{hint} Columns are: {', '.join(columns)}"
        ) from error
    except BaseException as error:
        if not is_panic(error) or out_of_handles(error):
            raise
        raise _unanswered(where, error) from error


def _unanswered(where: str, error: BaseException) -> FilterError:
    return FilterError(
        f"the filter {where!r} cannot be answered: Lance gave up over it ({first_line(error)}). If it does over "
        "others, too, the table may be damaged: look with rapidin-vdb verify"
    )


def ids_filter(sample_ids: list[str]) -> str:
    """Return the filter that lets exactly these samples through.

    >>> ids_filter(["a", "it's"])
    "sample_id IN ('a', 'it''s')"
    """
    return f"sample_id IN ({listed(sample_ids)})"


def listed(texts: Iterable[str]) -> str:
    """Return texts as SQL lists them.

    >>> listed(["a", "it's"])
    "'a', 'it''s'"
    """
    return ", ".join("'" + text.replace("'", "''") + "'" for text in texts)
