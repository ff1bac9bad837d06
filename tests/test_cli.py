"""The command line: what it prints where, its exit codes, and messages that say what to do next."""

import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import typer
from conftest import toy_records, write_jsonl

from rapidin_vdb.cli import show
from rapidin_vdb.cli.ids import read_ids
from rapidin_vdb.cli.interrupted import interruptible
from rapidin_vdb.errors import RapidInError, SpecError


def run(*arguments, check=None):
    """Run the real program, as a user does."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "rapidin_vdb", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check is not None:
        assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr
    return done


FRESH = """
import json, os, sys
from pathlib import Path
from rapidin_vdb.cli import main

*commands, folder = json.loads(sys.argv[1])
for number, command in enumerate(commands):
    for descriptor, name in ((1, "out"), (2, "err")):
        with Path(folder, f"{number}.{name}").open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["rapidin-vdb", *command]
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    assert not code, command
"""


def run_in_turn(folder, *commands) -> list[SimpleNamespace]:
    """Run commands one after the other in one fresh process, in which nothing was imported; return what each said."""
    words = json.dumps([*([str(word) for word in command] for command in commands), str(folder)])
    done = subprocess.run([sys.executable, "-W", "error", "-c", FRESH, words], timeout=300)
    assert done.returncode == 0, [path.read_text("utf-8") for path in sorted(folder.glob("*.err"))]
    return [
        SimpleNamespace(**{f"std{name}": (folder / f"{number}.{name}").read_text("utf-8") for name in ("out", "err")})
        for number in range(len(commands))
    ]


def call(capsys, *arguments) -> tuple[int, str, str]:
    """The same in this process, which spares the imports."""
    from rapidin_vdb.cli import main

    sys.argv = ["rapidin-vdb", *map(str, arguments)]
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


COMMANDS = (
    "init",
    "ingest",
    "index",
    "query",
    "pool",
    "show",
    "info",
    "delete",
    "clean",
    "compare",
    "verify",
    "serve",
    "demo",
)


def test_help_loads_no_heavy_library():
    heavy = ("torch", "faiss", "lancedb", "transformers", "pyarrow", "numpy")
    code = (
        "import sys\nfrom rapidin_vdb.cli import main\nsys.argv = ['rapidin-vdb', {!r}, '--help'][:{}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', [name for name in {heavy!r} if name in sys.modules])"
    )
    for command in COMMANDS:
        done = subprocess.run([sys.executable, "-c", code.format(command, 3)], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "loaded: []"
        assert "Example: rapidin-vdb " + command in done.stdout


def test_every_command_is_in_the_overview():
    overview = run("--help", check=0).stdout
    assert [line.split()[0] for line in overview.split("Commands:")[1].splitlines() if line.strip()] == [
        *COMMANDS,
        "evaluate",
    ]


def test_a_life_on_the_command_line(tmp_path, models, adapters, capsys):
    """What makes and fills it, and a query, in a process of their own; the rest in this one, which spares the imports."""

    def here(*arguments, check):
        code, out, err = call(capsys, *arguments)
        assert code == check, err
        return SimpleNamespace(stdout=out, stderr=err)

    db, lines = tmp_path / "db", write_jsonl(tmp_path / "toy.jsonl", toy_records(12))
    made, added, found = run_in_turn(
        tmp_path,
        ("init", db, "--model", models["llama"], "--adapter", adapters["llama"], "--width", 64),
        ("ingest", db, lines, "--split", "test", "--limit", 10),
        ("query", db, "--prompt", "Say 5", "--generation", "blue 35", "--top-k", 3, "--json"),
    )
    assert (made.stdout, made.stderr.strip()) == (
        "",
        f"made {db}: 12 parameter tensors of 416 coordinates, sketched to width 64; prompts are written by the template "
        f"alpaca. Next: rapidin-vdb ingest {db} FILE",
    )
    assert added.stdout == "" and added.stderr.startswith("10 samples added, in ")
    assert "; version 3\n" in added.stderr and "cut to" not in added.stderr
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    nothing = here("ingest", db, empty, check=0).stderr
    assert nothing == "0 samples added: there is no record in what was given\n", nothing
    told = here("info", db, check=0).stdout
    assert "\nmax tokens     512\n" in told and "\ntemplate       alpaca\n" in told and "quantization" in told
    here("index", db, "--recipe", "indexes/cpu.toml", check=0)
    (line,) = found.stdout.splitlines()
    ranking = json.loads(line)
    assert found.stderr == "", "quiet where stderr is no terminal"
    assert list(ranking) == [
        "query_id", "score_unit", "searched", "where", "seconds", "results", "score_error", "table_version", "identity"
    ]  # fmt: skip
    assert list(ranking["seconds"]) == ["gradient", "search", "tokens", "total"]
    assert list(ranking["results"][0]) == [
        "rank", "sample_id", "score", "exact_score", "split", "source", "prompt", "response", "metadata", "tokens"
    ]  # fmt: skip
    assert [(r["rank"], r["split"], r["exact_score"], r["tokens"]) for r in ranking["results"]] == [
        (rank, "test", None, None) for rank in (1, 2, 3)
    ]
    assert ranking["results"][0]["sample_id"] == "toy-005"
    asked = ("query", db, "--prompt", "Say 5", "--generation", "blue 35", "--top-k", 2)
    both = json.loads(here(*asked, "--both", "--group-by", "source", "--index", "cpu", "--json", check=0).stdout)
    assert list(both)[-6:] == ["results", "harmful", "groups", "score_error", "table_version", "identity"]
    assert all(group["error"] > 0 for group in both["groups"])
    assert {group["value"]: group["samples"] for group in both["groups"]} == {"even": 5, "odd": 5}
    assert both["harmful"][0]["score"] < both["results"][-1]["score"]
    table = here(*asked, "--both", "--group-by", "source", "--aggregate", "mean", check=0).stdout.splitlines()
    assert [line.split()[0] for line in table] == [
        "query:", "scores", "rank", "1", "2", "most", "rank", "1", "2", "samples", "5", "5"
    ]  # fmt: skip
    assert table[1] == f"  scores are off by {both['score_error']:.2g} or so (one standard deviation)"
    assert [float(line.split()[2]) for line in table[-2:]] == [
        pytest.approx(group["error"] / 5, rel=0.06) for group in both["groups"]
    ]
    assert max(map(len, table)) <= 80
    wrong = here(*asked, "--as-of", 999, check=1)
    assert "has no version 999, or no longer; wanted one from 1 to" in wrong.stderr
    *_, newest = map(json.loads, here("info", db, "--versions", "--json", check=0).stdout.splitlines())
    assert list(newest) == ["version", "made", "samples"] and newest["samples"] == 10
    assert here("info", db, "--versions", check=0).stdout.splitlines()[-1].split() == [
        str(newest["version"]), *newest["made"].split("+")[0].split("T"), "10", "scalar", "index",
    ]  # fmt: skip
    info = json.loads(here("info", db, "--json", check=0).stdout)
    assert list(info) == [
        "samples", "tokens", "width", "shuffles", "seed", "normalize", "model", "adapter", "table_version", "indexes", "bytes"
    ]  # fmt: skip
    assert (info["samples"], info["width"], info["shuffles"], info["seed"], info["normalize"]) == (
        10,
        64,
        20,
        42,
        "layer",
    )
    assert [(i["name"], i["fresh"], i["samples"], i["recipe"]["devices"]) for i in info["indexes"]] == [
        ("cpu", True, 10, ["cpu"])
    ]
    shown = json.loads(here("show", db, "toy-003", "--json", check=0).stdout)
    assert (shown["response"], shown["token_offsets"][0], shown["metadata"]) == ("黄 21", [0, 1], {"stars": 3})
    (tmp_path / "ids.txt").write_text("toy-001\nnobody\n")
    gone = here("delete", db, "--ids", tmp_path / "ids.txt", check=0)
    version = newest["version"]
    assert gone.stderr.splitlines() == [
        "1 samples deleted", "1 ids were not in the database: nobody", f"version {version + 1}"
    ]  # fmt: skip
    gone = here("delete", db, "--where", "source = 'odd'", check=0)
    assert gone.stderr == f"4 samples deleted\nversion {version + 2}\n"
    again = here("query", db, "--prompt", "Say 5", "--generation", "blue 35", check=0)
    assert "toy-005" not in again.stdout and again.stdout.startswith("query: 5 of 5 samples\n")


def test_ids_are_plain_lines_or_those_that_the_page_saves(tmp_path):
    path = tmp_path / "ids"
    path.write_text('toy-001\r\n\n  {toy-002}\n{"id": "toy-\u2028 003 "}\n{"id": 4, "why": "x"}', "utf-8")
    assert read_ids(path) == ["toy-001", "{toy-002}", "toy-\u2028 003 ", "4"]
    path.write_text('{"sample_id": "toy-001", "score": 1}\n"toy-002"\n{"id": "a", "sample_id": "b"}\n')
    assert read_ids(path) == ["toy-001", "toy-002", "a"]
    path.write_text('{ "id": "x", "results": []}\n{"sample_id": "y", "results": null}\n[z]\n{y\nx\n')
    assert read_ids(path) == ["x", "y", "[z]", "{y"], "records may have any further field"
    for line, message in (
        ('"toy-001', "line 2: neither a plain id nor JSON with one"),
        ('{"name": "toy-001"}', "line 2: neither a plain id nor JSON with one"),
        ('{"id": "toy-001"', "line 2: neither a plain id nor JSON with one"),
        ('{"id": null}', "line 2: its id is no text and no whole number"),
        ('{"results": [{"score": 1}]}', "line 2: one of its results has no sample_id"),
        ('{"results": [3]}', "line 2: one of its results has no sample_id"),
        ('{"results": "good"}', "line 2: neither a plain id nor JSON with one"),
        ('[{"results": []}]', "line 2: JSON that goes over several lines, or a list"),
        ("{", "line 2: JSON that goes over several lines, or a list"),
        ("[", "line 2: JSON that goes over several lines, or a list"),
    ):
        path.write_text(f"toy-001\n{line}\n")
        with pytest.raises(SpecError, match=message):
            read_ids(path)


def test_tables_fit_a_terminal_and_hide_control_characters(capsys, database, tmp_path):
    evil = {
        "id": "evil\x1b[2J",
        "prompt": "p\x1b]0;title\x07",
        "response": "a\u202eb" + "long " * 50,
        "note": "\x1b[31m",
    }
    database.ingest(write_jsonl(tmp_path / "evil.jsonl", [evil]))
    code, out, _ = call(capsys, "query", database.path, "--prompt", evil["prompt"], "--generation", evil["response"])
    assert code == 0 and "evil\\x1b[2J" in out
    assert max(map(len, out.splitlines())) <= 80
    shown = call(capsys, "show", database.path, evil["id"])[1]
    assert "note: \\x1b[31m" in shown and "p\\x1b]0;title\\x07" in shown and "a\\u202eb" in shown
    for text in (out, shown):
        assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query", "{db}", "--generation", "x", "--top-k", "0"], "--top-k is 0; wanted 1 or more"),
        (["query", "{db}", "--generation", "x", "--where", "nosuch = 1"], "No field named nosuch"),
        (["query", "{db}", "--generation", "x", "--where", "split = 'a'; DROP"], "holds a second statement"),
        (["query", "{db}", "--file", "{tmp}/none.jsonl"], "none.jsonl: no such file"),
        (["query", "{tmp}/none", "--generation", "x"], "no database at {tmp}/none; make one with: rapidin-vdb init"),
        (["init", "{db}", "--model", "x"], "a database is already at {db}; add to it with: rapidin-vdb ingest"),
        (["init", "{tmp}/new", "--model", "{tmp}/none"], "no model at {tmp}/none: no such folder"),
        (["ingest", "{db}", "{tmp}/none.jsonl"], "none.jsonl: no such file"),
        (["ingest", "{db}", "{tmp}/toy.jsonl", "--limit", "0"], "--limit is 0"),
        (["ingest", "{db}", "{tmp}/toy.jsonl", "--device", "cuda:9"], "this machine has . CUDA devices"),
        (["ingest", "{db}", "{tmp}/toy.jsonl", "--device", "tpu"], "--device tpu is no device"),
        (
            ["index", "{db}", "--recipe", "x.toml"],
            "no index recipe at x.toml; give a TOML file or one of: indexes/coarse_to_fine.toml",
        ),
        (
            ["ingest", "{db}", "{tmp}/toy.jsonl", "--split", "a\udcff"],
            "--split is 'a.udcff', which is no valid Unicode",
        ),
        (
            ["ingest", "{db}", "{tmp}/toy.jsonl", "--source", "\udcff"],
            "--source is '.udcff', which is no valid Unicode",
        ),
        (["init", "{tmp}/new", "--model", "m\udcff"], "the name of the model is 'm.udcff', which is no valid Unicode"),
        (["show", "{db}", "nobody"], "no sample 'nobody' in"),
        (["delete", "{db}", "--ids", "{tmp}/none"], "--ids {tmp}/none: cannot be read"),
        (["demo", "--dir", "{tmp}"], "--dir {tmp} is not empty; give a new folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(capsys, database, tmp_path, arguments, message):
    import re

    filled = [argument.format(db=database.path, tmp=tmp_path) for argument in arguments]
    before = database.info()
    code, out, err = call(capsys, *filled)
    assert (code, out) == (1, "")
    assert re.search(message.format(db=database.path, tmp=tmp_path), err), err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert database.info() == before and not (tmp_path / "new").exists()


def test_without_a_folder_for_temporary_files_what_needs_none_goes_on(capsys, database, monkeypatch):
    """Libraries ask for its name as they are imported; where all disks are full there is none."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
    code, out, err = call(capsys, "info", database.path)
    assert (code, err) == (0, "") and "24" in out
    assert tempfile.gettempdir() == "."


