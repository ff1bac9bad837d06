"""Work is cut into blocks by memory: at the width that databases have, and where blocks hold a few rows only."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import toy_records, write_jsonl
from reference import ids_in, top_k
from test_index import WIDTH, assert_same, index_of, queries, row_ids_of, rows
from test_store import FINGERPRINT, row

import rapidin_vdb
from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.index import list_manifests, making, shard, torch_shard
from rapidin_vdb.index.faiss_shard import FaissShard
from rapidin_vdb.index.torch_shard import TorchShard
from rapidin_vdb.progress import silent
from rapidin_vdb.recipe import IndexRecipe
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.store import SampleTable
from rapidin_vdb.table_index import of_table

FULL = SketchSpec().width
"""Of which 64 rows are a batch of the table's, and 256 a block of a product with many queries."""
RECIPES = {
    "cpu": IndexRecipe(name="cpu", shards_per_device=2),
    "mapped": IndexRecipe(name="mapped", residence="mapped", shards_per_device=1),
    "streamed": IndexRecipe(name="streamed", residence="streamed", shards_per_device=1),
}


def drawn(names, *, seed):
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(FULL).astype(np.float16) for name in names}


def stored(vectors):
    return [dataclasses.replace(row(name), vector=vector) for name, vector in vectors.items()]


def read(snapshot, row_ids=None):
    pairs = [
        (name, vector.copy())
        for batch in snapshot.vectors(row_ids)
        for name, vector in zip(batch.keys, batch.vectors, strict=True)
    ]
    assert len(pairs) == len({name for name, _ in pairs})
    return dict(pairs)


