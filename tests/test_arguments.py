"""What a program in Python may hand over that no command line would: other types, other words, other folders."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from conftest import encoded, toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.errors import SpecError, TableError
from rapidin_vdb.gradient import tangent
from rapidin_vdb.gradient.sample import stream_gradient
from rapidin_vdb.locks import NamedLock
from rapidin_vdb.store import durable
from rapidin_vdb.store.place import Folder


@pytest.fixture
def unchecked(monkeypatch):
    """Without the checks of types that tests have, and users have not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


ASKED = {"prompt": "Say 3", "generation": "red 21"}


def other_database(folder: Path, models, count: int = 12):
    """A database of the same name, version and width, of another model and other samples."""
    made = rapidin_vdb.init(folder / "db", model=str(models["gpt2"]), parameters="all", width=64, shuffles=3)
    made.ingest(write_jsonl(folder / "other.jsonl", toy_records(count, first=100)))
    return made


def test_a_database_stays_where_it_was_opened(database, models, tmp_path, monkeypatch):
    """Though its place was relative, and a database of the same name is where the process goes."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    here = rapidin_vdb.open("db")
    here.index()
    wanted = here.query(**ASKED)[0].results
    other = other_database(tmp_path / "elsewhere", models)
    other.index()
    before = {path for path in (tmp_path / "elsewhere").rglob("*") if path.suffix != ".lock"}
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert here.query(**ASKED)[0].results == wanted
    assert here.delete(where="sample_id IN ('toy-001', 'toy-100')") == 1
    assert (here.info().samples, other.info().samples) == (23, 12)
    changed = write_jsonl(tmp_path / "new.jsonl", [toy_records(1)[0] | {"output": "another answer"}])
    assert here.ingest(changed, on_duplicate="replace").replaced == 1
    assert here.delete(purge=True) == 0
    here.index("streamed")
    assert here.query(**ASKED)[0].results != wanted and here.path == "db"
    assert {path for path in (tmp_path / "elsewhere").rglob("*") if path.suffix != ".lock"} == before
    assert rapidin_vdb.open(tmp_path / "db").info().samples == 23 == here.samples()[1]


def test_a_home_folder_is_one(models, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    made = rapidin_vdb.init("~/mine", model=models["llama"], parameters="all", width=64)
    assert (tmp_path / "home" / "mine" / "samples.lance").is_dir() and not (tmp_path / "~").exists()
    assert rapidin_vdb.open("~/mine").identity == rapidin_vdb.open(tmp_path / "home" / "mine").identity == made.identity


@pytest.mark.parametrize("make", [rapidin_vdb.open, lambda place: rapidin_vdb.init(place, model="m")])
def test_an_address_is_no_path(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TableError, match="s3:/bucket/db: an address loses a slash as a Path; give it as a text"):
        make(Path("s3://bucket/db"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"on_duplicate": "keep"}, "--on-duplicate is 'keep'; wanted skip, replace or error"),
        ({"on_bad_record": "error"}, "--on-bad-record is 'error'; wanted stop or skip"),
        ({"on_deleted": "Skip"}, "--on-deleted is 'Skip'; wanted add or skip"),
        ({"limit": 1.5}, "--limit is 1.5; wanted a whole number, 1 or more"),
        ({"batch_tokens": True}, "--batch-tokens is True; wanted a whole number, 1 or more"),
    ],
)
def test_words_of_an_ingest_are_checked(database, unchecked, tmp_path, words, said):
    changed = write_jsonl(tmp_path / "new.jsonl", [toy_records(1)[0] | {"output": "another answer"}])
    for dry_run in (False, True):
        with pytest.raises(SpecError, match=said):
            database.ingest(changed, dry_run=dry_run, **words)
    (kept,), _ = database.samples(where="sample_id = 'toy-000'")
    assert kept.response == toy_records(1)[0]["output"]


def test_words_of_a_clean_are_checked(database, unchecked, tmp_path):
    with pytest.raises(SpecError, match="--on-unscored is 'leave_out'; wanted stop, keep or leave-out"):
        database.clean(tmp_path / "toy.jsonl", out=tmp_path / "c.jsonl", ids=["toy-001"], on_unscored="leave_out")
    assert not (tmp_path / "c.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"normalize": None}, "--normalize is None; wanted layer or none"),
        ({"quantization": None}, "--quantization is None; wanted none, nf4 or int8"),
        ({"dtype": torch.bfloat16}, "--dtype is torch.bfloat16; wanted auto, float32, bfloat16 or float16"),
        ({"max_tokens": 512.0}, "--max-tokens is 512.0; wanted a whole number, 2 or more"),
        ({"width": "64"}, "--width is '64'; wanted a whole number, 1 or more"),
        ({"epochs": "three"}, "--epochs is three; wanted a number above 0"),
        ({"model": 7}, "a model or an adapter is of type int; wanted its name, or its folder"),
    ],
)
def test_words_of_an_init_are_checked(models, unchecked, tmp_path, words, said):
    with pytest.raises(SpecError, match=said):
        rapidin_vdb.init(tmp_path / "db", **({"model": str(models["llama"])} | words))
    assert not (tmp_path / "db").exists()


def test_numbers_of_numpy_and_paths_are_taken(models, adapters, unchecked, tmp_path):
    made = rapidin_vdb.init(
        tmp_path / "db", model=models["llama"], adapter=adapters["llama"], width=np.int64(64), shuffles=np.int32(3),
        max_tokens=np.int64(400), learning_rate=np.float32(0.5), seed=np.uint8(7),
    )  # fmt: skip
    made.ingest(write_jsonl(tmp_path / "a.jsonl", toy_records(6)), device=torch.device("cpu"), limit=np.int64(5))
    again = rapidin_vdb.open(tmp_path / "db")
    assert again.fingerprint == made.fingerprint and again.info().samples == 5
    again.load(model=models["llama"], adapter=adapters["llama"])
    (ranking,) = again.query(**ASKED, focus=None, top_k=np.int64(3), model=models["llama"])
    assert len(ranking.results) == 3


def test_what_an_interruption_left_of_a_gradient_is_not_added_to_the_next(database):
    loaded, sample = database._loaded().loaded, encoded(1)

    def gradients() -> dict[int, torch.Tensor]:
        found = {}
        stream_gradient(loaded, sample, lambda number, grad: found.__setitem__(number, grad.clone()))
        return found

    wanted = gradients()
    tensors = list(loaded.theta.values())
    assert len(wanted) == len(tensors)
    # As torch leaves it where Ctrl-C comes before the first line of the hook.
    tensors[1].grad = torch.ones_like(tensors[1])
    assert all(torch.equal(found, wanted[number]) for number, found in gradients().items())

    def interrupted(number: int, grad: torch.Tensor) -> None:
        tensors[0].grad = torch.ones_like(tensors[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_gradient(loaded, sample, interrupted)
    assert all(tensor.grad is None for tensor in tensors)


def test_a_lock_that_cannot_be_entered_is_let_go(tmp_path, monkeypatch):
    def interrupted(folder: Path) -> set[str]:
        raise KeyboardInterrupt

    place = Folder(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(durable, "_files", interrupted)
        with pytest.raises(KeyboardInterrupt), place.lock:
            pass
    assert isinstance(place.lock, NamedLock) and not place.lock._lock.is_locked
    with Folder(str(tmp_path)).lock._lock.acquire(timeout=0):
        pass


def test_two_models_explain_in_two_threads(database, tmp_path, monkeypatch):
    """Torch has one level of forward mode for the process: who is within it must be alone."""
    other = rapidin_vdb.open(tmp_path / "db")
    other.load()
    wanted = database.query(**ASKED, tokens=True, top_k=2)[0].results
    both, original = threading.Barrier(2), tangent.batch_losses

    def waiting(*arguments):
        with suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # for the other, who comes in here where nothing keeps it out
        return original(*arguments)

    monkeypatch.setattr(tangent, "batch_losses", waiting)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(one.query, **ASKED, tokens=True, top_k=2) for one in (database, other)]
        found = [[result.exact_score for result in one.result()[0].results] for one in asked]
    assert found == [pytest.approx([result.exact_score for result in wanted], rel=1e-4)] * 2


def test_large_whole_numbers_stay_what_they_are_in_pandas(database, tmp_path):
    pytest.importorskip("pandas")
    records = toy_records(3, first=50)
    records[0]["tweet"] = 1580661436132757507
    database.ingest(write_jsonl(tmp_path / "tweets.jsonl", records))
    frame = database.query(**ASKED, top_k=27)[0].to_pandas().set_index("sample_id")
    assert int(frame.loc["toy-050", "tweet"]) == 1580661436132757507 and frame["tweet"].isna().sum() == 26
    assert str(frame["rank"].dtype) == "int64"