def test_wrong_usage_is_exit_2(capsys, database):
    for arguments in (
        ["nosuch"],
        ["query"],
        ["init", "x", "--model", "m", "--normalize", "both"],
        ["query", database.path, "--top-k", "many"],
        ["query", database.path],
        ["query", database.path, "--prompt", "x", "--file", "y"],
        ["delete", database.path],
    ):
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, "") and "Usage: " in err


def test_a_purge_says_what_it_did_and_did_not(capsys, database):
    import rapidin_vdb

    before = rapidin_vdb.open(database.path).info().bytes
    code, out, err = call(capsys, "delete", database.path, "--where", "source = 'odd'", "--purge")
    freed = before - rapidin_vdb.open(database.path).info().bytes
    assert (code, out) == (0, "") and freed > 0
    deleted, purged, missed, version = err.splitlines()
    assert deleted == "12 samples deleted" and version == f"version {database.version}"
    assert re.fullmatch(
        f"purged: .* none of its files, which take {freed:,} bytes less.*; older versions are gone, .*--as-of .*",
        purged,
    )
    assert missed.startswith("not reached (see SECURITY.md): copies ")
    show.purged(0)
    assert "bytes" not in capsys.readouterr().err, "where others have written meanwhile"


def test_each_bad_record_has_a_line(capsys, database, tmp_path):
    """But no name in a file makes one."""
    path = write_jsonl(tmp_path / "bad.jsonl", [{"output": ""}, {"a\nb": 1}])
    _, _, err = call(capsys, "ingest", database.path, path)
    first, second = err.splitlines()
    assert first.startswith(f"error: {path}, line 1: ") and first.endswith("--on-bad-record skip")
    assert second.startswith(f"  {path}, line 2: found the fields a\\nb; wanted ")


