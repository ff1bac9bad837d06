"""Whatever a user may give, thousands of times: an answer or an error of ours, never a traceback, never a half-written table.

A few dozen cases of each kind always; thousands with --slow (conftest.py says how many).
"""

import gzip
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import toy_records, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from reference import ids_in

import rapidin_vdb
from rapidin_vdb.corpus import read_corpus
from rapidin_vdb.engine import Made
from rapidin_vdb.errors import CorpusError, RapidInError, SpecError
from rapidin_vdb.index.manifest import list_manifests
from rapidin_vdb.ingest import ingest
from rapidin_vdb.intake import Corpus
from rapidin_vdb.query import read_queries
from rapidin_vdb.recipe import IndexRecipe, read_recipe
from rapidin_vdb.records import Sample
from rapidin_vdb.store import SampleTable

# Names that mean something to us, names that a table cannot hold, and anything else.
NAMES = st.one_of(
    st.sampled_from(
        "id instruction input output prompt response completion generation text messages split source loss tokens vector "
        "sample_id checksum content_hash token_offsets stars Stars a.b `q` _rowid select focus query_id _widened_stars".split()
    ),
    st.text(max_size=6),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", " ", "\0", "\ud800", "\x1b[2J", "é黄👍🏽", "'", '"', "train", "toy-000", "x" * 3000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", ""]) | SCALARS, "content": SCALARS},
    ),
    max_size=4,
)
LIKELY = st.fixed_dictionaries(
    {"instruction": st.text(max_size=8), "output": st.text(min_size=1, max_size=8)},
    optional={"id": SCALARS, "split": SCALARS, "source": SCALARS, "stars": SCALARS, "messages": TURNS, "note": VALUES},
)
RECORDS = LIKELY | st.dictionaries(NAMES, VALUES, max_size=5)
LINES = st.one_of(
    RECORDS.map(json.dumps), VALUES.map(json.dumps), st.text(max_size=20), st.just("{"), st.just('{"text": "a"}')
)
CONTENTS = st.one_of(
    st.binary(max_size=80),
    st.lists(LINES, max_size=4).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
    st.lists(RECORDS, max_size=3).map(lambda records: json.dumps(records).encode()),
    st.lists(st.lists(st.text(max_size=5), max_size=4), max_size=4).map(
        lambda rows: "\r\n".join(",".join(row) for row in [["instruction", "output"], *rows]).encode(
            "utf-8", "surrogatepass"
        )
    ),
)
SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", "", ".txt", ".JSONL"])


TRIED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tally):
    yield tmp_path_factory.mktemp("fuzz")
    for what, count in TRIED.items():
        tally(
            what,
            "drawn by hypothesis",
            count,
            "an answer or an error of ours; never a traceback or a table half written",
        )


@given(content=CONTENTS, suffix=SUFFIXES, packed=st.booleans())
def test_files_of_records(place, content, suffix, packed):
    TRIED["files of records, and of queries"] += 1
    path = place / f"records{suffix}"
    path.write_bytes(gzip.compress(content) if packed and suffix.endswith(".gz") else content)
    try:
        found = list(read_corpus([path]))
    except CorpusError:
        found = []
    for sample in found:
        assert isinstance(sample, CorpusError) or (isinstance(sample, Sample) and sample.sample_id and sample.response)
    try:
        queries = read_queries(path)
    except CorpusError:
        return
    assert queries


