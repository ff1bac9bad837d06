"""Built indexes on disk: whatever the recipe, an answer is that of the rows in memory; and never that of damaged files."""

import errno
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import top_k
from test_index import WIDTH, assert_same, batches_of, queries, recipe_of, row_ids_of, rows

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index import (
    Batch,
    Held,
    Keys,
    TableSource,
    Texts,
    empty_index,
    extend_index,
    list_manifests,
    load_index,
    load_keys,
    make_shard,
    measured_recall,
    with_recall,
    write_index,
    writing,
)
from rapidin_vdb.index import source as sources
from rapidin_vdb.index.coarse import folded
from rapidin_vdb.index.half import exact_inner_products, inner_products
from rapidin_vdb.index.manifest import checksum_of
from rapidin_vdb.index.source import ahead
from rapidin_vdb.recipe import IndexRecipe, read_recipe, shipped_recipes


def held(version=1, digest="d", width=WIDTH):
    return Held(table="samples", version=version, digest=digest, width=width)


def write(folder, recipe, vectors, width=WIDTH):
    return write_index(folder, recipe, held(width=width), batches_of(vectors), count=len(vectors))


RECIPES = [
    {"shards": 1}, {"shards": 3}, {"shards": 2, "element_type": "float32"}, {"shards": 2, "residence": "mapped"},
    {"shards": 1, "residence": "streamed"}, {"shards": 3, "residence": "streamed"},
]  # fmt: skip


@pytest.mark.parametrize("options", RECIPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 150])
def test_a_written_index_answers_as_brute_force(tmp_path, options, count, monkeypatch):
    monkeypatch.setattr(sources, "_READ_BYTES", 2 * WIDTH * 11)  # several reads a file
    vectors = rows(count, ties=True)
    index = load_index(tmp_path, write(tmp_path, recipe_of(**options), vectors))
    assert index.samples == count
    for asked, share in itertools.product((queries(1), queries(3), queries(40)), (None, 0.0, 0.02, 0.5, 1.0)):
        among = None if share is None else sorted(vectors)[: int(count * share)]
        allowed = vectors if among is None else {name: vectors[name] for name in among}
        found = index.search(asked, 9, among=None if among is None else row_ids_of(vectors, among))
        for query, ranked in zip(asked, found, strict=True):
            assert_same(ranked, top_k(allowed, query, 9))


@pytest.mark.parametrize("options", RECIPES, ids=str)
def test_a_difference_is_written_beside_what_is_there(tmp_path, options):
    vectors, asked = rows(80), queries(3)
    manifest = write(tmp_path, recipe_of(**options), vectors)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "test").glob("*.rows.npy")}
    row_ids = np.concatenate([np.arange(70), np.arange(80, 95)])  # ten are gone, fifteen are new
    keys, missing = load_keys(tmp_path, manifest).difference(row_ids, np.where(row_ids < 80, 1, 2))
    more = {f"n{number:02d}": vector for number, vector in enumerate(list(rows(15, seed=8).values()))}
    manifest = extend_index(
        tmp_path, manifest, held(2), keys, batches_of(more, first=80, version=2), count=len(missing)
    )
    assert (manifest.samples, manifest.table_version, list_manifests(tmp_path)) == (85, 2, [manifest])
    now = {name: vectors[name] for name in list(vectors)[:70]} | more
    for query, ranked in zip(asked, load_index(tmp_path, manifest).search(asked, 100), strict=True):
        assert_same(ranked, top_k(now, query, 100))
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "test").glob("*.rows.npy")}
    assert before.items() <= after.items(), "what was there is not written again"
    assert len(after) == len(before) + 1
    # Once more, with nothing but a deletion; and nothing that the manifest does not name is left lying about.
    keys, missing = load_keys(tmp_path, manifest).difference(row_ids[1:], np.where(row_ids[1:] < 80, 1, 2))
    manifest = extend_index(tmp_path, manifest, held(3), keys, [], count=0)
    del now[next(iter(now))]
    for query, ranked in zip(asked, load_index(tmp_path, manifest).search(asked, 100), strict=True):
        assert_same(ranked, top_k(now, query, 100))
    assert len([path for path in (tmp_path / "test").iterdir() if path.name.startswith("gone")]) == 1


