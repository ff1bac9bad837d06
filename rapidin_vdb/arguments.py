"""What is checked of arguments: in Python there is no command line that refuses a word or a number first."""

import math
import operator
import os
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from rapidin_vdb.errors import SpecError


def one_of(option: str, value: Any, kind: Any) -> None:
    """Refuse what is none of the words of a Literal.

    Raises:
        SpecError: it is not.
    """
    known = get_args(kind)
    if not isinstance(value, str) or value not in known:
        words = f"{', '.join(known[:-1])} or {known[-1]}"
        raise SpecError(f"--{option} is {value!r}; wanted {words}")


def whole(option: str, value: Any, least: int, most: int | None = None, *, wanted: str | None = None) -> int:
    """Return a whole number, also numpy's, as Python's.

    Raises:
        SpecError: it is none, or out of its range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        kind = "" if number is not None else "a whole number, "
        raise SpecError(f"{option} is {value!r}; wanted {kind}{wanted or f'{least} or more'}")
    return number


def above_zero(option: str, value: Any) -> float:
    """Return a number above 0, also numpy's, as Python's.

    Raises:
        SpecError: it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise SpecError(f"--{option} is {value}; wanted a number above 0")
    return number


def name_of(place: str | PathLike[str] | None) -> str | None:
    """Return the name of a model or an adapter, also of a Path, as a text.

    Raises:
        SpecError: it is neither.
    """
    if place is not None and not isinstance(place, str | PathLike):
        raise SpecError(f"a model or an adapter is of type {type(place).__name__}; wanted its name, or its folder")
    return None if place is None else os.fspath(place)


def place_of(place: str | PathLike[str] | None) -> str | None:
    """Return the name of a model or an adapter; of a folder that is here, its whole path.

    That stays right wherever this process goes; and a name that is not here may be one on the Hugging Face hub.

    Raises:
        SpecError: it is neither a name nor a folder.
    """
    name = name_of(place)
    # An empty name would be the folder that we are in.
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name
