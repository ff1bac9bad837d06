"""What is left out of training files is what was scored, or was deleted: no record that only has such an id."""

import csv
import gzip
import json
import shutil
from datetime import datetime
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from conftest import save_chat_model, toy_records, write_jsonl
from test_spoken import TEMPLATES, call, turn
from typer.testing import CliRunner

import rapidin_vdb
from rapidin_vdb.cli.main import app
from rapidin_vdb.errors import SpecError
from rapidin_vdb.store import snapshot as snapshots

NARROW = {"parameters": "norm", "width": 16}


@pytest.fixture(scope="module")
def first(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("first")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), **NARROW)
    made.ingest(write_jsonl(folder / "all.jsonl", toy_records(12)))
    return made


@pytest.fixture
def filled(first, tmp_path):
    """A database of twelve samples, and their file; a test may change both."""
    shutil.copytree(first.path, tmp_path / "db")
    return rapidin_vdb.open(tmp_path / "db"), write_jsonl(tmp_path / "all.jsonl", toy_records(12))


def ids_in(path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text("utf-8").splitlines()]


def refused(database, *files, out, **options) -> tuple[str, ...]:
    """Return the lines of the error, after which nothing is there."""
    with pytest.raises(SpecError) as told:
        database.clean(*files, out=out, **options)
    assert not out.exists() and not list(out.parent.glob(".out*"))
    return told.value.args


def test_a_record_that_was_corrected_is_not_left_out_in_silence(filled, tmp_path):
    database, _ = filled
    names = [record["id"] for record in toy_records(12)]
    records = toy_records(12)
    records[3]["output"] = "mended"
    records[5]["instruction"] = "mended"
    path, out = write_jsonl(tmp_path / "mended.jsonl", records), tmp_path / "out.jsonl"
    for options in ({"ids": names[2:6]}, {"where": "sample_id BETWEEN 'toy-002' AND 'toy-005'"}):
        what, ways = refused(database, path, out=out, **options)
        assert what == (
            "2 records have the id of a sample that is to be left out, but not the prompt and response that were scored "
            f"under it; the first: 'toy-003' ({path}, line 4)"
        )
        assert "--on-unscored keep" in ways and "--on-unscored leave-out" in ways
        report = database.clean(path, out=out, **options, on_unscored="keep")
        assert ids_in(out) == [names[number] for number in range(12) if number not in (2, 4)]
        assert (report.changed, report.left_out, report.unscored) == (2, 2, (what,))
        out.unlink()
        report = database.clean(path, out=out, **options, on_unscored="leave-out")
        assert ids_in(out) == [*names[:2], *names[6:]] and (report.changed, report.left_out) == (2, 4)
        out.unlink()
    # What is not to be left out may have been corrected as well; and what is judged anew may go.
    assert database.clean(path, out=out, ids=names[:1]).left_out == 1
    out.unlink()
    database.ingest(path, on_duplicate="replace")
    assert database.clean(path, out=out, ids=names[2:6]).left_out == 4


def test_of_an_id_that_stands_twice_what_was_scored_is_left_out(filled, tmp_path):
    database, path = filled
    records = [record | {"output": "another"} for record in toy_records(2)]
    more, out = write_jsonl(tmp_path / "more.jsonl", records), tmp_path / "out.jsonl"
    assert database.ingest(more, on_duplicate="skip").kept == 2
    what, _ = refused(database, path, more, out=out, ids=["toy-001"])
    assert what.startswith("1 record has the id") and f"'toy-001' ({more}, line 2)" in what
    database.clean(path, more, out=out, ids=["toy-001"], on_unscored="keep")
    assert (
        ids_in(out).count("toy-001") == 1 and json.loads(out.read_text("utf-8").splitlines()[-1])["output"] == "another"
    )
    out.unlink()
    # So it is with what was deleted.
    database.delete(ids=["toy-001"])
    what, _ = refused(database, path, more, out=out, absent=True)
    assert what.startswith("1 record has the id") and f"'toy-001' ({more}, line 2)" in what
    report = database.clean(path, more, out=out, absent=True, on_unscored="leave-out")
    assert (report.deleted, report.changed, report.never) == (1, 1, 0) and "toy-001" not in ids_in(out)


