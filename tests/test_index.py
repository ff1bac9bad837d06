"""Law 5: any number of shards gives the float64 brute force, ids and scores, with and without a filter, ties by id."""

import itertools

import numpy as np
import pytest
from reference import top_k

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index import Batch, Keys, Texts, empty_index
from rapidin_vdb.recipe import IndexRecipe

WIDTH = 64


def rows(count: int, *, seed: int = 0, ties: bool = False) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((count, WIDTH)).astype(np.float16)
    if ties:
        vectors = vectors[draw.integers(0, max(count // 10, 1), count)]
    names = [f"s{number:04d}" for number in draw.permutation(count)]
    return dict(zip(names, vectors, strict=True))


def batches_of(vectors, *, batch=7, first=0, version=1):
    names = list(vectors)
    for start in range(0, len(names), batch):
        part = names[start : start + batch]
        row_ids = np.arange(first + start, first + start + len(part))
        keys = Keys(Texts.of(part), row_ids, np.full(len(part), version), np.ones(len(part), bool))
        yield Batch(keys, np.stack([vectors[name] for name in part]).view(np.uint16))


def recipe_of(*, shards=1, devices=("cpu",), **options):
    return IndexRecipe(name="test", devices=devices, shards_per_device=shards, **options)


def index_of(vectors, *, width=WIDTH, batch=7, **options):
    index = empty_index(recipe_of(**options), width=width)
    return index.updated(index.keys, batches_of(vectors, batch=batch))


def row_ids_of(vectors, names):
    """`batches_of` numbers rows in order."""
    places = {name: place for place, name in enumerate(vectors)}
    return np.array([places.get(name, 10**6) for name in names], dtype=np.int64)


def queries(count: int) -> np.ndarray:
    return np.random.default_rng(99).standard_normal((count, WIDTH)).astype(np.float32)


def assert_same(found, expected):
    assert [name for name, _ in found] == [name for name, _ in expected]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("element_type", ["float16", "float32"])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("share", [None, 0.0, 0.01, 0.5, 1.0])
def test_shards_change_nothing(shards, element_type, share, ties):
    vectors = rows(500, ties=ties)
    index = index_of(vectors, shards=shards, element_type=element_type)
    among = None if share is None else sorted(vectors)[: int(500 * share)]
    allowed = vectors if among is None else {name: vectors[name] for name in among}
    asked = queries(5)
    for k in (1, 10, 499, 2000):
        found = index.search(asked, k, among=None if among is None else row_ids_of(vectors, among))
        for query, ranked in zip(asked, found, strict=True):
            assert_same(ranked, top_k(allowed, query, k))
    if ties:
        ranked = index.search(asked[:1], 500)[0]
        equal = [(a[0], b[0]) for a, b in itertools.pairwise(ranked) if a[1] == b[1]]
        assert len(equal) > 300 and all(first < second for first, second in equal)


def test_a_tie_wider_than_the_candidates_is_still_cut_by_id():
    vectors = {f"s{number:03d}": np.ones(WIDTH, np.float16) for number in reversed(range(300))}
    for shards in (1, 3):
        (ranked,) = index_of(vectors, shards=shards).search(np.ones((1, WIDTH), np.float32), 5)
        assert ranked == [(f"s{number:03d}", float(WIDTH)) for number in range(5)]


def test_equal_rows_of_full_width_are_cut_by_id_whatever_float32_makes_of_them():
    """FAISS errs by more than an ulp at this width, and could stop looking before the first ids."""
    for seed in (10, 31):
        draw = np.random.default_rng(seed)
        row = draw.standard_normal(1 << 16).astype(np.float16)
        names = [f"s{number:03d}" for number in draw.permutation(60)]
        index = index_of({name: row for name in names}, width=1 << 16)
        query = row.astype(np.float32) + draw.standard_normal(1 << 16).astype(np.float32)
        (ranked,) = index.search(query[None], 10)
        assert [name for name, _ in ranked] == [f"s{number:03d}" for number in range(10)]


def test_harmful_is_helpful_of_the_negated_query():
    vectors, asked = rows(200), queries(2)
    index = index_of(vectors, shards=2)
    for query, ranked in zip(asked, index.search(-asked, 7), strict=True):
        worst = sorted(top_k(vectors, query, 200), key=lambda pair: (pair[1], pair[0]))[:7]
        assert_same([(name, -score) for name, score in ranked], worst)


def test_a_query_does_not_depend_on_its_neighbours():
    index, asked = index_of(rows(300, ties=True), shards=2), queries(40)
    together = index.search(asked, 12)
    assert together == [index.search(asked[number : number + 1], 12)[0] for number in range(40)]


def test_more_shards_than_rows_and_no_rows_at_all():
    vectors = rows(2)
    (ranked,) = index_of(vectors, shards=5).search(queries(1), 10)
    assert_same(ranked, top_k(vectors, queries(1)[0], 10))
    assert index_of({}, shards=2).search(queries(2), 3) == [[], []]
    with pytest.raises(SpecError, match="top_k is 0; wanted 1 or more"):
        index_of(vectors).search(queries(1), 0)


def test_ids_that_are_not_in_the_index_are_passed_over():
    vectors = rows(20)
    (ranked,) = index_of(vectors).search(queries(1), 5, among=row_ids_of(vectors, ["s0003", "gone", "s0004"]))
    assert_same(ranked, top_k({name: vectors[name] for name in ("s0003", "s0004")}, queries(1)[0], 5))


def test_a_gpu_that_is_not_there_is_searched_on_the_cpu():
    vectors = rows(50)
    index = index_of(vectors, devices=("cuda:7", "cuda:8"))
    (ranked,) = index.search(queries(1), 5)
    assert_same(ranked, top_k(vectors, queries(1)[0], 5))
    assert [shard.rows for shard in index.shards] == [28, 22], "whole batches go to the smallest shard"


def test_large_scores_of_wide_vectors_come_out_exact():
    """Where float32 sums err, the candidates must still hold the best."""
    draw = np.random.default_rng(5)
    query = draw.standard_normal(WIDTH).astype(np.float32) * 1e3
    base = draw.standard_normal(WIDTH) * 100
    vectors = {
        f"s{number:03d}": (base + draw.standard_normal(WIDTH) * 1e-1).astype(np.float16) for number in range(400)
    }
    (ranked,) = index_of(vectors, shards=2).search(query[None], 20)
    assert_same(ranked, top_k(vectors, query, 20))


@pytest.mark.parametrize("element_type", ["float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_both_ends_come_from_one_pass(shards, element_type, count):
    vectors, asked = rows(200, ties=True), queries(count)
    index = index_of(vectors, shards=shards, element_type=element_type)
    for among in (None, sorted(vectors)[:50]):
        row_ids = None if among is None else row_ids_of(vectors, among)
        highest, lowest = index.search_both(asked, 7, among=row_ids)
        assert highest == index.search(asked, 7, among=row_ids)
        for query, ranked in zip(asked, lowest, strict=True):
            allowed = vectors if among is None else {name: vectors[name] for name in among}
            worst = sorted(top_k(allowed, query, 200), key=lambda pair: (pair[1], pair[0]))[:7]
            assert_same(ranked, worst)


@pytest.mark.parametrize("element_type", ["float16", "float32"])
@pytest.mark.parametrize("count", [1, 40])
def test_groups_add_up_all_of_their_samples(element_type, count):
    vectors, asked = rows(150), queries(count)
    index = index_of(vectors, shards=2, element_type=element_type)
    names = list(vectors)[:140]  # ten samples are filtered out
    groups = np.arange(140) % 3
    order = np.random.default_rng(0).permutation(140)
    sums = index.group_sums(asked, row_ids_of(vectors, names)[order], groups[order], 3)
    for number, query in enumerate(asked):
        slow = [
            sum(float(vectors[name].astype(np.float64) @ query.astype(np.float64)) for name in names[group::3])
            for group in range(3)
        ]
        np.testing.assert_allclose(sums[number], slow, atol=1e-4)


@pytest.mark.parametrize("element_type", ["float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_updated_index_is_as_one_made_anew(shards, element_type):
    """Rows go, rows come, a row is replaced; and going back to the older version undoes all of it."""
    vectors, later, asked = rows(100), rows(130, seed=4), queries(4)
    old = {name: vectors[name] for name in list(vectors)[:90]}
    index = index_of(old, shards=shards, element_type=element_type)
    versions = np.full(90, 1)
    gone, replaced = list(old)[5], list(old)[6]
    kept = np.array([place for place in range(90) if place not in (5, 6)])
    # Row 6 keeps its row id with another content; rows 90 to 99 are new.
    now = {name: old[name] for place, name in enumerate(old) if place not in (5, 6)}
    more = {replaced: later["s0120"]} | {f"n{number}": later[f"s{number:04d}"] for number in range(10)}
    row_ids, changed = np.concatenate([kept, [6], np.arange(90, 100)]), np.concatenate([versions[kept], np.full(11, 2)])
    keys, missing = index.keys.difference(row_ids, changed)
    assert missing.tolist() == [6, *range(90, 100)]
    batch = Batch(
        Keys(Texts.of(more), missing, np.full(11, 2), np.ones(11, bool)), np.stack(list(more.values())).view(np.uint16)
    )
    updated = index.updated(keys, [batch])
    assert updated.samples == len(now | more) == 99
    for k in (1, 20, 200):
        for query, ranked in zip(asked, updated.search(asked, k), strict=True):
            assert_same(ranked, top_k(now | more, query, k))
    (ranked,) = updated.search(asked[:1], 3, among=np.array([5, 6, 95]))
    assert {name for name, _ in ranked} == {replaced, "n5"}, "what is gone is not found by its row id either"
    keys, missing = updated.keys.difference(np.arange(90), versions)
    assert len(missing) == 0, "all of the older version is still held"
    back = updated.updated(keys, [])
    for query, ranked in zip(asked, back.search(asked, 30), strict=True):
        assert_same(ranked, top_k(old, query, 30))
    assert gone in {name for name, _ in back.search(asked, 90)[0]}


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:0", "cuda:0")])
@pytest.mark.parametrize("element_type", ["float16", "float32"])
def test_gpus_change_nothing(devices, element_type):
    vectors, asked = rows(500, ties=True), queries(5)
    index = index_of(vectors, devices=devices, element_type=element_type)
    for among in (None, sorted(vectors)[:100]):
        allowed = vectors if among is None else {name: vectors[name] for name in among}
        row_ids = None if among is None else row_ids_of(vectors, among)
        for query, ranked in zip(asked, index.search(asked, 10, among=row_ids), strict=True):
            assert_same(ranked, top_k(allowed, query, 10))