def test_writing_again_replaces_and_leaves_nothing(tmp_path):
    write(tmp_path, recipe_of(shards=2), rows(30))
    manifest = write(tmp_path, recipe_of(shards=2), rows(40, seed=2))
    assert list_manifests(tmp_path) == [manifest]
    assert len(list((tmp_path / "test").glob("*.npy"))) == 8
    assert load_index(tmp_path, manifest).samples == 40


def test_a_write_that_fails_leaves_the_older_index(tmp_path):
    vectors = rows(30)
    manifest = write(tmp_path, recipe_of(), vectors)

    def broken():
        yield from itertools.islice(batches_of(vectors), 2)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_index(tmp_path, recipe_of(), held(2), broken(), count=30)
    assert list_manifests(tmp_path) == [manifest]
    (ranked,) = load_index(tmp_path, manifest).search(queries(1), 5)
    assert_same(ranked, top_k(vectors, queries(1)[0], 5))
    manifest = write(tmp_path, recipe_of(), vectors)
    assert len(list((tmp_path / "test").glob("*.npy"))) == 4, "the next one takes away what it left"


def test_packed_texts_are_those_of_a_list():
    lists = [["a", "", "\u9ec4\0x", "é" * 300], [], ["", "b"], [f"t{number}" for number in range(50)]]
    flat = [text for texts in lists for text in texts]
    joined = Texts.joined(map(Texts.of, lists))
    for packed in (joined, Texts([joined.packed()]), Texts.of(flat), Texts.joined([joined, Texts.of([])])):
        assert list(packed) == flat and len(packed) == len(flat)
        assert [packed[number] for number in range(-len(flat), len(flat))] == flat + flat
        assert list(packed[2:40:3]) == flat[2:40:3] and packed[:2][1] == ""
        for number in (len(flat), -len(flat) - 1):
            with pytest.raises(IndexError):
                packed[number]
    ends, content = joined.packed()
    for wrong in (ends[:-1], ends + 1, ends[::-1].copy()):
        with pytest.raises(ValueError, match="do not fit"):
            Texts([(wrong, content)])


