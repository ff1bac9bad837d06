"""Law 5: any number of shards gives the float64 brute force, ids and scores, with and without a filter, ties by id."""

import itertools
import json

import numpy as np
import pytest
from reference import top_k

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index import build_index, list_manifests, load_index, save_index
from rapidin_vdb.recipe import IndexRecipe

WIDTH = 64


def rows(count: int, *, seed: int = 0, ties: bool = False) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((count, WIDTH)).astype(np.float16)
    if ties:
        vectors = vectors[draw.integers(0, max(count // 10, 1), count)]
    names = [f"s{number:04d}" for number in draw.permutation(count)]
    return dict(zip(names, vectors, strict=True))


def index_of(vectors, *, shards=1, element_type="float16", batch=7, devices=("cpu",)):
    names = list(vectors)
    batches = [
        (names[start : start + batch], np.stack([vectors[name] for name in names[start : start + batch]]))
        for start in range(0, len(names), batch)
    ]
    recipe = IndexRecipe(name="test", devices=devices, shards_per_device=shards, element_type=element_type)
    return build_index(recipe, batches, width=WIDTH, count=len(names))


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
        found = index.search(asked, k, among=among)
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
        recipe = IndexRecipe(name="test", shards_per_device=1)
        index = build_index(recipe, [(names, np.stack([row] * 60))], width=1 << 16, count=60)
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
    (ranked,) = index_of(vectors).search(queries(1), 5, among=["s0003", "gone", "s0004"])
    assert_same(ranked, top_k({name: vectors[name] for name in ("s0003", "s0004")}, queries(1)[0], 5))


def test_a_gpu_that_is_not_there_is_searched_on_the_cpu():
    vectors = rows(50)
    index = index_of(vectors, devices=("cuda:7", "cuda:8"))
    (ranked,) = index.search(queries(1), 5)
    assert_same(ranked, top_k(vectors, queries(1)[0], 5))
    assert [shard.rows for shard in index.shards] == [25, 25]


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
def test_a_saved_index_answers_as_before(tmp_path, element_type):
    vectors = rows(60)
    index = index_of(vectors, shards=2, element_type=element_type)
    save_index(index, tmp_path, table="samples", table_version=3, table_digest="d")
    manifest = save_index(index, tmp_path, table="samples", table_version=4, table_digest="d")
    assert list_manifests(tmp_path) == [manifest]
    assert (manifest.table_version, manifest.samples, manifest.recipe["element_type"]) == (4, 60, element_type)
    assert load_index(tmp_path, manifest).search(queries(3), 9) == index.search(queries(3), 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test"], "nothing is left lying about"


def test_a_damaged_index_is_not_believed(tmp_path):
    manifest = save_index(index_of(rows(30)), tmp_path, table="samples", table_version=1, table_digest="d")
    ids = tmp_path / "test" / "sample_ids.json"
    ids.write_text(json.dumps(json.loads(ids.read_text())[:-1]))
    with pytest.raises(
        SpecError, match="the index test is damaged: the number of rows differs from the manifest; build it anew"
    ):
        load_index(tmp_path, manifest)
    (tmp_path / "test" / "shard_0.faiss").write_bytes(b"nonsense")
    with pytest.raises(SpecError, match="the index test is damaged"):
        load_index(tmp_path, manifest)
    (tmp_path / "test" / "manifest.json").write_text("{")
    assert list_manifests(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:0", "cuda:0")])
@pytest.mark.parametrize("element_type", ["float16", "float32"])
def test_gpus_change_nothing(devices, element_type):
    vectors, asked = rows(500, ties=True), queries(5)
    index = index_of(vectors, devices=devices, element_type=element_type)
    for among in (None, sorted(vectors)[:100]):
        allowed = vectors if among is None else {name: vectors[name] for name in among}
        for query, ranked in zip(asked, index.search(asked, 10, among=among), strict=True):
            assert_same(ranked, top_k(allowed, query, 10))
