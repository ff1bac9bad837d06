"""Verification: what is sound is called so, and every kind of damage is found, or mended, or does no harm."""

import errno
import json
import os
import shutil
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from conftest import toy_records, write_jsonl
from reference import ids_in

import rapidin_vdb
from rapidin_vdb.errors import RapidInError, TableError, UnreadableIndexError
from rapidin_vdb.recipe import IndexRecipe
from rapidin_vdb.store.checksum import row_checksum, with_fields
from rapidin_vdb.store.fingerprint import read_fingerprint, write_fingerprint

ASKED = ("Say 5", "blue 35")

# In how many places of every file a bit is flipped, besides the first and the last byte; four times as many in those of
# scalar indices, which have no checksum.
FLIPS = int(os.environ.get("RAPIDIN_FLIPS", "1"))


@pytest.fixture
def whole(database, tmp_path):
    """A database with everything: tokens, replaced and deleted rows, indexes of several kinds."""
    database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16)
    changed = toy_records(1)[0] | {"output": "other"}
    database.index("cpu")
    database.index(IndexRecipe(name="coarse", coarse_width=4, refine=2))
    database.index("cpu", level="token")
    database.ingest(write_jsonl(tmp_path / "more.jsonl", [changed]), on_duplicate="replace", token_gradients=True)
    database.delete(ids=["toy-007"])
    database.index("cpu")
    return database


def findings(database) -> list[str]:
    return [f"{finding.place}: {finding.what}" for finding in rapidin_vdb.open(database.path).verify().findings]


def answers(path, engine) -> list:
    database = rapidin_vdb.open(path)
    database._engine = engine
    return [
        [(r.sample_id, r.score, r.prompt, r.response, sorted(r.metadata.items())) for r in ranking.results]
        for options in ({}, {"where": "stars > 1"}, {"level": "token"})
        for ranking in database.query(*ASKED, top_k=9, **options)
    ] + [database.count(where) if where.startswith("stars") else ids_of(database, where) for where in FILTERS]


# Answered from scalar indices, but for the last.
FILTERS = (
    "split = 'train'", "split >= 'train'", "split IN ('test', 'train')", "source = 'odd'", "source = 'even'", "source > 'even'",
    "source IS NULL", "sample_id = 'toy-003'", "sample_id = 'toy-010'", "sample_id >= 'toy-012'", "sample_id < 'toy-004'",
    "sample_id IN ('toy-001', 'toy-002', 'toy-022')", "NOT (source = 'odd')", "stars = 2",
)  # fmt: skip


def ids_of(database, where: str) -> list[str]:
    return sorted(ids_in(database._table.snapshot(), where))


def test_a_sound_database_is_called_so(whole):
    report = whole.verify()
    assert (report.samples, report.findings, report.mended) == (23, (), ())
    assert report.tokens == whole.info().token_gradients > 0