@pytest.mark.parametrize("options", [{"shards": 1}, {"shards": 1, "residence": "streamed"}], ids=str)
@pytest.mark.parametrize(
    "damage", ["ids", "ends", "ids gone", "keys", "rows short", "rows wide", "rows nonsense", "gone"]
)
def test_a_damaged_index_is_not_believed(tmp_path, damage, options):
    manifest = write(tmp_path, recipe_of(**options), rows(30))
    keys, _ = load_keys(tmp_path, manifest).difference(np.arange(25), np.ones(25, np.int64))
    manifest = extend_index(tmp_path, manifest, held(2), keys, [], count=0)
    load_index(tmp_path, manifest)
    place, name = tmp_path / "test", manifest.parts[0].name
    files = {
        "ids": f"{name}.ids.npy",
        "ends": f"{name}.ends.npy",
        "keys": f"{name}.keys.npy",
        "rows": f"{name}.rows.npy",
        "gone": manifest.gone,
    }
    path = place / files[damage.split()[0]]
    if damage in ("ids", "ends"):
        np.save(path, np.load(path)[:-1])
    elif damage == "rows short":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "rows wide":
        np.save(path, np.zeros((30, WIDTH // 2), np.float16))
    elif damage == "ids gone":
        path.unlink()
    else:
        path.write_bytes(b"nonsense")
    with pytest.raises(SpecError, match="the index test is damaged: .*; build it anew with: rapidin-vdb index"):
        load_index(tmp_path, manifest)
    (place / "manifest.json").write_text("{")
    assert list_manifests(tmp_path) == []


def test_an_index_larger_than_memory_is_mapped(tmp_path, monkeypatch, caplog):
    vectors = rows(30)
    manifest = write(tmp_path, recipe_of(shards=2), vectors)
    monkeypatch.setattr("rapidin_vdb.index.loading.free_bytes", lambda device: 4000)
    index = load_index(tmp_path, manifest)
    assert all(isinstance(array, np.memmap) for shard in index.shards for array in shard.source.arrays)
    assert "does not fit into memory: mapping its files" in caplog.text
    (ranked,) = index.search(queries(1), 5)
    assert_same(ranked, top_k(vectors, queries(1)[0], 5))


def test_rows_that_fail_while_they_are_streamed_are_told(tmp_path):
    manifest = write(tmp_path, recipe_of(residence="streamed"), rows(30))
    index = load_index(tmp_path, manifest)
    path = tmp_path / "test" / f"{manifest.parts[0].name}.rows.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SpecError, match="ends too early; build the index anew with: rapidin-vdb index"):
        index.search(queries(1), 3)


@pytest.mark.parametrize("residence", ["mapped", "streamed"])
def test_an_index_that_is_open_outlives_its_files(tmp_path, residence):
    vectors = rows(30)
    index = load_index(tmp_path, write(tmp_path, recipe_of(residence=residence), vectors))
    write(tmp_path, recipe_of(residence=residence), rows(5, seed=3))  # somebody else builds it anew
    for asked in (queries(1), queries(40)):
        for query, ranked in zip(asked, index.search(asked, 5), strict=True):
            assert_same(ranked, top_k(vectors, query, 5))


def test_an_index_that_was_changed_meanwhile_is_not_extended(tmp_path):
    manifest = write(tmp_path, recipe_of(), rows(30))
    keys, _ = load_keys(tmp_path, manifest).difference(np.arange(25), np.ones(25, np.int64))
    other = write(tmp_path, recipe_of(), rows(40, seed=3))
    with pytest.raises(SpecError, match="the index test was changed by somebody else meanwhile"):
        extend_index(tmp_path, manifest, held(2), keys, [], count=0)
    assert list_manifests(tmp_path) == [other] and load_index(tmp_path, other).samples == 40


def test_a_table_is_searched_without_an_index():
    vectors, asked = rows(60, ties=True), queries(2)
    stacked = np.stack(list(vectors.values()))
    row_ids = np.arange(60) + 1000

    def scan():
        for first in range(0, 60, 13):
            yield row_ids[first : first + 13], stacked[first : first + 13]

    def take(wanted):
        for row_id in sorted(wanted.tolist(), reverse=True):  # the table answers in an order of its own
            yield np.array([row_id]), stacked[[row_id - 1000]]

    source = TableSource(row_ids, scan, take, WIDTH)
    shard = make_shard("cpu", source, recipe_of(), width=WIDTH)
    from rapidin_vdb.index import ShardedIndex

    index = ShardedIndex(
        recipe=recipe_of(), width=WIDTH, keys=Keys(Texts.of(vectors), row_ids, np.ones(60, np.int64), np.ones(60, bool)),
        shards=(shard,), numbers=(np.arange(60),), largest_norm=None,
    )  # fmt: skip
    assert not index.grows
    for share in (None, 3, 50):
        among = None if share is None else list(vectors)[:share]
        allowed = vectors if among is None else {name: vectors[name] for name in among}
        found = index.search(asked, 10, among=None if among is None else row_ids_of(vectors, among) + 1000)
        for query, ranked in zip(asked, found, strict=True):
            assert_same(ranked, top_k(allowed, query, 10))


def test_reading_ahead_hands_on_errors_and_stops_when_nobody_waits():
    reached = []

    def numbers(last):
        for number in range(last):
            reached.append(number)
            yield number
        raise ValueError("at the end")

    with pytest.raises(ValueError, match="at the end"):
        list(ahead(numbers(5)))
    reached.clear()
    for number in ahead(numbers(1000)):
        if number == 3:
            break
    assert len(reached) < 20


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 32, 33, 40])
@pytest.mark.parametrize("picked", [False, True])
@pytest.mark.parametrize("few", [False, True], ids=["one block", "blocks of 7 rows"])
def test_inner_products_of_half_precision_rows(count, picked, few, monkeypatch):
    if few:
        monkeypatch.setattr("rapidin_vdb.index.half._BLOCK_BYTES", 4 * 333 * 7)
    draw = np.random.default_rng(0)
    halves = draw.standard_normal((50, 333)).astype(np.float16)
    halves[3] = 0.0
    halves[4] *= 1e-4  # subnormal
    halves[5, :5] = [65504, -65504, 6e-8, -6e-8, -0.0]
    picks = np.array([3, 4, 5, 17, 18, 19, 30, 44, 49]) if picked else None
    asked = draw.standard_normal((count, 333)).astype(np.float32)
    wanted = halves if picks is None else halves[picks]
    found = inner_products(halves.view(np.uint16), asked, picks)
    slow = asked.astype(np.float64) @ wanted.astype(np.float64).T
    norms = np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(wanted.astype(np.float64), axis=1)
    assert (np.abs(found - slow) <= 1e-6 * norms).all()
    halves.flags.writeable = False  # as rows of a mapped file are
    np.testing.assert_array_equal(inner_products(halves.view(np.uint16), asked, picks), found)
    np.testing.assert_allclose(
        exact_inner_products(wanted.view(np.uint16), asked[0].astype(np.float64)), slow[0], rtol=1e-12, atol=1e-12
    )


def test_folding_is_that_of_the_sketch():
    vectors = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float16)
    narrow = folded(vectors.view(np.uint16), 16).view(np.float16)
    np.testing.assert_allclose(narrow, vectors.astype(np.float64).reshape(20, 16, 4).sum(2) / 2, rtol=1e-3, atol=1e-3)
    with pytest.raises(SpecError, match="folded to width 1, a RapidGrad reaches .*, beyond half precision"):
        folded(np.full((1, 64), 60000, np.float16).view(np.uint16), 1)