@pytest.fixture(scope="module")
def toy(place, models, adapters):
    """A database with an index, its model loaded."""
    database = rapidin_vdb.init(place / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    database.ingest(write_jsonl(place / "toy.jsonl", toy_records(24)))
    database.index("cpu")
    database._loaded()
    return database


def content(table: SampleTable) -> dict[str, tuple]:
    rows: dict[str, tuple] = {}
    for row, vector, wanted in table.snapshot().whole_rows():
        assert row["sample_id"] not in rows and row["checksum"] == wanted
        rows[row["sample_id"]] = (row["response"], row["content_hash"], vector.tobytes())
    return rows


@given(
    batches=st.lists(st.lists(RECORDS, max_size=6), min_size=1, max_size=3),
    skip=st.booleans(),
    duplicate=st.sampled_from(["error", "skip", "replace"]),
)
def test_records_into_a_table(place, toy, batches, skip, duplicate):
    """All of an ingest but the gradients, which are drawn: whole, or not at all."""
    TRIED["records put into a table"] += 1
    folder = place / "table"
    shutil.rmtree(folder, ignore_errors=True)
    table, engine, draw = SampleTable.create(str(folder), toy.fingerprint), toy._loaded(), np.random.default_rng(0)

    def compute(batches):
        for batch in batches:
            yield batch, [Made(draw.standard_normal(64).astype(np.float16), 1.0) for _ in batch]

    rows = content(table)
    for records in batches:
        path = place / "some.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        version = table.snapshot().version
        try:
            report = ingest(
                table, Corpus(paths=(path,)), compute, tokenizer=engine.loaded.tokenizer, template=engine.template,
                batch_tokens=1000, on_bad_record="skip" if skip else "stop", on_duplicate=duplicate,
            )  # fmt: skip
        except RapidInError:
            assert (table.snapshot().version, content(table)) == (version, rows)
            continue
        now = content(table)
        assert len(now) == len(rows) + report.added
        assert report.added + report.replaced + report.unchanged + report.kept + len(report.bad) >= len(records) or any(
            record == other for place, record in enumerate(records) for other in records[:place]
        )
        assert sum(now[name] != row for name, row in rows.items()) <= report.replaced
        rows = now
        for sample in table.snapshot().samples(list(rows)).values():
            json.dumps(sample.to_dict(), allow_nan=False)


SQL = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(
            "split source stars sample_id tokens loss vector nosuch ' '' \" ` ( ) = <> < >= AND OR NOT IN LIKE IS NULL BETWEEN "
            "'train' 'odd' 1 -1 1e999 2.5 0x1 , . * / % + - -- ; /* */ SELECT FROM samples DROP TABLE CASE WHEN END CAST AS INT "
            "true false count(*) sleep(9) regexp_match length lower [ ] { } \\ \0 é 黄 $1 ? := :: || ~ ! @ # & | ^".split(
                " "
            )
        ),
        max_size=9,
    ).map(" ".join),
    st.tuples(
        st.sampled_from(["split", "source", "stars", "sample_id", "tokens", "loss", "response", "`stars`", '"stars"']),
        st.sampled_from(["=", "<", ">", "LIKE", "IN", "IS", "!=", "BETWEEN 1 AND"]),
        st.one_of(SCALARS.map(repr), SCALARS.map(str), st.just("(1, 2)"), st.just("NULL"), st.just("(SELECT 1)")),
    ).map(" ".join),
)


@given(where=SQL)
def test_filters(toy, where):
    TRIED["filters"] += 1
    table = toy._table
    snapshot = table.snapshot()
    try:
        found = ids_in(snapshot, where)
    except RapidInError as error:
        assert "\n" not in str(error).replace(where, "")
    else:
        assert set(found) <= {f"toy-{number:03d}" for number in range(24)}
        assert len(snapshot.row_ids(where)) == len(found)
    assert table.snapshot().version == snapshot.version and snapshot.count() == 24


KEYS = ("devices", "shards_per_device", "element_type", "residence", "coarse_width", "refine", "name", "x")
TOML = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.tuples(
            st.sampled_from(KEYS),
            st.one_of(
                st.sampled_from(
                    ['["cpu"]', '["cpu", "cpu"]', '["cuda:0"]', '"cpu"', "[]", "[1]", "1", "0", "-1", "64", "3", "1.5", "true"]
                ),
                st.sampled_from(['"float16"', '"float32"', '"mapped"', '"streamed"', "nan", "inf", "1979-05-27", "{a = 1}"]),
                st.integers().map(str),
                st.text(max_size=5).map(json.dumps),
            ),
        ).map(" = ".join),
        max_size=4,
    ).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
)  # fmt: skip


@given(content=TOML)
def test_recipes(place, content):
    TRIED["recipes"] += 1
    path = place / "recipe.toml"
    path.write_bytes(content)
    try:
        recipe = read_recipe(path)
    except SpecError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(recipe, IndexRecipe) and recipe.refine >= 1 and recipe.shard_devices
        assert IndexRecipe(**recipe.to_dict() | {"devices": recipe.devices}) == recipe