def rewrite(database, **columns):
    """Change the row of one sample behind the database's back."""
    database._table._table.update(where="sample_id = 'toy-003'", values=columns)


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"response": "forged text 12"}, ["toy-003: its row is not what was written"]),
        ({"loss": 0.25}, ["toy-003: its row is not what was written"]),
        ({"split": "test"}, ["toy-003: its row is not what was written"]),
        ({"response": "x"}, ["toy-003: its token offsets are not inside", "toy-003: its row is not"]),
        ({"loss": -1.0}, ["toy-003: its loss is not a finite", "toy-003: its row is not"]),
        ({"stars": 17}, ["toy-003: its row is not what was written"]),
        ({"sample_id": "toy-004"}, ["toy-004: the id stands twice", "toy-004: its row is not"]),
    ],
)
def test_what_is_wrong_with_a_sample_is_told(database, columns, wanted):
    rewrite(database, **columns)
    found = findings(database)
    assert len(found) == len(wanted) and all(one.startswith(other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("column", ["input_ids", "token_offsets"])
def test_a_changed_list_is_told_too(database, column):
    """From these, exact scores and those of tokens are taken."""
    table = database._table._table
    row = table.search().where("sample_id = 'toy-003'").to_arrow()
    place, (old,) = row.schema.get_field_index(column), row[column].to_pylist()
    # Within the text still: what else looks at them finds nothing.
    other = pa.array([[*old[:-2], old[-1], old[-1]]], row.schema.field(place).type)
    assert other.to_pylist() != [old]
    table.merge_insert("sample_id").when_matched_update_all().execute(
        row.set_column(place, row.schema.field(place), other)
    )
    assert "toy-003: its row is not what was written" in findings(database)


def test_columns_that_come_later_or_are_widened_change_no_checksum(database, tmp_path):
    later = toy_records(26)[24:]
    later[0] |= {"stars": 2.5, "lang": "日本", "seen": True}
    database.ingest(write_jsonl(tmp_path / "later.jsonl", later))
    assert (findings(database), database.info().samples) == ([], 26)
    assert "stars (double)" in database._table.snapshot().columns
    for column, value in (("stars", 2.25), ("lang", "'日木'"), ("seen", False), ("lang", "NULL")):
        database._table._table.update(where="sample_id = 'toy-024'", values_sql={column: str(value)})
        assert findings(database) == ["toy-024: its row is not what was written"], column
        database._table._table.restore(database._table._table.version - 1)
        assert findings(database) == []


def test_rows_written_before_further_fields_had_a_checksum_are_sound(database):
    database._table._table.update(values_sql={"checksum": "checksum % 4294967296"})
    assert findings(database) == []
    rewrite(database, stars=17)
    assert findings(database) == []
    rewrite(database, loss=0.25)
    assert findings(database) == ["toy-003: its row is not what was written"]


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_vectors_that_cannot_be_are_told(database, value):
    table = database._table._table
    row = table.search().where("sample_id = 'toy-003'").to_arrow()
    place = row.schema.get_field_index("vector")
    field = table.schema.field("vector")
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.full(64, value, np.float16)), type=field.type)
    changed = row.set_column(place, field, column)
    lance.dataset(f"{database.path}/samples.lance").merge_insert("sample_id").when_matched_update_all().execute(changed)
    assert [one.split(": ")[1] for one in findings(database)] == [
        "its RapidGrad is zero or not finite",
        "its row is not what was written",
    ]


def test_what_is_wrong_with_tokens_is_told(whole):
    table = whole._table.tokens._place.open_table("tokens")
    table.delete("sample_id = 'toy-001' AND token_index = 0")
    table.update(where="sample_id = 'toy-002' AND token_index = 1", values={"start": 5})
    assert findings(whole) == [
        "toy-002, token 1: the token's row is not what was written",
        "toy-001: has some of its tokens' RapidGrads, but not all",
    ]


def test_many_findings_are_counted(database):
    database._table._table.update(values={"split": "x"})
    found = findings(database)
    assert len(found) == 21 and found[-1] == "4 more: its row is not what was written"


def test_the_command_line_tells_and_exits_1(database, capsys):
    from test_cli import call

    code, out, err = call(capsys, "verify", database.path)
    assert (code, out) == (0, "") and "24 samples: all as it was written" in err
    rewrite(database, split="x")
    code, out, err = call(capsys, "verify", database.path)
    assert code == 1 and out == "wrong: toy-003: its row is not what was written\n" and "1 findings" in err
    code, out, err = call(capsys, "verify", database.path, "--json")
    assert code == 1
    assert json.loads(out)["findings"] == [{"place": "toy-003", "what": "its row is not what was written"}]


