"""Ends, sums over groups and histograms of one pass equal those had one by one, wherever the rows are."""

import dataclasses

import numpy as np
import pytest
import torch
from reference import errors_of_sums, top_k
from test_index import WIDTH, assert_same, batches_of, index_of, queries, recipe_of, rows
from test_index_files import write
from test_store import FINGERPRINT

from rapidin_vdb.errors import SpecError
from rapidin_vdb.index import Grouping, ShardedIndex, TableSource, load_index, make_shard, making, survey
from rapidin_vdb.index import source as sources
from rapidin_vdb.index import surveying as module
from rapidin_vdb.index.keys import joined
from rapidin_vdb.index.source import ArraySource, FileSource
from rapidin_vdb.index.torch_shard import TorchShard
from rapidin_vdb.records import ParameterShape
from rapidin_vdb.uncertainty import PROBES, probes, surveyed

KINDS = ["resident", "three shards", "streamed", "three streamed", "mapped", "coarse", "table", "float32"]
BOTH = ("highest", "lowest")


def made(kind, vectors, folder, monkeypatch):
    """Return an index of some vectors, whose row ids are numbered in order."""
    monkeypatch.setattr(sources, "_READ_BYTES", 2 * WIDTH * 37)  # several reads a file
    options = {
        "resident": {}, "torch": {}, "three shards": {"shards": 3}, "streamed": {"residence": "streamed"},
        "three streamed": {"residence": "streamed", "shards": 3}, "mapped": {"residence": "mapped", "shards": 2},
        "coarse": {"coarse_width": WIDTH // 2, "refine": 3, "residence": "streamed"},
        "float32": {"element_type": "float32", "shards": 2},
    }  # fmt: skip
    if kind == "table":
        keys = joined([batch.keys for batch in batches_of(vectors)])
        table = np.stack(list(vectors.values()))

        def scan():
            return ((np.arange(at, min(at + 50, len(table))), table[at : at + 50]) for at in range(0, len(table), 50))

        source = TableSource(
            keys.row_ids, scan, lambda wanted: iter([(np.sort(wanted), table[np.sort(wanted)])]), WIDTH
        )
        shard = make_shard("cpu", source, recipe_of(), width=WIDTH)
        return ShardedIndex(
            recipe=recipe_of(), width=WIDTH, keys=keys, shards=(shard,), numbers=(np.arange(len(keys)),),
            largest_norm=None,
        )  # fmt: skip
    if kind in ("resident", "three shards", "torch"):
        return index_of(vectors, batch=60, **options[kind])
    return load_index(folder, write(folder, recipe_of(**options[kind]), vectors))


@pytest.fixture
def passes(monkeypatch):
    """For each pass over a source's rows, how many of them came."""
    found = []
    for kind in (ArraySource, FileSource, TableSource):
        real = kind.chunks

        def chunks(self, wanted, real=real):
            found.append(0)
            place = len(found) - 1
            for chunk in real(self, wanted):
                found[place] += len(chunk.numbers)
                yield chunk

        monkeypatch.setattr(kind, "chunks", chunks)
    return found


def assert_equal(found, index, asked, k, ends, among, grouping, bins, *, off):
    """As the separate methods say, and as brute force does."""
    named = {
        "highest": lambda: index.search(asked, k, among=among),
        "lowest": lambda: index.search_both(asked, k, among=among)[1],
    }
    assert found.ends == tuple(named[end]() for end in ends)
    if grouping is None:
        assert found.sums.shape == (len(asked), 0) and found.probed.size == 0
    else:
        members = grouping.row_ids, grouping.groups, grouping.count
        np.testing.assert_allclose(found.sums, index.group_sums(asked, *members), rtol=1e-12, atol=1e-12)
        if grouping.probes is None:
            assert found.probed.shape == (0, grouping.count)
        else:
            np.testing.assert_allclose(found.probed, index.group_sums(grouping.probes, *members), rtol=1e-12, atol=1e-9)
    assert len(found.histograms) == (len(asked) if bins else 0)
    for (counts, edges), scores in zip(found.histograms, index.scores(asked, among=among), strict=False):
        expected = (
            np.histogram(scores.astype(np.float64), bins) if scores.size else (np.zeros(bins), np.zeros(bins + 1))
        )
        np.testing.assert_allclose(edges, expected[1], rtol=1e-5, atol=1e-5)
        assert np.abs(counts - expected[0]).sum() <= off and counts.sum() == scores.size


@pytest.mark.parametrize("little", [False, True], ids=["", "little memory"])
@pytest.mark.parametrize("kind", [*KINDS, "torch"])
def test_it_equals_what_is_had_one_by_one(kind, little, tmp_path, monkeypatch):
    if kind == "torch":  # as on a GPU
        monkeypatch.setattr(
            making, "empty_shard",
            lambda device, recipe, *, width, room: TorchShard(torch.device("cpu"), width=width, room=room),
        )  # fmt: skip
    if little:
        monkeypatch.setattr(module, "_SCORES_BYTES", 0)
        monkeypatch.setattr(module, "_SUMS_BYTES", 0)
    draw = np.random.default_rng(1)
    vectors = rows(420, seed=5, ties=True)
    names = list(vectors)
    index = made(kind, vectors, tmp_path, monkeypatch)
    # Some are gone, and some row ids are of no row here.
    index = dataclasses.replace(index, keys=dataclasses.replace(index.keys, alive=draw.random(420) > 0.1))
    alive = {name for name, is_alive in zip(names, index.keys.alive, strict=True) if is_alive}
    row_ids = np.concatenate([draw.permutation(420)[:350], [9000, 9001]])
    grouping = Grouping(row_ids=row_ids, groups=draw.integers(0, 9, len(row_ids)), count=10)
    for count, among, ends, k, bins, grouped in (
        (1, None, BOTH, 10, 20, True), (3, draw.permutation(420)[:200], ("lowest",), 7, 5, True),
        (2, None, ("highest",), 5, 12, False), (40, draw.permutation(420)[:60], BOTH, 1000, 3, True),
        (2, np.array([9000]), ("highest",), 3, 4, True), (2, None, ("lowest", "highest"), 30, 0, True),
        (2, None, BOTH, 3, 0, False),
    ):  # fmt: skip
        asked, probing = queries(count), (probes(WIDTH) if count < 3 else None)
        given = dataclasses.replace(grouping, probes=probing) if grouped else None
        found = survey(index, asked, k, ends=ends, among=among, grouping=given, bins=bins)
        # Matrix products round by how many rows, or queries, come at once.
        off = 0 if count <= 32 and kind not in ("float32", "torch") else 2 * count
        assert_equal(found, index, asked, k, ends, among, given, bins, off=off)
        if kind == "coarse":
            continue
        wanted = alive if among is None else alive & {names[one] for one in among if one < 420}
        allowed = {name: vectors[name] for name in names if name in wanted}
        for end, ranked in zip(ends, found.ends, strict=True):
            sign = 1 if end == "highest" else -1
            for query, best in zip(asked, ranked, strict=True):
                assert_same([(name, sign * score) for name, score in best], top_k(allowed, sign * query, k))
        if grouped:
            exact = np.zeros((count, 10))
            for row, group in zip(row_ids, grouping.groups, strict=True):
                if row < 420 and names[row] in alive:
                    exact[:, group] += asked.astype(np.float64) @ vectors[names[row]].astype(np.float64)
            np.testing.assert_allclose(found.sums, exact, atol=1e-3)
    nothing = Grouping(row_ids=np.empty(0, np.int64), groups=np.empty(0, np.int64), count=0)
    found = survey(index, queries(2), 5, ends=BOTH, among=np.empty(0, np.int64), grouping=nothing, bins=3)
    assert found.ends == ([[], []], [[], []]) and found.sums.shape == (2, 0)
    assert [(counts.tolist(), edges.tolist()) for counts, edges in found.histograms] == 2 * [([0] * 3, [0] * 4)]
    with pytest.raises(SpecError, match="top_k is 0; wanted 1 or more"):
        survey(index, queries(1), 0, bins=3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float32"])
def test_one_pass_gives_all_of_it(kind, tmp_path, monkeypatch, passes):
    vectors = rows(900, seed=2)
    index = made(kind, vectors, tmp_path, monkeypatch)
    del passes[:]
    grouping = Grouping(row_ids=np.arange(900), groups=np.arange(900) % 7, count=7, probes=probes(WIDTH))
    asked = queries(2)
    survey(index, asked, 10, ends=BOTH, grouping=grouping, bins=20)
    # Each row once; of a coarse index, once as it is folded, too.
    assert sum(passes) == (1800 if kind == "coarse" else 900)
    assert len(passes) == (len(index.shards) + 1 if kind == "coarse" else len(index.shards))
    del passes[:]
    survey(index, asked, 10, ends=BOTH, bins=20)
    assert sum(passes) == (1800 if kind == "coarse" else 900)
    # More scores than may be held are counted in another.
    monkeypatch.setattr(module, "_SCORES_BYTES", 4 * 2 * 900 - 1)
    del passes[:]
    survey(index, asked, 10, ends=BOTH, grouping=grouping, bins=20)
    assert sum(passes) == (2700 if kind == "coarse" else 1800)
    del passes[:]
    survey(index, asked[:1], 10, ends=BOTH, grouping=grouping, bins=20)
    assert sum(passes) == (1800 if kind == "coarse" else 900)


@pytest.mark.parametrize("kind", ["streamed", "table", "mapped", "resident"])
def test_what_rounding_leaves_open_takes_no_other_pass_from_a_disk(kind, tmp_path, monkeypatch, passes):
    """A hundred rows of equal scores at either end, of which the first by id are wanted."""
    vectors, asked = rows(700, seed=3), queries(1)
    for first, factor in ((100, 4), (300, -4)):
        vectors |= dict.fromkeys(sorted(vectors)[first : first + 100], (asked[0] * factor).astype(np.float16))
    index = made(kind, vectors, tmp_path, monkeypatch)
    expected = [top_k(vectors, sign * asked[0], 10) for sign in (1, -1)]
    # More than are kept for that, too: then one other pass finds them.
    for further in (module._FURTHER, 50):
        monkeypatch.setattr(module, "_FURTHER", further)
        del passes[:]
        found = survey(index, asked, 10, ends=BOTH, bins=4)
        assert sum(passes) == (1400 if kind == "resident" or further == 50 else 700)
        assert_same(found.ends[0][0], expected[0])
        assert_same([(name, -score) for name, score in found.ends[1][0]], expected[1])


def test_of_rows_that_are_all_candidates_none_is_looked_for(tmp_path, monkeypatch, passes):
    vectors = dict.fromkeys(rows(300), rows(1)["s0000"])
    index = made("streamed", vectors, tmp_path, monkeypatch)
    del passes[:]
    found = survey(index, queries(1), 5, bins=4)
    assert sum(passes) == 300 and [name for name, _ in found.ends[0][0]] == sorted(vectors)[:5]


def test_shards_side_by_side_add_to_sums_of_their_own(tmp_path, monkeypatch):
    """Where these would take too much, they add to the same ones, one shard after another."""
    index = made("three shards", rows(300), tmp_path, monkeypatch)
    groups, of_shards, gathered, found = np.arange(300) % 4, module.of_shards, module._Gathered, []
    monkeypatch.setattr(
        module, "of_shards", lambda *given, together: found.append(together) or of_shards(*given, together=together)
    )
    monkeypatch.setattr(
        module, "_Gathered", lambda best, sums, room: found.append(id(sums[0])) or gathered(best, sums, room)
    )
    for most, together, several in ((8 * 4 * 2 * 3, True, 3), (8 * 4 * 2 * 3 - 1, False, 1)):
        monkeypatch.setattr(module, "_SUMS_BYTES", most)
        del found[:]
        survey(index, queries(2), 5, grouping=Grouping(row_ids=np.arange(300), groups=groups, count=4))
        assert found[3:] == [together] and len(set(found[:3])) == several


@pytest.mark.parametrize("kind", ["streamed", "float32"])
def test_scores_of_many_queries_are_held_in_part(kind, tmp_path, monkeypatch):
    """However many there are; where they are not had in one pass, too: of some queries at a time."""
    count, asked = 500, queries(40)
    index = made(kind, rows(count, seed=4), tmp_path, monkeypatch)
    held, real, gathered = [], ShardedIndex.scores, module._Gathered
    monkeypatch.setattr(
        ShardedIndex, "scores", lambda self, some, among=None: held.append(len(some)) or real(self, some, among=among)
    )
    monkeypatch.setattr(
        module, "_Gathered", lambda best, sums, room: held.append(room.size) or gathered(best, sums, room)
    )
    found = survey(index, asked, 5, bins=10)
    assert held == [40 if kind == "float32" else 40 * count]
    monkeypatch.setattr(module, "_SCORES_BYTES", 4 * count * 3)
    del held[:]
    again = survey(index, asked, 5, bins=10)
    assert held == ([3] * 13 + [1] if kind == "float32" else [0])
    assert again.ends == found.ends
    for (counts, edges), (before, ends) in zip(again.histograms, found.histograms, strict=True):
        np.testing.assert_allclose(edges, ends, rtol=1e-5, atol=1e-5)
        assert np.abs(counts - before).sum() <= 4 and counts.sum() == count


@pytest.mark.parametrize("kind", ["streamed", "float32"])
def test_errors_of_sums_come_along(kind, tmp_path, monkeypatch, passes):
    fingerprint = dataclasses.replace(FINGERPRINT, theta=(ParameterShape(name="w", shape=(16, 26)),))
    vectors = rows(300, seed=6)
    index, groups, asked = made(kind, vectors, tmp_path, monkeypatch), np.arange(300) % 5, queries(2)
    grouping = Grouping(row_ids=np.arange(300), groups=groups, count=5)
    stored = np.stack(list(vectors.values()))
    expected = errors_of_sums(asked, stored, groups, probes(WIDTH), fingerprint)
    del passes[:]
    found, errors = surveyed(index, asked, 3, fingerprint, ends=BOTH, grouping=grouping, bins=4)
    if kind == "streamed":
        assert sum(passes) == 300
    np.testing.assert_allclose(found.sums, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(errors, expected[1], rtol=1e-5)
    again, same = surveyed(index, asked, 3, fingerprint, ends=BOTH, grouping=grouping, bins=4)
    np.testing.assert_array_equal(same, errors)
    np.testing.assert_array_equal(again.sums, found.sums)
    assert found.probed.shape == (PROBES, 5) and again.probed.shape == (0, 5), "lengths are asked for once"
    assert again.ends == found.ends
    plain, none = surveyed(index, asked, 3, fingerprint)
    assert none.shape == plain.sums.shape == (2, 0) and plain.ends == found.ends[:1]