def test_coarse_to_fine_scores_are_exact_and_its_recall_is_measured(tmp_path):
    """What is measured is compared with the obvious way in `test_coarse.py`."""
    vectors, asked = rows(400), queries(5)
    recipe = recipe_of(shards=2, coarse_width=16, refine=4)
    index = load_index(tmp_path, write(tmp_path, recipe, vectors))
    found = index.search(asked, 10)
    for query, ranked in zip(asked, found, strict=True):
        scores = dict(top_k(vectors, query, 400))
        assert_same(ranked, sorted(((name, scores[name]) for name, _ in ranked), key=lambda pair: (-pair[1], pair[0])))
    # Every candidate scored again is the exact answer; a quarter of the width misses some of it.
    everything = recipe_of(shards=2, coarse_width=16, refine=40)
    for query, ranked in zip(
        asked, load_index(tmp_path, write(tmp_path, everything, vectors)).search(asked, 10), strict=True
    ):
        assert_same(ranked, top_k(vectors, query, 10))
    recall = measured_recall(index)
    assert (recall["at"], recall["queries"]) == (10, 32)
    assert 0.2 < recall["recall"] < 1.0


def test_coarse_indexes_take_updates(tmp_path):
    vectors, asked = rows(50), queries(2)
    manifest = write(tmp_path, recipe_of(coarse_width=32, refine=100), vectors)
    index = load_index(tmp_path, manifest)
    keys, missing = index.keys.difference(np.arange(5, 55), np.where(np.arange(5, 55) < 50, 1, 2))
    more = {f"n{number}": vector for number, vector in enumerate(rows(5, seed=9).values())}
    now = {name: vectors[name] for name in list(vectors)[5:]} | more
    later = list(batches_of(more, first=50, version=2))
    in_memory = index.updated(keys, later)
    on_disk = load_index(tmp_path, extend_index(tmp_path, manifest, held(2), keys, later, count=len(missing)))
    for query, first, second in zip(asked, in_memory.search(asked, 60), on_disk.search(asked, 60), strict=True):
        assert_same(first, top_k(now, query, 60))
        assert first == second


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_answers(tmp_path, name):
    """Without a GPU, those for GPUs are searched on the CPU."""
    width = 8192
    draw = np.random.default_rng(3)
    vectors = {f"s{number:03d}": draw.standard_normal(width).astype(np.float16) for number in range(60)}
    asked = draw.standard_normal((3, width)).astype(np.float32)
    recipe = read_recipe(name)
    manifest = write_index(tmp_path, recipe, held(width=width), batches_of(vectors), count=60)
    index = load_index(tmp_path, manifest)
    for query, ranked in zip(asked, index.search(asked, 5), strict=True):
        if not recipe.coarse_width:
            assert_same(ranked, top_k(vectors, query, 5))
        else:
            scores = dict(top_k(vectors, query, 60))
            assert all(score == pytest.approx(scores[sample_id], rel=1e-12) for sample_id, score in ranked)