@pytest.mark.slow
def test_a_flipped_byte_is_noticed_or_harmless(whole, tmp_path, tally):
    """In every file of the database, at several places: an error, or a finding, or the same answers as before."""
    engine = whole._loaded()
    wanted = answers(whole.path, engine)
    draw = np.random.default_rng(0)
    outcomes: dict[str, list[str]] = {}
    for path in [path for path in sorted(Path(whole.path).rglob("*")) if path.is_file() and path.stat().st_size]:
        content = path.read_bytes()
        # Scalar indices, which are without any checksum, at more places.
        lookup = "_indices" in path.parts
        for place in sorted(
            {0, len(content) - 1, *draw.integers(0, len(content), 4 * FLIPS if lookup else FLIPS).tolist()}
        ):
            copy = tmp_path / "copy"
            shutil.copytree(whole.path, copy)
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(draw.integers(8))
            (copy / path.relative_to(whole.path)).write_bytes(flipped)
            outcome = "noticed"
            try:
                report = rapidin_vdb.open(copy).verify()
                if not report.findings:
                    outcome = "mended" if report.mended else "harmless"
                    assert answers(copy, engine) == wanted, f"{path}, byte {place}: other answers, and nothing noticed"
            except RapidInError:
                pass
            kind = "`.lance` file of a scalar index" if lookup else f"`{path.suffix or path.name}` file"
            outcomes.setdefault(kind, []).append(outcome)
            shutil.rmtree(copy)
    assert "noticed" in outcomes["`.lance` file"] and "mended" in outcomes["`.npy` file"], outcomes
    assert "mended" in outcomes["`.lance` file of a scalar index"], outcomes
    for kind, found in outcomes.items():
        counts = ", ".join(f"{found.count(name)} {name}" for name in ("noticed", "mended", "harmless") if name in found)
        tally(
            f"a bit of a {kind} is flipped",
            f"first, last and {4 * FLIPS if 'scalar' in kind else FLIPS} other bytes of every such file",
            len(found),
            counts,
        )


@pytest.mark.parametrize(
    ("column", "written", "flipped", "where"),
    [
        ("sample_id", b"toy-003", b"toy-002", "sample_id = 'toy-003'"),
        ("source", b"odd", b"odf", "source = 'odd'"),
        ("split", b"train", b"trail", "split = 'train'"),
    ],
)
def test_scalar_indices_are_compared_with_what_they_index(database, column, written, flipped, where):
    """One bit of a value: filters are wrong without any error, until `verify` makes the index anew."""
    database.index("cpu")
    wanted = ids_of(database, where)
    assert wanted and findings(database) == []
    changed = []
    for path in sorted(Path(database.path, "samples.lance", "_indices").rglob("*.lance")):
        content = path.read_bytes()
        if (written in content and b"toy-" in content) or column != "sample_id":
            path.write_bytes(content.replace(written, flipped))
            changed += [path] if content != path.read_bytes() else []
    assert changed
    again = rapidin_vdb.open(database.path)
    assert ids_of(again, where) != wanted, "else nothing is tested"
    report = again.verify()
    assert report.findings == () and [finding.place for finding in report.mended] == [f"scalar index of {column}"]
    assert report.mended[0].what == f"a filter on {column} gives other rows with it than without (it was made anew)"
    assert ids_of(rapidin_vdb.open(database.path), where) == wanted
    assert rapidin_vdb.open(database.path).verify().mended == ()


def test_scalar_indices_that_are_gone_are_made_anew(database):
    database.index("cpu")
    shutil.rmtree(Path(database.path, "samples.lance", "_indices"))
    report = rapidin_vdb.open(database.path).verify()
    assert report.findings == () and len(report.mended) == 3
    assert ids_of(rapidin_vdb.open(database.path), "source = 'odd'") == [f"toy-{n:03d}" for n in range(1, 24, 2)]


def test_a_scalar_index_is_not_made_anew_from_damaged_rows(database):
    database.index("cpu")
    for path in Path(database.path, "samples.lance", "_indices").rglob("*.lance"):
        path.write_bytes(path.read_bytes().replace(b"odd", b"odf"))
    rewrite(database, split="x")
    report = rapidin_vdb.open(database.path).verify()
    assert len(report.findings) == 1 and report.mended == ()


def test_of_many_values_each_is_looked_up_and_most_are_told_apart(monkeypatch):
    from rapidin_vdb.store import scalar

    monkeypatch.setattr(scalar, "_MOST_NUMBERED", 5)
    names = [f"v{number:03d}" for number in range(400)]
    asked = list(scalar._lookups("x", pa.array(names), np.arange(400), names))
    answers = np.stack([rows for where, rows in asked if " IN " in where[0]])
    assert len(answers) == 4 and answers.any(0).all(), "a value that the index lost is missed"
    same = (answers[:, :, None] == answers[:, None, :]).all(0)
    assert same[~np.eye(400, dtype=bool)].mean() < 0.1


