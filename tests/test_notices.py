"""What is told before the first gradient: records without ids that come a second time under other names."""

import csv
import logging

import pyarrow.parquet
import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.corpus import read_corpus
from rapidin_vdb.notices import _LOOKED_FOR, Notices


def unnamed(count, *, first=0):
    return [{name: record[name] for name in ("instruction", "output")} for record in toy_records(count, first=first)]


ODD = [
    {"instruction": 'it\'s "so"; -- /* `x` */ \\', "output": "a 'quote'\n''"},
    {"instruction": "null\0", "output": "\0\t{}[]$?@#:"},
    {"instruction": "", "output": "é黄🏳️‍🌈"},
    {"text": "Once upon a time."},
    {"instruction": "x" * 200, "output": "y' OR 'a' = 'a"},
]


@pytest.fixture
def stored(tmp_path, models, adapters):
    made = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(tmp_path / "a.jsonl", unnamed(8) + ODD))
    return made


def told(caplog):
    return [message for message in caplog.messages if "have no id and are new" in message]


def as_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "stars"])
        writer.writerows([record["instruction"], record["output"], 5] for record in unnamed(8))
    return path


def as_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record | {"seen": True} for record in unnamed(8)]), path)
    return path


def with_column(path):
    return write_jsonl(path, [record | {"seen": True} for record in unnamed(8)])


@pytest.mark.parametrize(
    ("name", "write"),
    [("b.csv", as_csv), ("b.parquet", as_parquet), ("b.jsonl", with_column)],
    ids=["csv", "parquet", "jsonl"],
)
def test_records_without_ids_that_come_again_are_told(tmp_path, stored, caplog, monkeypatch, name, write):
    path, when = write(tmp_path / name), []
    sketched = rapidin_vdb.engine.Engine.make
    monkeypatch.setattr(
        "rapidin_vdb.engine.Engine.make",
        lambda self, batch, **options: when.append(len(told(caplog))) or sketched(self, batch, **options),
    )
    for dry_run in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="rapidin_vdb"):
            stored.ingest(path, dry_run=dry_run)
        (message,) = told(caplog)
        assert message.startswith(
            "8 of the samples to write have no id and are new, yet 8 of 8 that were looked for have prompt and response "
            "of a sample in the database. A record without an id is known by all of its fields and values"
        )
        assert message.endswith("where records have ids, as a field id or one that --id-field names, this is not so")
    assert when and set(when) == {1}, "before the first gradient"
    assert stored.count() == 8 + len(ODD) + 8, "it is told, and done"
    caplog.clear()
    third = write_jsonl(tmp_path / "third.jsonl", [record | {"third": True} for record in unnamed(8)])
    stored.ingest(third, dry_run=True)
    (message,) = told(caplog)
    assert "yet 8 of 8 that" in message, "each is there twice by now"


def test_what_is_new_named_or_known_is_not_told(tmp_path, stored, caplog, models, adapters):
    stored.ingest(tmp_path / "a.jsonl")
    stored.ingest(write_jsonl(tmp_path / "new.jsonl", unnamed(8, first=30)))
    stored.ingest(write_jsonl(tmp_path / "ids.jsonl", [one | {"id": f"n{n}"} for n, one in enumerate(unnamed(8))]))
    named = [one | {"uid": f"u{n}"} for n, one in enumerate(unnamed(8))]
    stored.ingest(write_jsonl(tmp_path / "uids.jsonl", named), id_field="uid")
    # One of both texts alone is no sign of it, nor what other records of the file say.
    mixed = [{"instruction": one["instruction"], "output": other["output"], "n": 1}
             for one, other in zip(unnamed(8), unnamed(8)[::-1], strict=True) if one != other]  # fmt: skip
    stored.ingest(write_jsonl(tmp_path / "mixed.jsonl", mixed))
    twice = [one | {"n": n} for n in (0, 1) for one in unnamed(2, first=60)]
    empty = rapidin_vdb.init(tmp_path / "other", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    empty.ingest(write_jsonl(tmp_path / "twice.jsonl", twice))
    assert not told(caplog) and stored.count() == 8 + len(ODD) + 8 + 8 + 8 + 8


def test_texts_of_any_kind_are_found(tmp_path, stored, caplog):
    again = [record | {"n": 1} for record in (*ODD, {"text": "Once upon a time. "}, {"text": "y' OR 'a' = 'a"})]
    stored.ingest(write_jsonl(tmp_path / "b.jsonl", again), dry_run=True)
    (message,) = told(caplog)
    assert message.startswith("7 of the samples to write") and "yet 5 of 7 that were looked for have" in message


def test_some_of_many_are_looked_for_from_first_to_last(tmp_path, stored, caplog):
    count = 3 * _LOOKED_FOR
    path = write_jsonl(tmp_path / "b.jsonl", unnamed(count - 8, first=500) + [one | {"n": 1} for one in unnamed(8)])
    stored.ingest(path, dry_run=True)
    (message,) = told(caplog)
    # 96 of them: each fourth, from the first on, as each second of those of the first 64 is let go.
    assert message.startswith(f"{count} of the samples to write have no id and are new, yet 2 of {count // 4} that")
    caplog.clear()
    stored.ingest(write_jsonl(tmp_path / "long.jsonl", [unnamed(1)[0] | {"output": "z" * 20_001}]), dry_run=True)
    assert not told(caplog)


def test_not_all_texts_are_fetched_for_a_few_samples(tmp_path, stored, caplog, monkeypatch):
    again = list(read_corpus([with_column(tmp_path / "b.jsonl")]))
    monkeypatch.setattr(type(stored._table.place), "cached", True)
    for times, count in ((1, 0), (2, 1)):
        monkeypatch.setattr("rapidin_vdb.notices._TIMES_AS_MANY", times)
        notices = Notices(stored._table)
        for sample in again:
            notices.see(sample, new=True)
        notices.tell()
        assert len(told(caplog)) == count, "13 samples are there, and 8 come"