def test_fields_that_are_in_no_gradient_may_change(filled, tmp_path):
    database, _ = filled
    records = [record | {"stars": "many", "reviewed": True, "source": "here"} for record in toy_records(12)]
    report = database.clean(write_jsonl(tmp_path / "b.jsonl", records), out=tmp_path / "out.jsonl", where="true")
    assert (report.left_out, report.changed) == (12, 0)
    # But not which of them holds the response.
    records[0] = {"id": "toy-000", "text": "nothing is like it"}
    what, _ = refused(database, write_jsonl(tmp_path / "c.jsonl", records), out=tmp_path / "out2.jsonl", where="true")
    assert what.startswith("1 record has")
    records[0] = {"id": "toy-000", "odd": 5}
    what, _ = refused(database, write_jsonl(tmp_path / "d.jsonl", records), out=tmp_path / "out2.jsonl", where="true")
    assert what.startswith("1 record has")


def test_what_samples_said_that_were_deleted_is_known(filled, tmp_path, monkeypatch):
    database, path = filled
    out = tmp_path / "out.jsonl"
    database.delete(ids=["toy-001", "toy-002"])
    # Else both are as one.
    database.ingest(write_jsonl(tmp_path / "new.jsonl", [toy_records(1)[0] | {"id": "new"}]))
    database.delete(ids=["toy-003"])
    ids = ["toy-001", "toy-003", "toy-004"]
    report = database.clean(path, out=out, ids=ids)
    assert (report.left_out, report.by_id_alone) == (3, 0)
    out.unlink()
    changed = [record | {"output": "mended"} if record["id"] == "toy-003" else record for record in toy_records(12)]
    mended = write_jsonl(tmp_path / "mended.jsonl", changed)
    assert refused(database, mended, out=out, ids=ids)[0].startswith("1 record has the id")
    # Of what nothing is known, the id has to do.
    monkeypatch.setattr(snapshots, "_LATELY", 0)
    report = database.clean(mended, out=out, ids=ids)
    assert (report.left_out, report.by_id_alone, report.changed) == (3, 2, 0)
    out.unlink()
    monkeypatch.undo()
    database.delete(purge=True)
    report = database.clean(mended, out=out, ids=ids)
    assert (report.left_out, report.by_id_alone) == (3, 2)


def test_the_command_line_tells_them_apart(filled, tmp_path):
    database, _ = filled
    records = toy_records(12)
    records[1]["output"] = "mended"
    path, out = write_jsonl(tmp_path / "b.jsonl", [*records, {"id": "new", "text": "x"}]), tmp_path / "out.jsonl"

    def said(*options, code=0) -> str:
        out.unlink(missing_ok=True)
        done = CliRunner().invoke(app, ["clean", database.path, str(path), "--out", str(out), *options])
        assert done.exit_code == code, done.output
        return " ".join(done.stderr.split())

    (tmp_path / "ids").write_text("toy-001\ntoy-002\nnew\n")
    database.delete(ids=["toy-001", "toy-002"])
    told = said("--absent", "--on-unscored", "leave-out")
    assert (
        "10 records written" in told
        and "; 3 left out left out, for they had been deleted: 1 record left out: 1" in told
    )
    assert "left out: 1 record has the id of a sample" in told and "left out: 1 record is not in the database" in told
    told = said("--absent", "--on-unscored", "keep")
    assert "12 records written" in told and "kept: 1 record has the id" in told and "kept: 1 record is not in" in told
    told = said("--ids", str(tmp_path / "ids"), "--on-unscored", "keep")
    assert "left out by id alone, for nothing else is known of these samples: 1 record" in told
    with pytest.raises(SpecError, match="'toy-001'"):
        CliRunner().invoke(app, ["clean", database.path, str(path), "--out", str(out.with_suffix(".ndjson")), "--absent"], catch_exceptions=False)  # fmt: skip
    database.ingest(path, on_duplicate="replace")
    assert "nothing had to be left out: no record is of a sample that was deleted" in said("--absent")