def test_lookups_tell_every_value_from_every_other():
    """Whatever row an index gives to another value, or to none, one of the answers is wrong."""
    from rapidin_vdb.store.scalar import _lookups

    for count in (1, 2, 3, 8, 20):
        names = [f"v{number:02d}" for number in range(count)]
        values = pa.array([*names, None])
        codes = np.array([*range(count), -1])
        asked = [(where, rows) for where, rows in _lookups("x", values, codes, names) if " IN " in where[0]]
        answers = {tuple(rows[place] for _, rows in asked) for place in range(count + 1)}
        assert len(answers) == count + 1, "no two values, nor a value and none, are in the same answers"
        for where, rows in asked:
            assert {name for name in names if f"'{name}'" in "".join(where)} == {
                names[n] for n in np.flatnonzero(rows[:count])
            }


def test_a_forged_fingerprint_is_refused(database):
    metadata = write_fingerprint(database.fingerprint)
    assert read_fingerprint(metadata, place="x") == database.fingerprint
    (key,) = [key for key in metadata if not key.endswith(b"sha256")]
    with pytest.raises(TableError, match="x: the fingerprint is damaged"):
        read_fingerprint(metadata | {key: metadata[key].replace(b'"epochs": 1.0', b'"epochs": 9.0')}, place="x")


def test_nothing_of_what_is_purged_is_left_in_any_file(whole, tmp_path):
    """Text and vector of deleted and of replaced samples, searched for in the bytes of all files."""
    secret = write_jsonl(
        tmp_path / "secret.jsonl", [{"id": "secret-id-77", "instruction": "Hush zqxj", "output": "wvkq zqxj vault"}]
    )
    whole.ingest(secret, token_gradients=True)
    whole.index("cpu")
    whole.index("cpu", level="token")
    vectors = {
        key: v for batch in whole._table.snapshot().vectors() for key, v in zip(batch.keys, batch.vectors, strict=True)
    }
    tokens = {
        key: v
        for batch in whole._table.tokens.snapshot().vectors()
        for key, v in zip(batch.keys, batch.vectors, strict=True)
    }
    needles = {
        "text": b"wvkq zqxj vault", "prompt": b"Hush zqxj", "id": b"secret-id-77", "vector": vectors["secret-id-77"].tobytes(),
        "token": next(v for key, v in tokens.items() if key.startswith("secret-id-77")).tobytes(),
        "replaced": b"Say 0",
    }  # fmt: skip

    def found() -> set[str]:
        contents = [path.read_bytes() for path in Path(whole.path).rglob("*") if path.is_file()]
        return {name for name, needle in needles.items() if any(needle in content for content in contents)}

    assert found() >= {"text", "prompt", "id", "vector", "token"}, "else this finds nothing"
    before = {name: vector.tobytes() for name, vector in vectors.items() if name != "secret-id-77"}
    assert whole.delete(ids=["secret-id-77"]) == ["secret-id-77"]
    assert found() >= {"text", "vector"}, "a plain delete only hides"
    assert whole.delete(purge=True) == 0
    assert found() - {"replaced"} == set()
    assert findings(whole) == [] and {index.fresh for index in whole.info().indexes} == {True}
    after = {
        key: v.tobytes()
        for batch in whole._table.snapshot().vectors()
        for key, v in zip(batch.keys, batch.vectors, strict=True)
    }
    assert after == before


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("how", ["where", "ids", "replace"])
def test_what_a_purge_was_asked_to_remove_is_not_in_what_it_writes_about_it(database, tmp_path, how, indexed):
    """A delete that empties a whole fragment leaves nothing to write anew, but what it was asked for."""
    record = {"id": "secret-id-77", "instruction": "Hush zqxj", "output": "wvkq zqxj vault", "note": "gxbv"}
    database.ingest(write_jsonl(tmp_path / "secret.jsonl", [record]))
    if indexed:
        database.index("cpu")
    needles = ["wvkq zqxj vault", "Hush zqxj", "gxbv", *(["secret-id-77"] if how != "replace" else [])]

    def found() -> set[str]:
        contents = [path.read_bytes() for path in Path(database.path).rglob("*") if path.is_file()]
        return {needle for needle in needles if any(needle.encode() in content for content in contents)}

    assert found() == set(needles), "else this finds nothing"
    if how == "where":
        assert database.delete(where="response = 'wvkq zqxj vault' OR note = 'gxbv'", purge=True) == 1
    elif how == "ids":
        assert database.delete(ids=["secret-id-77"], purge=True) == ["secret-id-77"]
    else:
        other = record | {"instruction": "Speak", "output": "nothing", "note": "plain"}
        report = database.ingest(write_jsonl(tmp_path / "other.jsonl", [other]), on_duplicate="replace")
        assert report.replaced == 1
        database.delete(purge=True)
    assert found() == set()
    assert findings(database) == []