def test_ctrl_c_is_told_and_is_exit_130(capsys, database, monkeypatch, tmp_path):
    def interrupt(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("rapidin_vdb.database.Database.delete", interrupt)
    code, out, err = call(capsys, "delete", database.path, "--where", "stars = 1")
    assert (code, out) == (130, "")
    assert err == (
        "interrupted: what was committed is kept (24 samples are in the table); run the same command again to go on\n"
    )
    monkeypatch.setattr("rapidin_vdb.database.Database.show", interrupt)
    assert call(capsys, "show", database.path, "x") == (130, "", "interrupted\n"), "nothing is to be gone on with"
    monkeypatch.setattr("rapidin_vdb.web.serve", interrupt)
    assert call(capsys, "serve", database.path) == (130, "", "stopped\n"), "which is no accident"
    for endless, said in ((True, "stopped\n"), (False, "interrupted: what was committed is kept; run the same ")):
        with pytest.raises(typer.Exit):
            interruptible(interrupt, endless=endless, goes_on=True)(None)
        assert capsys.readouterr().err.startswith(said), "whatever its name"
    call(capsys, "delete", tmp_path / "nowhere", "--where", "stars = 1")
    monkeypatch.setattr("rapidin_vdb.creation.SampleTable.__init__", interrupt)
    err = call(capsys, "delete", database.path, "--where", "stars = 1")[2]
    assert err == "interrupted: what was committed is kept; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["ingest", "db\x1b[31m", "x.jsonl"], "error: no database at db\\x1b[31m; make one with"),
        (["info", "a\nerror: b\udcff"], "error: no database at a\\nerror: b\\udcff; make"),
        (["info", "s3://KEY:se/cr@et@host/db?token=hush"], "error: s3://***@host/db?***: give credentials in"),
        (["init", "{db}2", "--model", "s3://KEY:se/cret@host"], "error: no model at s3://***@host: no such folder"),
        (
            ["ingest", "{db}", "s3://KEY:se/cret@host/x.jsonl"],
            "s3://***@host/x.jsonl: this is an address, and records are read from",
        ),
        (["show", "{db}", "https://KEY:secret@host"], "no sample 'https://***@host' in"),
        (["show", "{db}", "x", "https://KEY:secret@host"], "***@host"),
        (["query", "{db}", "--generation", "x", "--where", "split = '\x1b]0;'"], None),
        (["serve", "{db}", "--token", "\x1b[2J"], "error: "),
    ],
)
def test_errors_hold_no_control_characters_and_no_secrets(capsys, database, arguments, wanted):
    filled = [argument.format(db=database.path) for argument in arguments]
    code, out, err = call(capsys, *filled)
    if wanted is not None:
        assert code in (1, 2) and wanted in err, err
        assert len(err.splitlines()) == 1 or code == 2
    assert all(secret not in out + err for secret in ("secret", "se/cr", "KEY", "hush"))
    assert all(character.isprintable() or character == "\n" for character in out + err)


def test_warnings_hold_no_control_characters(tmp_path):
    """In a process of its own, whose logging nobody else has set up."""
    code = (
        "import sys, logging\nfrom rapidin_vdb.cli import main\nsys.argv = ['rapidin-vdb', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "logging.getLogger('rapidin_vdb').warning('%s', 'a\\x1b[31m s3://KEY:secret@h')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "a\\x1b[31m s3://***@h\n"


def test_a_filter_that_matches_nothing_is_an_answer(capsys, database):
    code, out, _ = call(capsys, "query", database.path, "--generation", "x", "--where", "stars > 99", "--json")
    assert (code, json.loads(out)["results"], json.loads(out)["searched"]) == (0, [], 0)


def test_skipped_records_are_counted_and_listed(capsys, database, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": ""}\nnonsense\n')
    code, _, err = call(capsys, "ingest", database.path, path, "--on-bad-record", "skip")
    assert code == 0
    first, *rest = err.splitlines()
    assert first.startswith("1 samples added, 2 skipped, in ")
    assert [line[: len(f"skipped: {path}, line 2")] for line in rest] == [
        f"skipped: {path}, line {number}" for number in (2, 3)
    ]


def test_progress_is_drawn_on_a_terminal(database, tmp_path):
    """Through a pseudo-terminal: a bar with a count, and nothing of it on stdout."""
    import os
    import pty

    lines = write_jsonl(tmp_path / "more.jsonl", toy_records(30, first=100))
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "rapidin_vdb", "ingest", database.path, str(lines)], stdout=subprocess.PIPE, stderr=follower,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(follower)
    drawn = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        drawn += part
    os.close(leader)
    out, _ = child.communicate()
    text = drawn.decode("utf-8")
    assert (child.returncode, out) == (0, b"")
    assert "ingest" in text and "30/30" in text and "/s" in text and "30 samples added" in text


def test_rankings_are_written_as_they_are_ready(capsys, database, tmp_path, monkeypatch):
    """What an error cuts off was hours of work."""
    from rapidin_vdb.database import Database

    lines = [{"prompt": f"Say {n}", "generation": f"blue {n}"} for n in range(3)]
    path = write_jsonl(tmp_path / "q.jsonl", lines)
    original = Database.ask

    def breaking(self, question, queries, **options):
        for number, ranking in enumerate(original(self, question, queries, **options)):
            if number == 2:
                raise RapidInError("no more")
            yield ranking

    monkeypatch.setattr(Database, "ask", breaking)
    code, out, err = call(capsys, "query", database.path, "--file", path, "--json")
    assert code == 1 and "no more" in err
    assert [json.loads(line)["query_id"] for line in out.splitlines()] == ["1", "2"]
    monkeypatch.undo()
    code, whole, _ = call(capsys, "query", database.path, "--file", path, "--json")

    def told(text):
        return [json.loads(line) | {"seconds": None} for line in text.splitlines()]

    assert code == 0 and told(whole)[:2] == told(out) and len(told(whole)) == 3


def test_what_is_printed_beside_progress_goes_to_stdout(monkeypatch):
    """Where stderr is a terminal, rich would take stdout to be its own, and a file would get nothing."""
    import io

    from rapidin_vdb.cli import progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out, err = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with progress.progress_bars() as draw:
        draw("tokens", 1, 2)
        typer.echo("a line")
    assert out.getvalue() == "a line\n" and "tokens" in err.getvalue() and "a line" not in err.getvalue()


def test_where_stderr_is_no_terminal_long_work_says_how_far_it_is(capsys):
    """By a clock of its own: nothing for a minute, then a line every five minutes, of what went on since the last."""
    from rapidin_vdb.cli.progress import progress_bars

    now = 1000.0
    said = []

    def told():
        out, err = capsys.readouterr()
        assert out == ""
        if err:
            said.append((now, err))

    with progress_bars(clock=lambda: now) as progress:
        for done in range(0, 40):  # 1,024 records a second
            progress("records", 1024 * done, 0)
            told()
            now += 1
        # Four samples of 300 tokens each in 8 seconds: half a sample a second, 150 tokens.
        for batch in range(121):
            progress("ingest", 4 * batch, 40_000)
            told()
            progress("tokens", 1200 * batch, 12_000_000)
            told()
            now += 8
    assert said == [
        (
            1064.0,
            "records 39,936, 1,024.0/s; ingest 12/40,000, 0.5/s, 22:12:56 left; tokens 2,400/12,000,000, 150.0/s, "
            "22:13:04 left\n",
        ),
        (1368.0, "ingest 164/40,000, 0.5/s, 22:07:52 left; tokens 48,000/12,000,000, 150.0/s, 22:08:00 left\n"),
        (1672.0, "ingest 316/40,000, 0.5/s, 22:02:48 left; tokens 93,600/12,000,000, 150.0/s, 22:02:56 left\n"),
        (1976.0, "ingest 468/40,000, 0.5/s, 21:57:44 left; tokens 139,200/12,000,000, 150.0/s, 21:57:52 left\n"),
    ]


def test_a_line_of_progress_says_no_more_than_is_known(capsys):
    """No rate of what has only begun, no time left of what is done or has no end that is known."""
    from rapidin_vdb.cli.progress import progress_bars

    now = 0.0
    with progress_bars(clock=lambda: now) as progress:
        now = 60.0
        progress("index", 0, 5)
        now = 360.0
        progress("records", 7, 0)
        progress("index", 5, 5)
    assert capsys.readouterr() == ("", "index 0/5\nrecords 7\n")
