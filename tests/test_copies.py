"""Records of Parquet files and saved datasets in a new file: no value is another, or it is told."""

import json
import subprocess
import sys
from contextlib import closing
from datetime import date, datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import toy_records, write_jsonl
from typer.testing import CliRunner

import rapidin_vdb
from rapidin_vdb.cli.main import app
from rapidin_vdb.corpus import copies
from rapidin_vdb.errors import CorpusError, SpecError

TYPES = {
    "made": pa.timestamp("us", "UTC"), "at": pa.timestamp("ns"), "day": pa.date32(), "took": pa.duration("us"),
    "price": pa.decimal128(6, 2), "raw": pa.binary(), "share": pa.float64(), "half": pa.float16(), "single": pa.float32(),
    "kind": pa.dictionary(pa.int8(), pa.string()), "long": pa.large_string(), "view": pa.string_view(),
    "pair": pa.list_(pa.int8(), 2), "by": pa.map_(pa.string(), pa.int32()), "big": pa.uint64(), "small": pa.int8(),
    "turns": pa.list_(pa.struct([("role", pa.string()), ("said", pa.string()), ("at", pa.timestamp("ms"))])),
}  # fmt: skip
VALUES = {
    "made": datetime(2026, 1, 2, 3, 4, 5, 6), "at": 1, "day": date(2026, 1, 2), "took": timedelta(microseconds=3),
    "price": Decimal("1.50"), "raw": b"\xff\x00", "share": float("nan"), "half": 0.5, "single": 0.1, "kind": "a",
    "long": "b", "view": "c", "pair": [1, 2], "by": [("x", 1)], "big": 2**64 - 1, "small": -1,
    "turns": [{"role": "user", "said": None, "at": None}, {"role": "user", "said": "é", "at": datetime(2026, 1, 1)}],
}  # fmt: skip


def table(count: int, *, first: int = 0, without: tuple[str, ...] = ()) -> pa.Table:
    """Records with a column of every type, every third without values."""
    records = toy_records(count, first=first)
    columns = {name: pa.array([record[name] for record in records]) for name in records[0]}
    for name, kind in TYPES.items():
        values = [None if number % 3 == 2 else VALUES[name] for number in range(count)]
        columns[name] = pa.array(values, kind) if name != "half" else pa.array(values, pa.float32()).cast(kind)
    made = pa.table({name: column for name, column in columns.items() if name not in without})
    return made.replace_schema_metadata({"huggingface": '{"info": 1}'})


def save_dataset(folder, parts: list[pa.Table]):
    """Write a folder as datasets.save_to_disk does."""
    folder.mkdir()
    names = [f"data-{number:05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def rows_of(found: pa.Table) -> list[str]:
    """Rows as texts, of which those of NaN are alike."""
    return [repr(row) for row in found.to_pylist()]


@pytest.fixture(scope="module")
def filled(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("filled")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), parameters="norm", width=16)
    made.ingest(write_jsonl(folder / "all.jsonl", toy_records(40)))
    return made


@pytest.mark.parametrize("group", [1, 5, 1 << 16])
def test_parquet_stays_what_it_is(filled, tmp_path, monkeypatch, group):
    """Its schema, and every value of the rows that are left, however many are written at once."""
    monkeypatch.setattr(copies, "_GROUP_ROWS", group)
    one, two = table(23), table(17, first=23)
    pq.write_table(one, tmp_path / "one.parquet", row_group_size=4)
    pq.write_table(two, tmp_path / "two.parquet")
    ids = ["toy-000", "toy-006", "toy-007", "toy-009", "toy-022", "toy-023", "toy-030", "toy-039"]
    out = tmp_path / "out.parquet"
    report = filled.clean(tmp_path / "one.parquet", tmp_path / "two.parquet", out=out, ids=ids)
    assert (report.written, report.left_out, report.as_text) == (32, 8, {})
    wanted, found = pa.concat_tables([one, two]), pq.read_table(out)
    assert found.schema.equals(pq.read_schema(tmp_path / "one.parquet"), check_metadata=True)
    assert found.schema.equals(one.schema)
    assert rows_of(found) == [row for row in rows_of(wanted) if not any(f"'{name}'" in row for name in ids)]
    # Twice the same, and nothing of it all.
    again = filled.clean(out, out=tmp_path / "none.parquet", where="true")
    assert again.written == 0 and pq.read_table(tmp_path / "none.parquet").schema.equals(one.schema)


def test_saved_datasets_become_parquet(filled, tmp_path):
    parts = [table(9), table(11, first=9)]
    folder = save_dataset(tmp_path / "saved", parts)
    filled.clean(folder, out=tmp_path / "out.parquet", ids=["toy-003", "toy-019"])
    wanted, found = rows_of(pa.concat_tables(parts)), pq.read_table(tmp_path / "out.parquet")
    assert rows_of(found) == wanted[:3] + wanted[4:19] and found.schema.equals(parts[0].schema)