@pytest.mark.parametrize("name", ["../../../etc/x", "/etc/x", "..", "a" * 31])
def test_a_manifest_that_points_elsewhere_counts_for_nothing(database, name):
    """Though its checksum is right: whoever forges one forges both."""
    from rapidin_vdb.index.manifest import checksum_of

    database.index("cpu")
    path = Path(database.path, "indexes", "cpu", "manifest.json")
    values = json.loads(path.read_text())
    del values["checksum"]
    values["parts"][0]["name"] = name
    path.write_text(json.dumps(values | {"checksum": checksum_of(values)}))
    assert rapidin_vdb.open(database.path).info().indexes == ()
    report = rapidin_vdb.open(database.path).verify()
    assert [finding.place for finding in report.mended] == ["index cpu"]


@pytest.mark.parametrize("residence", ["resident", "mapped", "streamed"])
def test_whoever_has_read_damaged_rows_reads_them_anew_once_they_are_mended(database, residence):
    """Nothing else tells a server that has them in memory: the table is as it was."""
    (right,) = database.query(*ASKED, top_k=3)
    database.index(IndexRecipe(name="cpu", residence=residence))
    for path in (Path(database.path) / "indexes" / "cpu").glob("*.rows.npy"):
        rows = np.lib.format.open_memmap(path, mode="r+")
        rows *= -1
        rows.flush()
    server = rapidin_vdb.open(database.path)
    server._engine = database._loaded()
    assert server.query(*ASKED, top_k=3)[0].results != right.results, "rows are not looked through each time"
    assert len(rapidin_vdb.open(database.path).verify().mended) == 1
    assert server.query(*ASKED, top_k=3)[0].results == right.results
    index = server._indexes["sample"]._residents.newest.index
    server.query(*ASKED, top_k=3)
    assert server._indexes["sample"]._residents.newest.index is index, "but once only"


@pytest.mark.parametrize(
    ("of", "code"),
    [
        *(
            (of, code)
            for of in ("manifest", "files")
            for code in ("EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "EIO")
        ),
        ("files", "no memory"),
    ],
)
def test_an_index_that_cannot_be_read_now_is_told_and_stays(database, monkeypatch, of, code):
    right = database.query(*ASKED, top_k=3)[0].results
    database.index("cpu")
    place = Path(database.path) / "indexes" / "cpu"
    before = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}

    def refused(path, *_):
        if of == "files" or path.name == "manifest.json":
            if code == "no memory":
                raise MemoryError("not now")
            raise OSError(getattr(errno, code), "not now", str(path))
        return read(path, *_)

    read = Path.read_text
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "read_text") if of == "manifest" else ("rapidin_vdb.index.loading._check",)), refused)
        again = rapidin_vdb.open(database.path)
        report = again.verify()
        assert not report.mended and [finding.place for finding in report.findings] == ["index cpu"]
        assert "not now" in report.findings[0].what and "damaged" not in report.findings[0].what
        with pytest.raises(UnreadableIndexError, match="the index cpu cannot be"):
            again.index("cpu")
        again._engine = database._loaded()
        assert again.query(*ASKED, top_k=3)[0].results == right, "from the table"
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == before
    assert rapidin_vdb.open(database.path).verify().findings == ()


def test_checksums_never_change():
    """`verify` would call every row of every database wrong; a new kind of checksum needs a mark of its own."""
    vector = np.array([1.5, -2.0, 0.0, 6e-8], np.float16)
    assert row_checksum(["a", None, "é\n", True, 17, 0.1], [[1, 5, 6], [0, 1, 1, 3], []], vector) == 1282463904
    fields = {"Stars": 3, "lang": "日本", "ok": True, "x": None, "share": 0.25, "big": 2**60 + 1}
    assert with_fields(12345, fields) == 7962116794024472633
