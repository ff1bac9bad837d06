"""Epochs times learning rate: every score, and every error of one, is multiplied by it, whatever is asked."""

import math

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.question import Question

ASKED = ("Say 5", "blue 35")
# Of results, counts and places: of what is no influence.
AS_THEY_ARE = {
    "rank", "searched", "start", "end", "token_index", "samples", "counts", "matching", "without_tokens",
    "groups_left_out", "metadata", "value", "focus",
}  # fmt: skip
# Seconds are measured; a note is a text, which `test_uncertainty` reads; and they are two databases.
NOT_COMPARED = {"seconds", "note", "identity", "table_version"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, models, adapters):
    """Two databases of one corpus, whose scores are once and 1.5 times the inner products."""
    folder = tmp_path_factory.mktemp("factor")
    lines = write_jsonl(folder / "toy.jsonl", toy_records(24))
    made = [
        rapidin_vdb.init(
            folder / name,
            model=str(models["llama"]),
            adapter=str(adapters["llama"]),
            width=64,
            normalize="layer",
            **more,
        )
        for name, more in (("plain", {}), ("scaled", {"epochs": 3.0, "learning_rate": 0.5}))
    ]
    for database in made:
        database.ingest(lines, token_gradients=True, token_width=16, batch_tokens=900)
    return made


def scaled_numbers(one, other, key="", size=0.0) -> list[str]:
    """Compare two answers, and return the names of those numbers that the factor has a part in."""
    if key in NOT_COMPARED:
        return []
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        size = max((abs(value) for value in one.values() if isinstance(value, float)), default=size)
        found = []
        for name, value in one.items():
            inner = AS_THEY_ARE if key in AS_THEY_ARE else {name}
            found += scaled_numbers(value, other[name], key if key in inner else name, size)
        return found
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        size = max((abs(value) for value in one if isinstance(value, float)), default=size)
        return [name for pair in zip(one, other, strict=True) for name in scaled_numbers(*pair, key, size)]
    if isinstance(one, float) and key not in AS_THEY_ARE:
        # A difference of two scores has the rounding of both.
        assert other == pytest.approx(1.5 * one, rel=1e-5, abs=1e-6 * max(size, 1e-3)), key
        return [key] if abs(one) > 1e-4 else []
    assert one == other, key
    return []


@pytest.mark.parametrize(
    ("options", "with_factor"),
    [
        ({}, {"score", "score_error"}),
        ({"both": True}, {"score", "score_error"}),
        ({"harmful": True}, {"score", "score_error"}),
        ({"group_by": "source"}, {"score", "error"}),
        ({"group_by": "stars", "aggregate": "mean"}, {"score", "error"}),
        # Of a group of one sample the length is known, not probed.
        ({"group_by": "sample_id"}, {"score", "error"}),
        ({"histogram": 7}, {"edges"}),
        ({"focus": ["35"]}, {"score", "score_error"}),
        ({"refine": 6}, {"score", "exact_score", "difference"}),
        ({"refine": 24, "both": True}, {"score", "exact_score", "difference"}),
        ({"tokens": True}, {"score", "exact_score", "difference"}),
        ({"matrix": True}, {"exact_score", "matrix"}),
        ({"matrix": True, "tokens": True, "focus": [(5, 7)]}, {"exact_score", "matrix"}),
        ({"level": "token"}, {"score"}),
        ({"level": "token", "both": True, "focus": ["blue"]}, {"score"}),
    ],
)
def test_every_number_of_an_answer_has_the_factor(pair, options, with_factor):
    plain, scaled = (database.query(*ASKED, top_k=8, **options)[0].to_dict() for database in pair)
    assert set(scaled_numbers(plain, scaled)) >= with_factor
    assert math.isfinite(plain["results"][0]["score"])


@pytest.mark.parametrize(
    "options", [{}, {"both": True}, {"group_by": "source", "aggregate": "mean"}, {"histogram": 5, "harmful": True}]
)
def test_so_has_every_number_of_what_a_stored_sample_taught(pair, options):
    question = Question(top_k=5, **options)
    plain, scaled = (database.nearest("toy-005", question).to_dict() for database in pair)
    assert "score" in scaled_numbers(plain, scaled)


def test_what_an_exact_score_is_names_the_factor(pair):
    for database in pair:
        (refined,) = database.query(*ASKED, top_k=3, refine=2)
        unit, _, again = refined.score_unit.partition("; ")
        assert unit == "epochs * learning_rate * inner product of RapidGrads (Eq. 5)"
        assert again == (
            "the first 2 are ranked by exact_score, epochs * learning_rate * the inner product of full gradients"
        )
