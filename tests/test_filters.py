"""Which functions a filter may call: none that ends the process, takes what memory it likes, or draws by lot."""

import pytest

from rapidin_vdb.errors import FilterError
from rapidin_vdb.store.filters import FUNCTIONS, checked_filter

ARGUMENTS = {
    ("abs", "exp", "ln", "log", "log10", "log2", "round", "sqrt", "trunc"): "stars",
    ("isnan", "iszero"): "loss",
    ("power",): "stars, 2",
    ("coalesce", "concat", "contains", "ends_with", "greatest", "ifnull", "instr", "least", "nullif", "nvl"): "source, 'x'",
    ("regexp_count", "regexp_like", "starts_with", "strpos"): "source, 'x'",
    ("concat_ws",): "'-', source, 'x'",
    ("left", "right"): "source, 1",
    ("split_part",): "source, 'x', 1",
}  # fmt: skip


def test_every_function_that_is_named_can_be_called(database):
    arguments = {name: given for names, given in ARGUMENTS.items() for name in names}
    for name in FUNCTIONS:
        # Written as one may.
        assert database.count(f"{name.title()} ({arguments.get(name, 'source')}) IS NOT NULL") == 24, name


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("random() > 0.5", "random"),
        ("stars > 1 AND Random\n() > 0.5", "Random"),
        ("uuid() = 'a'", "uuid"),
        ("length(repeat(prompt, 60000000)) > 5", "repeat"),
        ("lpad(prompt, 2147483647) = 'a'", "lpad"),
        ("array_length(range(0, 1000000000)) > 0", "array_length"),
        ("arrow_cast(prompt, 'Decimal128(99, 99)') > 0", "arrow_cast"),
        ('"random"() > 0.5', "what is quoted"),
        ("`random` () > 0.5", "what is quoted"),
        ("current_date > '2020-01-01'", "current_date"),
        ("EXISTS (SELECT 1)", "EXISTS"),
    ],
)
def test_other_functions_are_refused(where, name):
    with pytest.raises(FilterError, match=f"(?s)the filter calls {name}: .*; wanted functions among: abs, "):
        checked_filter(where)


def test_what_only_looks_like_a_call_is_none(database):
    allowed = [
        "prompt != 'random() > 0.5'", "stars IN (0, 1, 2, 3, 4)", "(stars >= 0) AND (stars < 9)", "NOT (stars > 9)",
        "stars BETWEEN (0) AND (4)", "CAST (stars AS FLOAT) >= 0", "source LIKE ('%')", "prompt != 'repeat' AND (stars >= 0)",
    ]  # fmt: skip
    assert [database.count(where) for where in allowed] == [24] * len(allowed)


def test_a_filter_that_stops_lance_is_told_as_a_filter(database):
    """Lance's own code comes to a stop over it; the table is not damaged."""
    with pytest.raises(FilterError, match="cannot be answered: Lance gave up over it"):
        database.count("CAST(stars AS DECIMAL(99, 99)) > 0")
    with pytest.raises(FilterError, match="is not understood: .*Arithmetic overflow"):
        database.count("-(-9223372036854775807 - 1) > stars")
    assert database.count() == 24


def test_a_delete_tells_what_it_did(database, monkeypatch):
    """Also where the filter should give another answer each time."""
    monkeypatch.setattr("rapidin_vdb.store.table.checked_filter", lambda where: "(random() > 0.5)")
    for _ in range(4):
        before = database.count()
        said = database.delete(where="stars >= 0")
        assert database.count() == before - said


def test_ids_that_are_no_text_are_not_there(database):
    assert database.delete(ids=["\ud800", "toy-001"]) == ["toy-001"]
    assert database.count() == 23