def test_a_batch_larger_than_a_shard_is_cut(tmp_path):
    vectors = rows(10)
    one = next(iter(batches_of(vectors, batch=10)))
    manifest = write_index(tmp_path, IndexRecipe(name="test", shards_per_device=4), held(), [one], count=10)
    assert [part.count for part in manifest.parts] == [3, 3, 2, 2]
    assert isinstance(one, Batch)
    (ranked,) = load_index(tmp_path, manifest).search(queries(1), 10)
    assert_same(ranked, top_k(vectors, queries(1)[0], 10))


@pytest.mark.parametrize("options", [{}, {"residence": "streamed"}, {"element_type": "float32"}, {"coarse_width": 32}])
@pytest.mark.parametrize("there, here", [(2, 5), (5, 2), (1, 3), (2, 64)])
def test_one_shard_a_core_means_the_cores_that_are_here(tmp_path, monkeypatch, options, there, here):
    """Wherever it was built, and after rows came and went."""
    vectors = rows(40)
    monkeypatch.setattr("rapidin_vdb.recipe.cores", lambda: there)
    manifest = write(tmp_path, recipe_of(shards=0, refine=100, **options), vectors)
    keys, _ = load_keys(tmp_path, manifest).difference(np.arange(1, 40), np.ones(39, np.int64))
    more = {f"n{number}": vector for number, vector in enumerate(rows(7, seed=3).values())}
    later = batches_of(more, first=40, version=2)
    manifest = extend_index(tmp_path, manifest, held(2), keys, later, count=7)
    monkeypatch.setattr("rapidin_vdb.recipe.cores", lambda: here)
    index = load_index(tmp_path, manifest)
    shares = [shard.rows for shard in index.shards]
    assert (len(shares), sum(shares), max(shares) - min(shares)) == (here, 47, int(47 % here > 0))
    assert np.concatenate(index.numbers).tolist() == list(range(47))
    alive = {name: vector for place, (name, vector) in enumerate((vectors | more).items()) if place}
    for query, ranked in zip(queries(3), index.search(queries(3), 9), strict=True):
        assert_same(ranked, top_k(alive, query, 9))
    written = write(tmp_path, recipe_of(shards=3, **options), vectors)
    assert len(load_index(tmp_path, written).shards) == 3, "as the recipe says"


def test_what_is_not_of_an_index_is_left_alone(tmp_path):
    """Whatever folder an index was given: it takes away files of its own kind, and no others."""
    (tmp_path / "test" / "samples.lance").mkdir(parents=True)
    others = ["samples.lance", "notes.txt", "rows.npy", "a" * 32]
    for name in others[1:]:
        (tmp_path / "test" / name).write_text("mine")
    half = tmp_path / "test" / f".{'0' * 32}.json"
    half.write_text("{")
    manifest = write(tmp_path, recipe_of(), rows(30))
    write(tmp_path, recipe_of(), rows(30))
    left = {path.name for path in (tmp_path / "test").iterdir()} - {".lock", "manifest.json"}
    assert set(others) <= left and not half.exists()
    assert len(left - set(others)) == 4 and not any(manifest.parts[0].name in name for name in left)


