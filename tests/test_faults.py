"""A machine that gives out: full disks, folders that cannot be written, too few file handles. Nothing is damaged."""

import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from children import Running, check, content
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.errors import TableNotFoundError


def mount(*arguments) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, 64 MiB at first, as a function that makes it another size or read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64m", "none", folder):
        pytest.skip("no tmpfs can be mounted here (that takes root)")

    def change(options: str) -> Path:
        assert mount("-o", f"remount,{options}", folder)
        return folder

    yield change
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def commands(tmp_path, models, adapters):
    """The life of a database, command by command, and what it holds after each."""
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(40))
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(f"toy-{number:03d}" for number in range(0, 40, 2)))

    def of(path) -> dict[str, list]:
        return {
            "init": ["init", path, "--model", models["llama"], "--adapter", adapters["llama"], "--width", 256],
            "ingest": ["ingest", path, corpus, "--token-gradients", "--token-width", 16, "--batch-tokens", 300],
            "index": ["index", path],
            "delete": ["delete", path, "--ids", ids],
            "query": ["query", path, "--prompt", "Say 5", "--generation", "blue 35", "--json"],
            "purge": ["delete", path, "--purge"],
        }

    return of


def free_of(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.mark.slow
@pytest.mark.skip(reason="written, but never run to its end: what it finds is not known")
def test_a_full_disk(context, tmp_path, disk, commands, tally):
    """Every command with room for a part of what it writes: it says so, and with more room the same command ends."""
    folder = disk("size=64m")
    wanted, states, before = {}, {}, None
    for name, arguments in commands(tmp_path / "whole").items():
        assert Running(context, arguments).end().code == 0
        states[name] = tmp_path / f"after-{name}"
        shutil.copytree(tmp_path / "whole", states[name])
        wanted[name] = content(states[name])
    refused = dict.fromkeys(states, 0)
    for name in states:
        for kilobytes in (0, 4, 8, 16, 32, 64, 96, 128, 192):
            place = folder / "db"
            shutil.rmtree(place, ignore_errors=True)
            disk("size=64m")
            if before is not None:
                shutil.copytree(states[before], place)
            filling = folder / "filling"
            filling.write_bytes(b"\0" * max(0, free_of(folder) - (kilobytes << 10)))
            ended = Running(context, commands(place)[name]).end()
            if ended.code:
                refused[name] += 1
                assert ended.code == 1 and ended.err.splitlines()[-1].startswith("error: "), ended
                assert "No space left" in ended.err or "os error 28" in ended.err, ended.err
            # Looked at while it is full, and after.
            for _ in range(2):
                try:
                    check(place)
                    allowed = wanted[name] if before is None else wanted[before] | wanted[name]
                    assert all(allowed[key] == row for key, row in content(place).items())
                except TableNotFoundError:
                    assert name == "init"
                filling.unlink(missing_ok=True)
            if ended.code:
                assert Running(context, commands(place)[name]).end().code == 0
            assert content(place) == wanted[name], name
        before = name
    assert refused["query"] == 0, "an index that cannot be kept is used all the same"
    assert all(count for name, count in refused.items() if name not in ("query",)), refused
    for name, count in refused.items():
        tally(
            f"`{name}` on a full disk", "a tmpfs with 0 to 192 KiB left", 9,
            f"{count} times an error that says so, the table as it was or with whole commits; with room, the same command ends as an "
            "undisturbed run",
        )  # fmt: skip


READING = ("info", "show", "query", "verify")


def life(path) -> dict[str, list]:
    return {
        "info": ["info", path, "--json"],
        "show": ["show", path, "toy-003", "--json"],
        "query": ["query", path, "--prompt", "Say 5", "--generation", "blue 35", "--top-k", 3],
        "verify": ["verify", path],
        "ingest": ["ingest", path, Path(path).parent / "more.jsonl"],
        "index": ["index", path, "--recipe", "streamed"],
        "delete": ["delete", path, "--where", "stars = 1"],
        "purge": ["delete", path, "--purge"],
    }


def told(ended) -> None:
    assert ended.code == 1 and ended.err.startswith("error: ") and len(ended.err.splitlines()) == 1, ended


@pytest.mark.parametrize("indexed", [True, False])
def test_a_disk_that_can_only_be_read(context, database, tmp_path, disk, indexed, tally):
    """Whatever only reads goes on; the rest says that it cannot write."""
    if indexed:
        database.index("cpu")
    write_jsonl(tmp_path / "more.jsonl", toy_records(3, first=50))
    folder = disk("size=64m")
    shutil.copytree(database.path, folder / "db")
    shutil.copy(tmp_path / "more.jsonl", folder)
    before = content(folder / "db")
    answers = {
        name: Running(context, arguments).end() for name, arguments in life(database.path).items() if name in READING
    }
    disk("ro")
    for name, arguments in life(folder / "db").items():
        ended = Running(context, arguments).end()
        if name in READING:
            assert ended.code == 0, ended.err
            if name in ("show", "query"):
                assert ended.out == answers[name].out
        else:
            told(ended)
            assert "Read-only file system" in ended.err or "os error 30" in ended.err, ended.err
    new = Running(context, ["init", folder / "new", "--model", database.fingerprint.model]).end()
    told(new)
    disk("rw")
    assert content(folder / "db") == before and not (folder / "new").exists()
    tally(
        f"a disk that can only be read, {'with' if indexed else 'without'} an index", "a tmpfs mounted read-only; every command", 9,
        "`info`, `show`, `query` and `verify` answer as ever; the others say that they cannot write",
    )  # fmt: skip


def run_without_privileges(*arguments) -> subprocess.CompletedProcess:
    """Root may write everywhere: its privileges are dropped, and it stays the owner."""
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*prefix, sys.executable, "-m", "rapidin_vdb", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_folders_without_permission(database, tmp_path, tally):
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("no setpriv to drop root's privileges with")
    write_jsonl(tmp_path / "more.jsonl", toy_records(3, first=50))
    before, root = content(database.path), Path(database.path)
    folders = [root, *[path for path in root.rglob("*") if path.is_dir()]]
    try:
        for mode in (0o555, 0o000):
            for folder in reversed(folders):
                folder.chmod(mode)
            for name, arguments in life(root).items():
                done = run_without_privileges(*arguments)
                assert "Traceback" not in done.stderr, done.stderr
                if mode == 0o555 and name in READING:
                    assert done.returncode == 0, done.stderr
                else:
                    assert done.returncode == 1 and done.stderr.startswith("error: "), (name, done)
                    assert "ermission denied" in done.stderr or "os error 13" in done.stderr, (name, done.stderr)
            for folder in folders:
                folder.chmod(0o755)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert content(root) == before
    tally(
        "folders without permission to write, or to read", "modes 555 and 000, root's privileges dropped; every command", 16,
        "reading goes on where it may; else an error that says so, nothing changed",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skip(reason="written, but never run to its end: what it finds is not known")
def test_too_few_file_handles(context, tmp_path, commands, tally):
    """From too few to open anything up to enough: an answer or an error, and a sound table."""
    wanted, before, refused = {}, None, 0
    for name, arguments in commands(tmp_path / "whole").items():
        assert Running(context, arguments).end().code == 0
        shutil.copytree(tmp_path / "whole", tmp_path / f"after-{name}")
        wanted[name] = content(tmp_path / "whole")
    place = tmp_path / "db"
    for name in wanted:
        for handles in (10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 40, 64, 256):
            shutil.rmtree(place, ignore_errors=True)
            if before is not None:
                shutil.copytree(tmp_path / f"after-{before}", place)
            limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (handles, handles))
            ended = Running(context, commands(place)[name], before=limit).end()
            if ended.code:
                refused += 1
                assert ended.code == 1 and ended.err.splitlines()[-1].startswith("error: "), (name, handles, ended)
                assert "oo many open files" in ended.err or "os error 24" in ended.err, (name, handles, ended.err)
                try:
                    check(place)
                    allowed = wanted[name] if before is None else wanted[before] | wanted[name]
                    assert all(allowed[key] == row for key, row in content(place).items())
                except TableNotFoundError:
                    assert name == "init"
                assert Running(context, commands(place)[name]).end().code == 0
            assert content(place) == wanted[name], (name, handles)
        assert ended.code == 0, "with enough of them it works"
        before = name
    assert refused >= 6, refused
    tally(
        "too few file handles", "limits of 10 to 256, set once the libraries are loaded; every command", 13 * len(wanted),
        f"{refused} times an error that says so, the table sound; with enough, the same command ends as an undisturbed run",
    )  # fmt: skip


def test_a_page_that_has_no_room(context, database, disk):
    folder = disk("size=64m")
    (folder / "page.html").write_text("what was there")
    (folder / "filling").write_bytes(b"\0" * (free_of(folder) - 8192))
    asked = ["query", database.path, "--prompt", "Say 5", "--generation", "blue 35", "--html", folder / "page.html"]
    told(Running(context, asked).end())
    assert (folder / "page.html").read_text() == "what was there"
    assert {path.name for path in folder.iterdir()} == {"page.html", "filling"}
    assert rapidin_vdb.open(database.path).info().samples == 24