def assert_alike(found, wanted):
    assert sorted(found) == sorted(wanted)
    assert all(np.array_equal(found[name], vector) for name, vector in wanted.items())


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A table of 600 rows of full width, and what is in it."""
    vectors = drawn([f"w{number:03d}" for number in range(600)], seed=1)
    table = SampleTable.create(
        str(tmp_path_factory.mktemp("wide") / "db"), dataclasses.replace(FINGERPRINT, sketch=SketchSpec())
    )
    table.append(stored(vectors), seen=0)
    return table, vectors


def test_rows_of_full_width_are_all_stored_and_read(wide):
    table, vectors = wide
    snapshot = table.snapshot()
    assert_alike(read(snapshot), vectors)
    names, row_ids, _ = snapshot.keys_in_order()
    chosen = np.random.default_rng(2).choice(600, 140, replace=False)
    # Taken by their ids, more than a batch of them; and picked out of a scan.
    for some in (chosen, np.arange(0, 600, 2)):
        assert_alike(read(snapshot, row_ids[some]), {names[number]: vectors[names[number]] for number in some})


@pytest.mark.parametrize("name", [*RECIPES, "the table itself"])
@pytest.mark.parametrize("asked", [1, 40])
def test_rows_of_full_width_are_all_searched(wide, tmp_path, monkeypatch, name, asked):
    """Of all, of many and of few: against brute force in double precision."""
    table, vectors = wide
    snapshot = table.snapshot()
    keeper = IndexKeeper(tmp_path / "indexes", cached=False)
    if name == "the table itself":
        monkeypatch.setattr("rapidin_vdb.table_index.free_bytes", lambda device: 0)  # so that it is streamed
        index = of_table(snapshot, silent)
    else:
        keeper.build(snapshot, RECIPES[name])
        index = keeper.fresh(snapshot, name=name)
    names, row_ids, _ = snapshot.keys_in_order()
    draw = np.random.default_rng(asked)
    vectors_asked = draw.standard_normal((asked, FULL)).astype(np.float32)
    # Among the last rows, too: each of these is the best for one of the queries.
    for number in range(asked):
        vectors_asked[number] += 0.1 * vectors[f"w{599 - 13 * number:03d}"].astype(np.float32)
    matrix = np.stack([vectors[one] for one in names]).astype(np.float64)
    slow = vectors_asked.astype(np.float64) @ matrix.T
    for some in (None, np.sort(draw.choice(600, 500, replace=False)), np.sort(draw.choice(600, 140, replace=False))):
        found = index.search(vectors_asked, 7, among=None if some is None else row_ids[some])
        for scores, ranked in zip(slow, found, strict=True):
            mine = np.arange(600) if some is None else some
            best = mine[np.argsort(-scores[mine], kind="stable")[:7]]
            assert [one for one, _ in ranked] == [names[number] for number in best]
            np.testing.assert_allclose([score for _, score in ranked], scores[best], rtol=1e-12)


def test_what_comes_to_rows_of_full_width_is_all_searched(tmp_path):
    """More rows than a batch has, taken by their ids for an index that is there."""
    table = SampleTable.create(str(tmp_path / "db"), dataclasses.replace(FINGERPRINT, sketch=SketchSpec()))
    vectors = drawn([f"a{number:03d}" for number in range(500)], seed=3)
    table.append(stored(vectors), seen=0)
    keeper = IndexKeeper(tmp_path / "db" / "indexes", cached=False)
    keeper.build(table.snapshot(), RECIPES["cpu"])
    keeper.fresh(table.snapshot(), name="cpu")
    more = drawn([f"b{number:03d}" for number in range(140)], seed=4)
    table.append(stored(more), seen=table.snapshot().version)
    table.delete_ids(["a003", "a499"])
    left = {name: vector for name, vector in (vectors | more).items() if name not in ("a003", "a499")}
    longest = max(np.linalg.norm(vector.astype(np.float64)) for vector in left.values())
    for one in (keeper, IndexKeeper(tmp_path / "db" / "indexes", cached=False)):
        index = one.fresh(table.snapshot(), name="cpu")
        assert index.samples == 638
        (ranked,) = index.search(np.ones((1, FULL), np.float32), 638)
        wanted = {name: vector.astype(np.float64).sum() for name, vector in left.items()}
        assert dict(ranked).keys() == wanted.keys()
        np.testing.assert_allclose([score for _, score in ranked], [wanted[name] for name, _ in ranked], atol=1e-6)
    # How long rows are at the most stays known where rows are only taken away.
    table.delete_ids(["b000"])
    keeper.build(table.snapshot(), RECIPES["cpu"])
    (manifest,) = list_manifests(keeper.folder)
    assert manifest.samples == 637 and manifest.largest_norm >= longest


@pytest.mark.parametrize("made_by", ["scan", "torch", "faiss"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_blocks_of_a_few_rows_change_nothing(made_by, count, monkeypatch):
    """With and without a filter, one end and both, by each kind of shard."""
    monkeypatch.setattr("rapidin_vdb.index.half._BLOCK_BYTES", 4 * WIDTH * 7)
    monkeypatch.setattr(shard, "SCORES", 90)
    monkeypatch.setattr(torch_shard, "_WORK_BYTES", 4 * WIDTH * 9)
    monkeypatch.setattr("rapidin_vdb.index.faiss_shard._HOST_BYTES", 4 * WIDTH * 11)
    if made_by == "torch":
        monkeypatch.setattr(
            making, "empty_shard",
            lambda device, recipe, *, width, room: TorchShard(torch.device("cpu"), width=width, room=room),
        )  # fmt: skip
    elements = "float32" if made_by == "faiss" else "float16"
    vectors = rows(300)
    index = index_of(vectors, shards=2, element_type=elements)
    kind = {"scan": shard.ScanShard, "torch": TorchShard, "faiss": FaissShard}[made_by]
    assert all(isinstance(one, kind) for one in index.full_shards)
    asked = queries(count)
    for some in (None, sorted(vectors)[::2], sorted(vectors)[5:45]):
        allowed = vectors if some is None else {name: vectors[name] for name in some}
        among = None if some is None else np.sort(row_ids_of(vectors, some))
        for query, ranked in zip(asked, index.search(asked, 20, among=among), strict=True):
            assert_same(ranked, top_k(allowed, query, 20))
        for query, highest, lowest in zip(asked, *index.search_both(asked, 20, among=among), strict=True):
            assert_same(highest, top_k(allowed, query, 20))
            assert_same(lowest, [(name, -score) for name, score in top_k(allowed, -query, 20)])


def test_products_in_pieces_are_those_of_the_whole():
    """As a GPU adds them up, by a product that knows no half precision here."""
    draw = np.random.default_rng(5)
    width = 2 * torch_shard._PIECE + 77
    asked, held = (torch.from_numpy(draw.standard_normal((n, width)).astype(np.float16)) for n in (3, 8))
    found = torch_shard._added(asked, held, lambda one, other: one.float() @ other.float())
    np.testing.assert_allclose(found.numpy(), asked.double().numpy() @ held.double().numpy().T, rtol=1e-3, atol=0.05)


def test_many_ids_are_all_deleted(tmp_path, monkeypatch):
    for module in ("table", "tokens", "snapshot"):
        monkeypatch.setattr(f"rapidin_vdb.store.{module}.IDS_A_FILTER", 2)
    table = SampleTable.create(str(tmp_path / "db"), FINGERPRINT)
    table.append([row(f"d{number}") for number in range(9)], seen=0)
    gone = [f"d{number}" for number in (0, 2, 3, 5, 8)]
    assert table.delete_ids([*gone, "nobody"]) == gone
    assert sorted(ids_in(table.snapshot())) == ["d1", "d4", "d6", "d7"]
    assert sorted(table.snapshot().samples([f"d{number}" for number in range(9)])) == ["d1", "d4", "d6", "d7"]


def test_tokens_of_many_batches_are_all_stored(tmp_path, models, adapters, monkeypatch):
    """And those of many ids are deleted with their samples."""

    def tokens_of(made):
        snapshot = made._table.tokens.snapshot()
        return {
            key: vector.copy()
            for batch in snapshot.vectors()
            for key, vector in zip(batch.keys, batch.vectors, strict=True)
        }

    records = write_jsonl(tmp_path / "few.jsonl", toy_records(8))
    folders = [
        rapidin_vdb.init(tmp_path / name, model=models["llama"], adapter=adapters["llama"], width=64)
        for name in ("one", "many")
    ]
    folders[0].ingest(records, token_gradients=True, token_width=16)
    monkeypatch.setattr("rapidin_vdb.store.tokens.BATCH_BYTES", 2 * 16 * 3)
    monkeypatch.setattr("rapidin_vdb.store.table.BATCH_BYTES", 2 * 64 * 3)
    monkeypatch.setattr("rapidin_vdb.store.version.BATCH_BYTES", 2 * 16 * 3)
    folders[1].ingest(records, token_gradients=True, token_width=16)
    ours, theirs = (tokens_of(made) for made in folders)
    assert len(ours) > 40
    assert_alike(theirs, ours)
    assert_alike(*(read(made._table.snapshot()) for made in folders))
    for module in ("table", "tokens", "snapshot"):
        monkeypatch.setattr(f"rapidin_vdb.store.{module}.IDS_A_FILTER", 2)
    gone = [f"toy-{number:03d}" for number in (0, 1, 2, 5, 7)]
    assert folders[1].delete(ids=gone) == gone
    assert {key.rpartition("\0")[0] for key in tokens_of(folders[1])} == {"toy-003", "toy-004", "toy-006"}
