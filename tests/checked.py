"""What checks types in the tests: beartype, once for every function that is written down.

jaxtyping has a function that stands within another checked anew each time that the outer one is called. What beartype makes
of it costs a thousand times as much as a call, and is the same each time: it sees names and annotations, no closure.
"""

from typing import Any

from beartype import beartype

_made: dict[Any, Any] = {}


def checked(function):
    """Return what checks the arguments of one of jaxtyping's functions, which have a signature and no more."""
    key = (function.__module__, function.__qualname__, function.__code__, tuple(function.__annotations__.items()))
    try:
        if key not in _made:
            _made[key] = beartype(function)
    except TypeError:  # an annotation that cannot be hashed
        return beartype(function)
    return _made[key]