def test_what_cannot_be_one_parquet_file_is_refused(filled, tmp_path):
    out = tmp_path / "out.parquet"
    pq.write_table(table(4), tmp_path / "one.parquet")
    pq.write_table(table(4, first=4, without=("big",)), tmp_path / "two.parquet")
    lines = write_jsonl(tmp_path / "all.jsonl", toy_records(4))
    saved = save_dataset(tmp_path / "saved", [table(3)])
    for files, error, message in (
        (["one.parquet", "all.jsonl"], SpecError, f"{lines} is none, nor a saved dataset; write JSON lines"),
        (["one.parquet", "two.parquet"], SpecError, "two.parquet has other columns than .*one.parquet; clean them one"),
        (["one.parquet", "no.parquet"], CorpusError, "no.parquet: no such file"),
        (["saved", "."], CorpusError, "a folder without state.json"),
    ):
        with pytest.raises(error, match=message):
            filled.clean(*(tmp_path / name for name in files), out=out, ids=["toy-001"])
    (saved / "data-00000.arrow").write_bytes(b"")
    with pytest.raises(CorpusError, match="not readable as a saved dataset"):
        filled.clean(saved, out=out, ids=["toy-001"])
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_types_that_parquet_does_not_know_are_told(filled, tmp_path):
    intervals = pa.array([(1, 2, 3)] * 4, pa.month_day_nano_interval())
    folder = save_dataset(tmp_path / "saved", [table(4).append_column("every", intervals)])
    with pytest.raises(SpecError, match="--out cannot be written as Parquet: .*; write JSON lines"):
        filled.clean(folder, out=tmp_path / "out.parquet", ids=["toy-001"])
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_files_that_change_meanwhile_are_told(tmp_path):
    pq.write_table(table(4), tmp_path / "one.parquet")
    for rows in (3, 5):
        with (
            (tmp_path / "new").open("wb") as file,
            closing(copies.ParquetCopy([tmp_path / "one.parquet"], file)) as copy,
        ):
            with pytest.raises(CorpusError, match="changed while it was read"):
                for _ in range(rows):
                    copy.put(CorpusError(), None, True)
                copy.finish()


def test_a_full_disk_is_told(filled, tmp_path):
    """By the file's name, and without a trace."""
    pq.write_table(table(40), tmp_path / "one.parquet")
    code = f"""
import resource, signal, sys
import rapidin_vdb
from rapidin_vdb.errors import SpecError
from rapidin_vdb.corpus import copies
database = rapidin_vdb.open({filled.path!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
copies._GROUP_ROWS = 1
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    database.clean({str(tmp_path / "one.parquet")!r}, out={str(tmp_path / "out.parquet")!r}, ids=["toy-001"])
except SpecError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "out.parquet, which cannot be written: " in done.stdout and "File too large" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["one.parquet"]


def test_what_json_cannot_hold_is_told(filled, tmp_path):
    path, out = tmp_path / "one.parquet", tmp_path / "out.jsonl"
    pq.write_table(table(12, without=("share",)), path)
    report = filled.clean(path, out=out, ids=["toy-001"])
    # Four of twelve have no values, and one that had is left out; in turns it is the time in the second.
    odd = ("made", "at", "day", "took", "price", "raw", "turns")
    assert report.as_text == dict.fromkeys(odd, 7)
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(records) == 11 and records[0]["price"] == "1.50" and records[0]["single"] == pytest.approx(0.1)
    assert records[0]["turns"][1] == {"role": "user", "said": "é", "at": "2026-01-01 00:00:00"}
    assert records[0]["big"] == 2**64 - 1 and records[0]["half"] == 0.5
    # The new file is what the old one was: nothing is to be ingested again.
    with pytest.raises(SpecError, match="is there already"):
        filled.clean(path, out=out, ids=["toy-001"])
    out.unlink()
    done = CliRunner().invoke(
        app, ["clean", filled.path, str(path), "--where", "sample_id = 'toy-001'", "--out", str(out)]
    )
    assert done.exit_code == 0
    said = " ".join(done.stderr.split())
    assert (
        "field made is a text now in 7 records, for JSON cannot hold what it was; Parquet can: --out FILE.parquet"
        in said
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")], {"x": float("nan")}])
def test_numbers_that_json_does_not_know_are_refused(filled, tmp_path, value):
    """They would make lines that most readers of JSON do not take."""
    records = toy_records(6)
    records[1]["share"] = records[4]["share"] = value
    path, out = tmp_path / "one.parquet", tmp_path / "out.jsonl"
    pq.write_table(pa.Table.from_pylist([{"share": None} | record for record in records]), path)
    with pytest.raises(SpecError, match="one.parquet, row 4: the field share holds a number that is not finite"):
        filled.clean(path, out=out, ids=["toy-001"])
    assert not out.exists()
    # What is left out does not matter, and Parquet keeps it.
    assert filled.clean(path, out=out, ids=["toy-001", "toy-004"]).written == 4
    filled.clean(path, out=tmp_path / "out.parquet", ids=["toy-001"])
    kept = pq.read_table(tmp_path / "out.parquet")["share"].to_pylist()
    assert repr(kept) == repr([None, None, None, pq.read_table(path)["share"].to_pylist()[4], None])
    # A line stays byte for byte.
    lines = write_jsonl(tmp_path / "all.jsonl", records)
    filled.clean(lines, out=tmp_path / "lines.jsonl", ids=["toy-001"])
    text = lines.read_text("utf-8").splitlines()
    assert (tmp_path / "lines.jsonl").read_text("utf-8").splitlines() == text[:1] + text[2:]


def test_an_infinite_number_of_csv_is_refused(filled, tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("id,instruction,output,share\ntoy-000,Say 0,red 0,1\ntoy-002,Say 2,grün 14,1e999\n", "utf-8")
    with pytest.raises(SpecError, match="all.csv, line 3: the field share holds a number that is not finite"):
        filled.clean(path, out=tmp_path / "out.jsonl", ids=["toy-000"])