def test_an_empty_choice_is_refused(filled, tmp_path):
    database, path = filled
    out = tmp_path / "out.jsonl"
    (what,) = refused(database, path, out=out, where="source = 'Odd'")
    assert f"no sample in {database.path} matches --where \"source = 'Odd'\"" in what and "nothing was written" in what
    assert "with --absent" in what and "rapidin-vdb info" in what
    assert database.clean(path, out=out, where="source = 'odd'").left_out == 6
    out.unlink()
    database.delete(where="source = 'odd'")
    (what,) = refused(database, path, out=out, where="source = 'odd'")
    assert "If the samples were deleted before, leave out what is not in the database, with --absent" in what
    assert database.clean(path, out=out, absent=True).deleted == 6
    out.unlink()
    assert "--ids names no sample" in refused(database, path, out=out, ids=[])[0]
    what = refused(database, path, out=out, ids=["toy-000,", "toy-001,"])[0]
    assert "none of the 2 ids to be left out is in these files or in the database, such as 'toy-000,'" in what
    # Other files may hold them: of those that are there, or were.
    rest = write_jsonl(tmp_path / "rest.jsonl", toy_records(1))
    for name in ("toy-001", "toy-002"):
        report = database.clean(rest, out=out, ids=[name])
        assert (report.written, report.first_not_found) == (1, (name,))
        out.unlink()
    # After a purge nobody can know.
    database.delete(purge=True)
    assert database.clean(rest, out=out, ids=["toy-001"]).written == 1


def test_what_was_never_there_is_not_taken_for_what_was_deleted(tmp_path, models):
    database = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), **NARROW)
    records = [*toy_records(4), {"id": "empty", "prompt": "x", "response": " "}, *toy_records(6, first=4)]
    path, out = write_jsonl(tmp_path / "all.jsonl", records), tmp_path / "out.jsonl"
    database.ingest(path, limit=9, on_bad_record="skip")
    (names, read) = [record["id"] for record in records], 9
    assert database.count() == read - 1
    database.delete(ids=names[1:3])
    what, _ = refused(database, path, out=out, absent=True)
    assert what.startswith("3 records are not in the database, and never were, as what an ingest passes over")
    assert what.endswith(f" (2 more had been deleted); the first: 'empty' ({path}, line 5)")
    report = database.clean(path, out=out, absent=True, on_unscored="keep")
    assert ids_in(out) == [name for name in names if name not in names[1:3]]
    assert (report.deleted, report.never, report.left_out) == (2, 3, 2)
    out.unlink()
    report = database.clean(path, out=out, absent=True, on_unscored="leave-out")
    assert ids_in(out) == [names[0], names[3], *names[5:9]]
    assert (report.deleted, report.never, report.left_out) == (2, 3, 5)
    out.unlink()
    # What came back is there, and what a purge took away may never have been.
    database.ingest(path, limit=3)
    assert database.clean(path, out=out, absent=True, on_unscored="keep").deleted == 0
    out.unlink()
    database.delete(ids=names[1:3], purge=True)
    what, _ = refused(database, path, out=out, absent=True)
    assert what.startswith("5 records are not in the database, and may never have been: what was deleted is not known")
    assert database.clean(path, out=out, absent=True, on_unscored="leave-out").written == 6


def test_all_deletions_are_found(filled, tmp_path, monkeypatch):
    """However many, and however long ago."""
    database, path = filled
    monkeypatch.setattr(snapshots, "_DELETIONS", 2)
    monkeypatch.setattr(snapshots, "_LATELY", 2)
    for number in range(5):
        database.delete(ids=[f"toy-00{number}"])
        database.ingest(write_jsonl(tmp_path / "new.jsonl", [toy_records(1)[0] | {"id": f"new-{number}"}]))
    assert len(database._table.snapshot().deletions()) == 2
    report = database.clean(path, out=tmp_path / "out.jsonl", absent=True)
    assert (report.deleted, report.never, report.written) == (5, 0, 7)


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "system": "Be kind."},
    {"prompt": "And?", "response": "So.", "tools": [{"name": "x", "about": {"n": 1.5}}], "system": "Be brief."},
    {"messages": [{"role": who, "content": f"{who} {n}"} for n in range(2) for who in ("user", "assistant")]},
    {"messages": [turn("user", "1 + 1?"), turn("assistant", "", tool_calls=[call("add", a=1)])], "system": "Be kind."},
]
PLAIN = [
    {"instruction": "Say 1", "input": "é", "output": "one ", "stars": 3, "share": 0.1, "ok": True, "none": None},
    {
        "instruction": "Say 2",
        "input": "",
        "output": "two",
        "stars": 2**60 + 1,
        "share": 1e-7,
        "ok": False,
        "none": None,
    },
    {"instruction": "Say 3", "input": " ", "output": "3", "stars": None, "share": 2.0, "ok": None, "none": None},
]


