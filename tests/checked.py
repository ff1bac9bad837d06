"""What checks types in the tests: beartype, made ready once for every signature.

jaxtyping has a function that stands within another checked anew each time that the outer one is called. What is made for
that costs a thousand times as much as a call, and is the same each time: it sees names and annotations, no closure.
"""

from collections.abc import Callable
from functools import cache
from inspect import Signature
from typing import Any

from beartype import beartype
from jaxtyping import _decorator

checked = cache(lambda function: beartype(function))
"""Return what checks the arguments of a function of jaxtyping's, which has a signature and no more."""


def _kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return what makes jaxtyping's functions, once for each name, kind of defaults and annotations."""
    made: dict[Any, Any] = {}

    def once(name: str, qualname: str, module: str, signature: Signature, output: bool) -> Any:
        key = (name, qualname, module, signature, output, *(type(one.default) for one in signature.parameters.values()))
        try:
            if key not in made:
                made[key] = make(name, qualname, module, signature, output)
        except TypeError:  # an annotation, or a default, that cannot be hashed
            return make(name, qualname, module, signature, output)
        return made[key]

    return once


# Were it named otherwise one day, tests would take longer, and theirs of this file says so.
_decorator._make_fn_with_signature = _kept(_decorator._make_fn_with_signature)
