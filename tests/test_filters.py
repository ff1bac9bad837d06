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


def test_a_text_in_double_quotes_is_told_as_such(database):
    with pytest.raises(FilterError, match="No field named train") as raised:
        database.count('split = "train"')
    assert "Is train a text? Texts take single quotes: 'train'." in str(
        raised.value
    ) and "Columns are: sample_id" in str(raised.value)
    assert "content_hash" not in str(raised.value), "a column of ours"
    with pytest.raises(FilterError, match="Is train a text"):
        database.count("split = train")
    with pytest.raises(FilterError) as raised:
        database.count("stars.a = 1")
    assert "Is " not in str(raised.value)


def test_a_filter_that_stops_lance_is_told_as_a_filter(database):
    """Lance's own code comes to a stop over it; the table is not damaged."""
    with pytest.raises(FilterError, match="cannot be answered: Lance gave up over it"):
        database.count("CAST(stars AS DECIMAL(99, 99)) > 0")
    with pytest.raises(FilterError, match="cannot be answered: Lance gave up over it"):
        database.count("DATE 1 OR stars > 0")
    with pytest.raises(FilterError, match="is not understood: .*Cannot access field"):
        database.count("stars.a = 1")
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


def nested(before, inmost, behind, count):
    return before * count + inmost + behind * count


# Each ended the process, or never came to an end, in fewer than 10,000 characters.
TOO_DEEP = {
    "comparisons": "ok" + " = ok" * 700,
    "inequalities": "ok" + " <> ok" * 700,
    "comparisons in parentheses": "ok" + " = (ok)" * 700,
    "after a comparison": "stars = 1" + " = ok" * 700,
    "of both": "ok" + " = ok" * 100 + " = (ok" + " = ok" * 100 + ")",
    "intervals": "INTERVAL " * 400 + "ok",
    "patterns": "split" + " RLIKE split" * 400,
    "zones": "split" + " AT TIME ZONE 'x'" * 300,
    "exclusive": "ok" + " XOR ok" * 900,
    "arrays": nested("ARRAY[", "1", "]", 48) + " IS NULL",
    "lists": nested("[", "1", "]", 48) + " IS NULL",
    "structs": nested("{'a': ", "1", "}", 48) + " IS NULL",
    "negations": nested("NOT (", "ok", ")", 40),
    "casts": nested("CAST(", "ok", " AS BOOLEAN)", 120),
    "defaults": nested("coalesce(", "ok", ", ok)", 12),
    "other defaults": nested("nvl(", "ok", ", ok)", 12),
    "defaults in parentheses": nested("(ok = ifnull(", "ok", ", ok))", 10),
    "lengths": nested("length(", "stars", ")", 20) + " = 1",
    "ranges": "ok" + " NOT BETWEEN ok AND ok" * 25,
    "alternatives in a call": "coalesce(ok" + " OR ok" * 1000 + ", ok)",
    "intervals within casts": nested("CAST(", "INTERVAL " * 20 + "ok", " AS TEXT)", 3),
    "alternatives": "ok" + " and ok" * 60_000,
    "a text in dollars": "$$'$$ = (" + " = ".join(["ok"] * 900) + ") = $$'$$",
}


@pytest.mark.parametrize("kind", TOO_DEEP)
def test_what_would_end_the_process_or_never_end_is_refused(kind):
    with pytest.raises(FilterError, match=r"wanted at most|which no filter needs"):
        checked_filter(TOO_DEEP[kind])


def test_what_is_long_for_good_reasons_is_answered(database):
    ids = ", ".join(f"'id-{number:030}'" for number in range(100_000))
    numbers = ", ".join(f"-{number}" for number in range(100_000))
    long = [
        f"sample_id NOT IN ({ids})",
        f"stars NOT IN ({numbers}) OR stars = 0",
        "(stars >= 0" + " AND stars >= 0" * 900 + ")",
        " OR ".join(f"stars BETWEEN {number} AND {number}" for number in range(250)),
        "+".join(["abs(stars)"] * 40) + " >= 0",
        nested("(", "ok OR true", ")", 20).replace("ok", "stars < 0"),
        "prompt != '" + "x" * 1_000_000 + "'",
        "prompt != '" + "[{$$?#" * 30 + "'",
    ]
    assert [database.count(where) for where in long] == [24] * len(long)


def test_a_filter_longer_than_any_is_refused():
    with pytest.raises(FilterError, match="has 16,777,217 characters; wanted at most 16,777,216"):
        checked_filter("a" * ((1 << 24) + 1))
    with pytest.raises(FilterError, match="a quote is not closed"):
        checked_filter('split = "train')