def with_ids(records: list[dict], kind: str) -> list[dict]:
    made = {"none": lambda n: {}, "id": lambda n: {"id": f"r{n}"}, "number": lambda n: {"id": n}, "name": lambda n: {"name": f"r{n}"}}  # fmt: skip
    return [made[kind](number) | record for number, record in enumerate(records)]


def written(folder, records: list[dict], form: str):
    path = folder / f"corpus.{form}"
    if form == "jsonl":
        return write_jsonl(path, records)
    if form == "jsonl.gz":
        path.write_bytes(gzip.compress(write_jsonl(folder / "c.jsonl", records).read_bytes()))
    elif form == "json":
        path.write_text(json.dumps(records))
    elif form == "csv":
        cells = [["" if value is None else str(value) for value in record.values()] for record in records]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(records[0]), *cells])
    elif form == "parquet":
        odd = {"made": datetime(2026, 1, 2, 3, 4, 5), "price": Decimal("1.50"), "raw": b"\xff", "nan": float("nan")}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record | odd for record in records]), path)
    return path


@pytest.mark.parametrize("kind", ["none", "id", "number", "name"])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_files_that_nobody_changed_are_what_was_scored(tmp_path, models, form, kind):
    """Whatever the ingest was told: no record of them is refused."""
    records = with_ids(PLAIN, kind)
    path = written(tmp_path, records, form)
    field = {"id_field": "name"} if kind == "name" else {}
    for place, options in enumerate(({}, {"split": "late", "source": "there"})):
        database = rapidin_vdb.init(tmp_path / f"db{place}", model=str(models["llama"]), **NARROW)
        assert database.ingest(path, **field, **options).added == 3
        report = database.clean(path, out=tmp_path / f"out{place}.jsonl", where="true", **field)
        assert (report.left_out, report.changed, report.by_id_alone, report.written) == (3, 0, 0, 0)
        ids = [sample.sample_id for sample in database.samples()[0]]
        database.delete(ids=ids)
        report = database.clean(path, out=tmp_path / f"absent{place}.jsonl", absent=True, **field)
        assert (report.left_out, report.changed, report.deleted, report.never) == (3, 0, 3, 0)


@pytest.mark.parametrize(
    ("template", "turns"), [("alpaca", "last"), ("text", "last"), ("chat", "last"), ("chat", "all")]
)
def test_conversations_that_nobody_changed_are_what_was_scored(tmp_path, models, template, turns):
    model, tokenizer = save_chat_model(tmp_path / "model")
    records = with_ids(CONVERSATIONS[:2], "id")
    if template == "chat":
        # What is stored of a call is what this template writes.
        tokenizer.chat_template = TEMPLATES["calls"]
        tokenizer.save_pretrained(model)
        records = with_ids(CONVERSATIONS, "id")
    records.append({"id": "before", "prompt": "x", "response": "y", "history": [["a", "b"]]})
    path = write_jsonl(tmp_path / "all.jsonl", records)
    database = rapidin_vdb.init(tmp_path / "db", model=str(model), template=template, turns=turns, **NARROW)
    added = database.ingest(path, split="late", source="there").added
    report = database.clean(path, out=tmp_path / "out.jsonl", where="true")
    assert (report.left_out, report.changed) == (added, 0) and added == len(records)
    if template == "chat":
        assert "<call>" in database.show("r3").response


@pytest.mark.parametrize("beside", [{}, {"system": "Be kind."}])
def test_the_same_records_in_another_format_are_what_was_scored(tmp_path, models, beside):
    """Values have other types there, and texts are the same; so with a field that `alpaca` does not write."""
    records = [record | beside for record in with_ids(PLAIN, "id")]
    database = rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), **NARROW)
    database.ingest(written(tmp_path, records, "jsonl"))
    for form in ("csv", "parquet"):
        report = database.clean(written(tmp_path, records, form), out=tmp_path / f"{form}.jsonl", where="true")
        assert (report.left_out, report.changed) == (3, 0)


