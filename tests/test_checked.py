"""Types are checked in functions within others, too, each by its own annotations, and are made ready once."""

import beartype
import checked
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor, zeros

from rapidin_vdb.compiled import side_by_side


def test_functions_within_others_are_checked_by_their_own_annotations(monkeypatch):
    made = []
    monkeypatch.setattr(checked, "beartype", lambda function: made.append(function) or beartype.beartype(function))

    def outer(kind, given=3):
        @jaxtyped(typechecker=checked.checked)
        def inner(value: kind, other: int = given) -> kind:
            return value if other == 3 else None

        return inner

    for kind, right, wrong in ((int, 1, "x"), (str, "x", 1), (Float[Tensor, "a a"], zeros(2, 2), zeros(2, 3))):
        assert outer(kind)(right) is right and outer(kind)(right, other=3) is right
        for arguments in ((wrong,), (right, "x")):
            with pytest.raises(TypeCheckError, match="whilst checking the parameters"):
                outer(kind)(*arguments)
        with pytest.raises(TypeCheckError, match="whilst checking the return value"):
            outer(kind, given=4)(right)
    # Arguments alone, and with what is returned, of three kinds with two defaults.
    assert sum(function.__name__ == "inner" for function in made) == 12, "not 30, for each time that one is made"
    assert outer([1].__class__)([]) == [], "a kind that was not seen before"


def test_what_stands_in_the_package_is_checked():
    with pytest.raises(TypeCheckError, match="side_by_side"):
        side_by_side(print, "two")
