"""Training files are written again without some samples: byte for byte, whole or not at all."""

import errno
import gzip
import inspect
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb import cleaning, reading
from rapidin_vdb.cli.main import app
from rapidin_vdb.errors import CorpusError, SpecError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three files of one corpus: lines in forms that no writer of ours would choose, CSV, and an array."""
    folder = tmp_path_factory.mktemp("files")
    lines = [
        b'\xef\xbb\xbf{"id": "a", "prompt": "Say",   "response": "\xc3\xa9"}\r\n',
        b'{"response": "b\\u00e9", "id": "b", "prompt": "x", "n": 1.50}\n',
        b"\n",
        b'{"prompt": "no id", "response": "c"}\n',
        b'{"id": "d", "prompt": "x", "response": ""}\n',
        b"not JSON\n",
        b'{"id": "bytes \xff", "prompt": "x", "response": "y"}\n',
        b'{"id": 7, "prompt": "x", "response": "last"}',
    ]
    (folder / "lines.jsonl").write_bytes(b"".join(lines))
    (folder / "table.csv").write_text('id,prompt,response,stars\ne,"two\nlines",f,3\ng,h,i,\nshort\n')
    (folder / "array.json").write_text(json.dumps([{"id": "h", "prompt": "p", "response": "\ud800"}, 5]))
    return [folder / name for name in ("lines.jsonl", "table.csv", "array.json")], lines


@pytest.fixture(scope="module")
def first(tmp_path_factory, models, files):
    """A database of them, and of others."""
    folder = tmp_path_factory.mktemp("first")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), parameters="norm", width=16)
    made.ingest(*files[0], write_jsonl(folder / "toy.jsonl", toy_records(3)), on_bad_record="skip")
    return made


@pytest.fixture
def filled(first, tmp_path):
    """A copy, of which a test may delete."""
    shutil.copytree(first.path, tmp_path / "db")
    return rapidin_vdb.open(tmp_path / "db")


@pytest.mark.parametrize("window", [1024, 3])
def test_lines_stay_byte_for_byte(filled, files, tmp_path, monkeypatch, window):
    monkeypatch.setattr(cleaning, "_WINDOW", window)
    (path, table, array), lines = files
    out = tmp_path / "out.jsonl"
    report = filled.clean(path, table, array, out=out, ids=["b", "g", "nowhere"])
    kept = [line.removeprefix(b"\xef\xbb\xbf") for number, line in enumerate(lines) if number not in (1, 2)]
    wanted = b"".join(kept) + b"\n"
    wanted += b'{"id": "e", "prompt": "two\\nlines", "response": "f", "stars": 3}\n'
    wanted += b'{"id": "h", "prompt": "p", "response": "\\ud800"}\n'
    assert out.read_bytes() == wanted
    assert (report.written, report.left_out, report.not_found) == (8, 4, 1)
    told = [("line 6: not JSON", "(kept)"), ("line 7: holds text", "(kept)"), ("line 5: 1 values", "(left out)"), ("element 1: holds text", "(kept)"), ("element 2: found a number", "(left out)")]  # fmt: skip
    assert len(report.bad) == len(told)
    for message, (what, end) in zip(report.bad, told, strict=True):
        assert what in message and message.endswith(end), message


def test_a_sample_that_is_there_twice_is_left_out_twice(filled, files, tmp_path):
    (path, *_), _ = files
    report = filled.clean(path, path, out=tmp_path / "out.jsonl", ids=["b", "nowhere"])
    assert (report.left_out, report.not_found) == (2, 1)


def test_samples_without_an_id_are_known_by_their_content(filled, files, tmp_path):
    (path, *_), lines = files
    (name,) = [sample.sample_id for sample in filled.samples(where="prompt = 'no id'")[0]]
    filled.clean(path, out=tmp_path / "out.jsonl", ids=[name])
    assert lines[3] not in (tmp_path / "out.jsonl").read_bytes()
    assert lines[1] in (tmp_path / "out.jsonl").read_bytes()


def test_what_matches_a_filter_is_left_out(filled, files, tmp_path):
    (path, table, _), lines = files
    report = filled.clean(
        table, path, out=tmp_path / "out.jsonl.gz", where="stars = 3 AND response = 'f' OR sample_id = '7'"
    )
    text = gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes())
    assert b'"e"' not in text and lines[-1] not in text and b'"g"' in text and lines[1] in text
    assert report.not_found == 0 and report.left_out == 3


def test_what_is_not_in_the_database_is_left_out(filled, files, tmp_path):
    """What was deleted, and what never was a sample, are told apart."""
    (path, table, array), lines = files
    others = filled.count("sample_id LIKE 'toy-%'")
    filled.delete(ids=["a"])
    filled.delete(ids=["g"])
    out, rest = tmp_path / "out.jsonl", b'{"id": "e", "prompt": "two\\nlines", "response": "f", "stars": 3}\n'
    with pytest.raises(SpecError) as told:
        filled.clean(path, table, array, out=out, absent=True)
    what, ways = told.value.args
    # An empty response, a line that is no JSON, bytes that are no UTF-8, and half of a surrogate pair.
    never = "and never were, as what an ingest passes over, or does not reach by its --limit"
    assert (
        what == f"4 records are not in the database, {never} (2 more had been deleted); the first: 'd' ({path}, line 5)"
    )
    assert "keep them with --on-unscored keep, or leave them out with --on-unscored leave-out" in ways
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    report = filled.clean(path, table, array, out=out, absent=True, on_unscored="leave-out")
    assert out.read_bytes() == lines[1] + lines[3] + lines[7] + b"\n" + rest
    assert (report.written, report.not_found) == (4, others) and others > 0
    assert (report.left_out, report.deleted, report.never) == (8, 2, 4), "two have a shape of no record"
    out.unlink()
    report = filled.clean(path, table, array, out=out, absent=True, on_unscored="keep")
    kept = lines[1] + b"".join(lines[3:]) + b"\n" + rest + b'{"id": "h", "prompt": "p", "response": "\\ud800"}\n'
    assert out.read_bytes() == kept
    assert (report.written, report.left_out, report.deleted, report.never) == (8, 4, 2, 4)


def test_what_is_left_can_be_ingested_and_changes_nothing(filled, files, tmp_path):
    before = filled.count("NOT sample_id LIKE 'toy-%'")
    filled.delete(ids=["b"])
    filled.clean(*files[0], out=tmp_path / "out.jsonl", absent=True, on_unscored="leave-out")
    report = filled.ingest(tmp_path / "out.jsonl")
    assert (report.added, report.unchanged) == (0, before - 1)
    assert filled.ingest(files[0][0], on_bad_record="skip").added == 1, "the file itself brings back what was deleted"


def test_nothing_is_written_over_and_nothing_half(filled, files, tmp_path):
    (path, *_), _ = files
    out = tmp_path / "out.jsonl"
    for name in ("out.csv", "out", "out.json", "out.jsonl.zip"):
        with pytest.raises(SpecError, match="wanted the name of a new file of JSON lines"):
            filled.clean(path, out=tmp_path / name, ids=["a"])
    with pytest.raises(SpecError, match="which is there already"):
        filled.clean(path, out=path, ids=["a"])
    with pytest.raises(SpecError, match="cannot be written: No such file"):
        filled.clean(path, out=tmp_path / "no" / "out.jsonl", ids=["a"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match="not readable as Parquet"):
        filled.clean(path, tmp_path / "broken.parquet", out=out, ids=["a"])
    with pytest.raises(CorpusError, match="no such file"):
        filled.clean(path, tmp_path / "no.jsonl", out=out, ids=["a"])
    left = {file.name for file in tmp_path.iterdir()}
    assert not out.exists() and not [name for name in left if name.startswith(".out")]
    for options in ({}, {"where": "true", "ids": ["a"]}, {"where": "true", "absent": True}):
        with pytest.raises(SpecError, match="give one of"):
            filled.clean(path, out=out, **options)
    with pytest.raises(SpecError, match="no file to clean"):
        filled.clean(out=out, ids=["a"])
    with pytest.raises(SpecError, match="one of the ids is 7; wanted texts, as ids are stored: '7'"):
        inspect.unwrap(reading.ids_of)(["a", 7])  # types are checked in tests only
    with pytest.raises(SpecError, match="whose letters would be the ids"):
        filled.clean(path, out=out, ids="a")


def test_another_field_may_hold_the_ids(database, tmp_path):
    records = [{"name": "one", "prompt": "x", "response": "y"}, {"name": "two", "prompt": "x", "response": "z"}]
    path = write_jsonl(tmp_path / "named.jsonl", [*records, {"prompt": "x", "response": "none"}])
    database.ingest(path, id_field="name", on_bad_record="skip")
    report = database.clean(path, out=tmp_path / "out.jsonl", ids=["two"], id_field="name")
    assert report.written == 2 and "no field 'name'" in report.bad[0]
    assert [json.loads(line)["response"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["y", "none"]


def test_files_of_other_ids_are_told(database, tmp_path):
    """Whoever forgets where the ids are would train on what was to be left out."""
    records = [{"name": n, "id": f"row {n}", "prompt": "x", "response": n} for n in ("one", "two", "three")]
    path, out = write_jsonl(tmp_path / "named.jsonl", records), tmp_path / "out.jsonl"
    database.ingest(path, id_field="name")
    for options in ({"ids": ["two"]}, {"where": "sample_id = 'two'"}):
        with pytest.raises(
            SpecError, match="none of 3 of their records has an id that is in the database, such as 'row one'"
        ):
            database.clean(path, out=out, **options)
        assert not out.exists() and [p.name for p in tmp_path.glob(".out*")] == []
        assert database.clean(path, out=out, **options, id_field="name").left_out == 1
        out.unlink()
    with pytest.raises(SpecError, match=r"(?s)3 records are not .*no other is either: .*--id-field \(it is id\)"):
        database.clean(path, out=out, absent=True)
    assert database.clean(path, out=out, absent=True, on_unscored="leave-out").written == 0
    out.unlink()
    # A file of others of its samples is another matter, as is one of a database that is empty now.
    rest = write_jsonl(tmp_path / "rest.jsonl", [*records[:1], {"id": "toy-001", "prompt": "x", "response": "y"}])
    assert database.clean(rest, out=out, ids=["two"]).written == 2
    out.unlink()
    database.delete(where="true")
    assert database.clean(path, out=out, ids=["two"]).written == 3


def test_the_command_line(filled, files, tmp_path):
    from typer.testing import CliRunner

    (tmp_path / "marked.jsonl").write_text('{"id": "b"}\nnowhere\n')
    out = tmp_path / "out.jsonl"
    arguments = ["clean", filled.path, *map(str, files[0]), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--ids", str(tmp_path / "marked.jsonl")])
    assert done.exit_code == 0 and done.stdout == ""
    assert "9 records written to" in done.stderr and "3 left out" in done.stderr
    assert "1 sample to be left out is in none of the files: nowhere" in done.stderr
    assert "5 records have no sample id:" in done.stderr
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert CliRunner().invoke(app, [*arguments]).exit_code == 2
    assert rapidin_vdb.open(filled.path).count() == filled.count()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_is_said_to_be_written_is_on_the_disk(filled, files, tmp_path, monkeypatch):
    """Its contents before its name, and the name before anybody is told: the original may be deleted then."""
    happened, fsync, link = [], os.fsync, os.link

    def synced(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        happened.append(("synced", path.name, path.stat().st_size if path.is_file() else None))
        fsync(handle)

    def linked(partial, out):
        happened.append(("named", partial.name, out.name))
        link(partial, out)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    for name in ("out.jsonl", "out.jsonl.gz"):
        happened.clear()
        filled.clean(*files[0], out=tmp_path / name, ids=["b"])
        (first, partial, size), second, third = happened
        assert (first, size) == ("synced", (tmp_path / name).stat().st_size) and size > 0
        assert (second, third) == (("named", partial, name), ("synced", tmp_path.name, None))
    assert not list(tmp_path.glob(".out*"))


def linked_nowhere(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_somebody_makes_meanwhile_stays(filled, files, tmp_path, monkeypatch, links):
    (path, *_), lines = files
    out, named = tmp_path / "out.jsonl", cleaning._named
    if not links:
        monkeypatch.setattr(os, "link", linked_nowhere)

    def slowly(*arguments):
        yield from named(*arguments)
        out.write_text("theirs")

    monkeypatch.setattr(cleaning, "_named", slowly)
    with pytest.raises(SpecError, match="which somebody else made meanwhile, and which was left as it is") as told:
        filled.clean(path, out=out, ids=["b"])
    assert out.read_text() == "theirs"
    (kept,) = tmp_path.glob(".out.jsonl.*")
    assert f"is in {kept}: give it another name" in str(told.value)
    assert lines[1] not in kept.read_bytes() and lines[-1] in kept.read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_where_no_file_has_two_names(filled, files, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", linked_nowhere)
    out = tmp_path / "out.jsonl"
    report = filled.clean(*files[0], out=out, ids=["b"])
    assert len(out.read_bytes().splitlines()) == report.written > 0
    assert not list(tmp_path.glob(".out*"))

    def refused(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(SpecError, match="other.jsonl, which cannot be written: Input/output error"):
        filled.clean(*files[0], out=tmp_path / "other.jsonl", ids=["b"])
    assert not list(tmp_path.glob("*other*")) and not list(tmp_path.glob(".other*"))


def test_ids_that_no_sample_can_have_are_not_found(filled, files, tmp_path):
    from typer.testing import CliRunner

    (path, *_), lines = files
    report = filled.clean(path, out=tmp_path / "out.jsonl", ids=["\ud800", "b", "nowhere", "\ud800"])
    assert (report.left_out, report.not_found) == (1, 2)
    assert report.first_not_found == ("nowhere", "\ud800")
    assert lines[1] not in (tmp_path / "out.jsonl").read_bytes()
    marked, again = tmp_path / "marked.jsonl", tmp_path / "again.jsonl"
    marked.write_text('{"id": "\\ud800"}\n{"id": "b"}\n')
    done = CliRunner().invoke(app, ["clean", filled.path, str(path), "--out", str(again), "--ids", str(marked)])
    assert done.exit_code == 0 and "1 sample to be left out is in none of the files: " in done.stderr
    assert again.read_bytes() == (tmp_path / "out.jsonl").read_bytes()