@pytest.mark.parametrize(
    "damage",
    [
        "nested", {"shards": "2"}, {"width": None}, {"samples": -1}, {"shard": 2}, {"shard": -1}, {"shard": 0.0},
        {"checksums": {"rows.npy": "1"}}, {"count": "30"}, {"largest_norm": "1"}, {"recall": 3}, {"gone": 3},
        {"name": 5}, {"refine": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_other_kinds_is_as_good_as_none(tmp_path, damage):
    """With a right checksum, too: that does not say who wrote it."""
    manifest = write(tmp_path, recipe_of(shards=2), rows(30))
    path = tmp_path / "test" / "manifest.json"
    assert list_manifests(tmp_path) == [manifest]
    if damage == "nested":
        path.write_text("[" * 100_000)
        assert list_manifests(tmp_path) == []
        return
    values = json.loads(path.read_text())
    del values["checksum"]
    for name, value in damage.items():
        inside = next(part for part in (values, values["parts"][0], values["recipe"]) if name in part)
        inside[name] = value
    path.write_text(json.dumps(values | {"checksum": checksum_of(values)}))
    assert list_manifests(tmp_path) == []


def files(folder) -> set[str]:
    return {path.name for path in (folder / "test").iterdir()}


@pytest.mark.parametrize(
    ("how", "full"),
    [
        *itertools.product(("write", "extend", "recall"), ("manifest", "sync")),
        ("write", "rows"), ("extend", "rows"), ("extend", "gone"),
    ],
)  # fmt: skip
def test_a_full_disk_is_left_as_full_as_it_was(tmp_path, monkeypatch, how, full):
    """At each try, wherever it ends."""
    manifest = write(tmp_path, recipe_of(), rows(30))
    keys, _ = load_keys(tmp_path, manifest).difference(np.arange(25), np.ones(25, np.int64))
    more = list(batches_of(rows(5, seed=3), first=30, version=2))
    before, came, save, text = files(tmp_path), [], writing._save, Path.write_text

    def broken(path):
        came.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    def saved(path, array):
        found = save(path, array)
        return broken(path) if full == ("gone" if path.name.count(".") == 1 else "rows") else found

    def written(path, *arguments):
        text(path, "{")
        return broken(path) if full == "manifest" else text(path, *arguments)

    monkeypatch.setattr(writing, "_save", saved)
    monkeypatch.setattr(Path, "write_text", written)
    if full == "sync":
        monkeypatch.setattr(writing, "_sync", broken)
    tries = {
        "write": lambda: write_index(tmp_path, recipe_of(), held(2), more, count=5),
        "extend": lambda: extend_index(tmp_path, manifest, held(2), keys, more, count=5),
        "recall": lambda: with_recall(tmp_path, manifest, {"recall": 0.5}),
    }
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            tries[how]()
    assert came and files(tmp_path) == before
    assert list_manifests(tmp_path) == [manifest] and load_index(tmp_path, manifest).samples == 30


@pytest.mark.parametrize("stopped", ["after", "unknown"])
def test_what_may_be_in_force_is_not_taken_away(tmp_path, monkeypatch, stopped):
    """Where a write ends behind the moment at which it counts, or nobody can say whether it does."""
    manifest = write(tmp_path, recipe_of(), rows(30))
    keys, replace = load_keys(tmp_path, manifest), Path.replace

    def interrupted(path, target):
        replace(path, target)
        if stopped == "unknown":
            patch.setattr(Path, "read_text", unreadable)
        raise KeyboardInterrupt

    def unreadable(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            later = batches_of(rows(5, seed=3), first=30, version=2)
            extend_index(tmp_path, manifest, held(2), keys, later, count=5)
    (now,) = list_manifests(tmp_path)
    assert now != manifest and load_index(tmp_path, now).samples == 35


def test_small_parts_are_put_together_in_memory(tmp_path):
    vectors, recipe = rows(30), recipe_of()
    manifest, now = write(tmp_path, recipe, vectors), dict(vectors)
    for number in range(6):
        more = {f"n{number}{place}": vector for place, vector in enumerate(rows(4, seed=number).values())}
        later = batches_of(more, first=len(now), version=2 + number)
        manifest = extend_index(
            tmp_path, manifest, held(2 + number), load_keys(tmp_path, manifest), later, count=len(more)
        )
        now |= more
    index = load_index(tmp_path, manifest)
    assert len(manifest.parts) == 7 and len(index.shards[0].source.arrays) <= 3
    for query, ranked in zip(queries(3), index.search(queries(3), 60), strict=True):
        assert_same(ranked, top_k(now, query, 60))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("element_type", ["float16", "float32"])
def test_a_program_that_multiplies_in_fewer_digits_changes_no_answer(element_type, capfd):
    """CPUs that have units for them take them: others may only be seen to be allowed to, in what oneDNN says."""
    vectors, asked = rows(200), queries(40)
    before, index = torch.get_float32_matmul_precision(), empty_index(recipe_of(element_type=element_type), width=WIDTH)
    index = index.updated(index.keys, batches_of(vectors))
    matmul = torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            found = index.search(asked, 5, among=np.arange(150))
            assert "fpmath:bf16" not in capfd.readouterr().out
            assert (torch.get_float32_matmul_precision(), matmul.fp32_precision) == ("medium", "bf16")
            torch.from_numpy(asked) @ torch.from_numpy(asked).T
            if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
                assert "fpmath:bf16" in capfd.readouterr().out, "else nothing is shown here"
    finally:
        torch.set_float32_matmul_precision(before)
    allowed = {name: vectors[name] for name in list(vectors)[:150]}
    for query, ranked in zip(asked, found, strict=True):
        assert_same(ranked, top_k(allowed, query, 5))