def changed(value, draw):
    """A JSON value with one thing in it replaced."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(value[place], draw), *value[place + 1 :]]
    return draw(VALUES)


@given(data=st.data())
def test_manifests(toy, place, data):
    """Also one that whoever changed it has signed anew."""
    TRIED["manifests of indexes"] += 1
    from rapidin_vdb.index.manifest import checksum_of

    index = place / "indexes" / "cpu"
    if not index.exists():
        shutil.copytree(Path(toy.path) / "indexes", place / "indexes")
    values = json.loads((Path(toy.path) / "indexes" / "cpu" / "manifest.json").read_text())
    values = changed(values, data.draw)
    if isinstance(values, dict) and data.draw(st.booleans()):
        values.pop("checksum", None)
        values["checksum"] = checksum_of(values)
    (index / "manifest.json").write_text(json.dumps(values))
    for manifest in list_manifests(place / "indexes"):
        assert manifest.name == "cpu"


WORDS = st.one_of(
    st.sampled_from(["{db}", "{tmp}", "{file}", "{none}", "cpu", "toy-001", "train", "-1", "0", "3", "1e9", "--", "-", "", "🙂"]),
    st.text(st.characters(blacklist_categories=(), blacklist_characters="\0"), max_size=6).filter(
        lambda text: all(not "\ud800" <= letter <= "\udfff" for letter in text)
    ),
    # What the shell hands on when it is not UTF-8.
    st.just("a\udcffb"),
)  # fmt: skip
OPTIONS = {
    "query": (
        "--prompt --generation --file --top-k --where --level --focus --refine --group-by --aggregate --index --as-of --html "
        "--device --model --adapter"
    ).split(),
    "show": [], "info": [], "verify": [], "index": ["--recipe", "--level"], "delete": ["--where", "--ids"],
    "init": "--model --adapter --quantization --dtype --width --shuffles --seed --normalize --parameters --template".split(),
    "ingest": (
        "--split --source --id-field --limit --batch-tokens --device --on-bad-record --on-duplicate --token-width --model"
    ).split(),
    "nosuch": [],
}  # fmt: skip
FLAGS = [
    "--json",
    "--harmful",
    "--both",
    "--tokens",
    "--matrix",
    "--purge",
    "--dry-run",
    "--token-gradients",
    "--versions",
    "--help",
]
VALID = {
    "--generation": "blue 35", "--prompt": "Say 5", "--top-k": "3", "--where": "stars > 1", "--level": "token", "--refine": "5",
    "--focus": "blue", "--group-by": "source", "--index": "cpu", "--as-of": "2", "--html": "{tmp}/page.html", "--model": "{model}",
    "--width": "64", "--adapter": "{adapter}", "--ids": "{file}", "--recipe": "streamed", "--limit": "2", "--file": "{queries}",
}  # fmt: skip


@st.composite
def command_lines(draw) -> list[str]:
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words = [command]
    if draw(st.integers(0, 9)):
        words.append("{new}" if command == "init" else "{db}")
    if command in ("show", "ingest") and draw(st.integers(0, 9)):
        words.append("{file}" if command == "ingest" else "toy-002")
    for option in draw(st.lists(st.sampled_from(OPTIONS[command] or ["--json"]), max_size=4)):
        words += [option, VALID[option] if option in VALID and draw(st.integers(0, 3)) else draw(WORDS)]
    words += draw(st.lists(st.sampled_from(FLAGS), max_size=2))
    return words + draw(st.lists(WORDS, max_size=1))


@given(words=command_lines())
def test_command_lines(place, toy, models, adapters, words):
    TRIED["command lines"] += 1
    import contextlib
    import io
    from unittest.mock import patch

    from rapidin_vdb.cli import main

    copy, new = place / "copy", place / "new"
    if not copy.exists():
        shutil.copytree(toy.path, copy)
    shutil.rmtree(new, ignore_errors=True)
    write_jsonl(place / "few.jsonl", [{"id": "one", "text": "blue 1"}, {"id": "two", "text": "red"}])
    write_jsonl(place / "queries.jsonl", [{"prompt": "Say 1", "generation": "blue 7"}])
    filled = [
        word.replace("{db}", str(copy)).replace("{tmp}", str(place)).replace("{file}", str(place / "few.jsonl"))
        .replace("{none}", str(place / "none")).replace("{new}", str(new)).replace("{model}", str(models["llama"]))
        .replace("{adapter}", str(adapters["llama"])).replace("{queries}", str(place / "queries.jsonl"))
        for word in words
    ]  # fmt: skip

    def opened(path, **options):
        # The model is loaded once for all of them.
        database = rapidin_vdb.database.Database(SampleTable(str(path)))
        if not {"--model", "--adapter"} & set(words):
            database._engine = toy._loaded()
        return database

    before = content(SampleTable(str(copy)))
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with (
        patch("rapidin_vdb.open", opened), patch.object(sys, "argv", ["rapidin-vdb", *filled]),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop,
    ):  # fmt: skip
        main()
    out.flush()
    err.flush()
    said, told = out.buffer.getvalue().decode(), err.buffer.getvalue().decode()
    code = stop.value.code or 0
    assert code in (0, 1, 2), filled
    assert "Traceback" not in said + told
    after = content(SampleTable(str(copy)))
    if code:
        assert after == before, "an error changes nothing"
        assert not new.exists() or SampleTable(str(new)).snapshot().count() == 0
        assert told.startswith(("error: ", "Usage: ")) or "wrong: " in said, told
    elif "--json" in words and "--help" not in words:
        for line in said.splitlines():
            json.loads(line)
    if after != before:
        assert words[0] in ("delete", "ingest")
        shutil.rmtree(copy)