def test_of_what_was_deleted_twice_the_last_text_counts(filled, tmp_path):
    database, _ = filled
    database.delete(ids=["toy-001"])
    changed = [record | {"output": "second"} if record["id"] == "toy-001" else record for record in toy_records(12)]
    again = write_jsonl(tmp_path / "again.jsonl", changed)
    assert database.ingest(again).added == 1
    database.delete(ids=["toy-001"])
    out = tmp_path / "out.jsonl"
    report = database.clean(again, out=out, ids=["toy-001", "toy-002"])
    assert (report.left_out, report.by_id_alone, report.changed) == (2, 0, 0)
    out.unlink()
    # The first text is another one's by now.
    first = write_jsonl(tmp_path / "first.jsonl", toy_records(12))
    assert refused(database, first, out=out, ids=["toy-001", "toy-002"])[0].startswith("1 record has the id")


def test_so_many_are_left_out_at_random(filled, tmp_path):
    """The same with the same seed, on any machine; others with another; and all alike."""
    database, path = filled
    names = [record["id"] for record in toy_records(12)]

    def gone(count, *files, **options) -> list[str]:
        out = tmp_path / "out.jsonl"
        report = database.clean(*(files or (path,)), out=out, random=count, **options)
        assert (report.left_out, report.not_found, report.unscored) == (count, 0, ())
        kept = ids_in(out)
        out.unlink()
        assert kept == [name for name in names if name in {*kept}], "in order"
        return [name for name in names if name not in {*kept}]

    assert gone(4) == gone(4, seed=1) == ["toy-000", "toy-001", "toy-002", "toy-011"]
    assert gone(4, seed=2) == ["toy-004", "toy-006", "toy-008", "toy-009"]
    assert gone(12) == names
    # Not the rows' order counts, but that of the ids.
    again = rapidin_vdb.init(tmp_path / "again", model=database.fingerprint.model, **NARROW)
    again.ingest(write_jsonl(tmp_path / "backwards.jsonl", toy_records(12)[::-1]))
    database = again
    assert gone(4) == ["toy-000", "toy-001", "toy-002", "toy-011"]
    drawn = [name for seed in range(40) for name in gone(3, seed=seed)]
    counts = [drawn.count(name) for name in names]
    assert min(counts) >= 3 and max(counts) <= 20 and sum(counts) == 120, "each some 10 times"


def test_what_is_drawn_is_of_the_newest_version(filled, tmp_path):
    database, path = filled
    out = tmp_path / "out.jsonl"
    database.delete(ids=["toy-002", "toy-005"])
    assert database.clean(path, out=out, random=10).left_out == 10
    assert ids_in(out) == ["toy-002", "toy-005"], "what was deleted stays"
    out.unlink()
    (told,) = refused(database, path, out=out, random=11)
    assert told == (
        f"--random is 11, and {database.path} has 10 samples; wanted at most so many: as many as the removal left out "
        "that this is to be compared with"
    )
    assert refused(database, path, out=out, random=0) == ("--random is 0; wanted 1 or more",)
    assert refused(database, path, out=out, random=1, seed=-1) == ("--seed is -1; wanted 0 or more",)
    for others in ({"ids": ["toy-001"]}, {"where": "true"}, {"absent": True}):
        (told,) = refused(database, path, out=out, random=1, **others)
        assert told == "give one of: --where SQL, --ids FILE, --absent, or --random N"
    # What was never scored is not thrown away in silence.
    records = [record | {"output": "mended"} for record in toy_records(12)]
    mended = write_jsonl(tmp_path / "mended.jsonl", records)
    assert "3 records have the id of a sample that is to be left out" in refused(database, mended, out=out, random=3)[0]
    assert database.clean(mended, out=out, random=3, on_unscored="leave-out").left_out == 3


def test_a_control_is_made_from_a_shell(filled, tmp_path):
    database, path = filled
    out = tmp_path / "out.jsonl"
    asked = ["clean", database.path, str(path), "--out", str(out), "--random", "4"]
    done = CliRunner().invoke(app, [*asked, "--seed", "2"])
    assert done.exit_code == 0 and "8 records written to" in done.stderr and "4 left out" in done.stderr
    assert {"toy-000", "toy-001", "toy-002"} < {*ids_in(out)} and "toy-004" not in ids_in(out)
    refused = CliRunner().invoke(app, [*asked, "--absent"])
    assert refused.exit_code == 2 and "give one of --where SQL, --ids FILE, --absent and --random N" in " ".join(
        refused.stderr.replace("│", " ").split()
    )
