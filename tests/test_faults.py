"""A machine that gives out: full disks, folders that cannot be written, too few file handles. Nothing is damaged."""

import contextlib
import io
import os
import resource
import shutil
import subprocess
import sys
import traceback
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
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
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(16))
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(f"toy-{number:03d}" for number in range(0, 16, 2)))

    return partial(whole_life, models["llama"], adapters["llama"], corpus, ids)


def whole_life(model, adapter, corpus, ids, path) -> dict[str, list]:
    return {
        "init": ["init", path, "--model", model, "--adapter", adapter, "--width", 256],
        "ingest": ["ingest", path, corpus, "--token-gradients", "--token-width", 16, "--batch-tokens", 300],
        "index": ["index", path],
        "delete": ["delete", path, "--ids", ids],
        "query": ["query", path, "--prompt", "Say 5", "--generation", "blue 35", "--json"],
        "purge": ["delete", path, "--purge"],
    }


def free_of(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def here(arguments, handles=None) -> tuple[int, str]:
    """Run a command in this process, with so many free numbers for open files; return its exit code and what it says."""
    from rapidin_vdb.cli import main

    sys.argv = ["rapidin-vdb", *map(str, arguments)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            if handles is not None:
                # The limit is one of numbers, some of which are free below it.
                opened = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
                free = [number for number in range(10_000) if number not in opened]
                resource.setrlimit(resource.RLIMIT_NOFILE, (free[handles], hard))
            main()
    except SystemExit as stop:
        return stop.code or 0, said.getvalue()
    except BaseException:
        return 99, said.getvalue() + traceback.format_exc()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    raise AssertionError("main ends by SystemExit")


def starve(commands, folder, disk, sizes, answers) -> None:
    """In a process of its own: run every command with too little of something, and once more; send what happened.

    With a disk, that is so many KiB of room on it; else, so many handles of files.
    """
    import_module("rapidin_vdb.ingest")._COMMIT_BYTES = 32 << 10
    torch.set_num_threads(1)
    states, wanted = {}, {}
    for name, arguments in commands(folder / "whole").items():
        assert here(arguments)[0] == 0
        states[name] = folder / f"after-{name}"
        shutil.copytree(folder / "whole", states[name])
        wanted[name] = content(states[name])
    root = disk or folder
    place, filling, before = root / "db", root / "filling", None
    for name in states:
        for size in sizes:
            shutil.rmtree(place, ignore_errors=True)
            if before is not None:
                shutil.copytree(states[before], place)
            if disk is not None:
                filling.write_bytes(b"\0" * max(0, free_of(disk) - (size << 10)))
            code, err = here(commands(place)[name], None if disk else size)
            problems = []
            try:
                if code:
                    # Looked at while the disk is full.
                    check(place)
                    allowed = wanted[name] if before is None else wanted[before] | wanted[name]
                    if not all(allowed[key] == row for key, row in content(place).items()):
                        problems.append("rows that nobody wrote")
            except TableNotFoundError:
                if name != "init":
                    problems.append("the table is gone")
            except Exception as error:
                problems.append(repr(error))
            filling.unlink(missing_ok=True)
            if code and (again := here(commands(place)[name]))[0]:
                problems.append(f"not to be had later: {again}")
            if not problems:
                check(place)
                if content(place) != wanted[name]:
                    problems.append("another table")
            answers.send((name, size, code, err, problems))
        before = name
    answers.send(None)


def starved(context, arguments, said: tuple[str, ...]) -> dict[str, int]:
    """Return how often each command was refused, having seen that it said why, and that nothing was damaged."""
    mine, theirs = context.Pipe()
    child = context.Process(target=starve, args=(*arguments, theirs))
    child.start()
    theirs.close()
    found = list(iter(mine.recv, None))
    child.join(60)
    for name, size, code, err, problems in found:
        assert not problems, (name, size, code, err, problems)
        if code:
            assert code == 1 and err.splitlines()[-1].startswith("error: "), (name, size, err)
            assert any(text in err for text in said), (name, size, err)
        assert size < arguments[-1][-1] or not code, (name, err)
    return {name: sum(bool(answer[2]) for answer in found if answer[0] == name) for name, *_ in found}


@pytest.mark.slow
def test_a_full_disk(context, tmp_path, disk, commands, tally):
    """Every command with room for a part of what it writes: it says so, and with more room the same command ends."""
    rooms = (0, 8, 16, 32, 64, 128, 512)
    refused = starved(context, (commands, tmp_path, disk("size=64m"), rooms), ("No space left", "os error 28"))
    assert refused["query"] == 0, "an index that cannot be kept is used all the same"
    assert all(count for name, count in refused.items() if name != "query"), refused
    for name, count in refused.items():
        tally(
            f"`{name}` on a full disk", f"a tmpfs with {rooms[0]} to {rooms[-1]} KiB left", len(rooms),
            f"{count} times an error that says so, the table as it was or with whole commits; with room, the same command ends as an "
            "undisturbed run",
        )  # fmt: skip


@pytest.mark.slow
def test_too_few_file_handles(context, tmp_path, commands, tally):
    """From none to enough: an answer or an error, and a sound table."""
    handles = (0, 1, 2, 4, 8, 16, 200)
    refused = starved(context, (commands, tmp_path, None, handles), ("oo many open files", "os error 24"))
    assert all(refused.values()), refused
    tally(
        "too few file handles", f"{handles[0]} to {handles[-1]} free ones once the libraries are loaded; every command",
        len(handles) * len(refused),
        f"{sum(refused.values())} times an error that says so, the table sound; with enough, the same command ends as an undisturbed run",
    )  # fmt: skip


@pytest.mark.slow
def test_too_few_file_handles_from_the_start(tmp_path, commands, tally):
    """In processes that begin with few: wherever it happens, an error that says so; never that a table is damaged."""
    every = commands(tmp_path / "db")
    for name in ("init", "ingest"):
        assert here(every[name])[0] == 0
    program, refused = str(Path(sys.executable).with_name("rapidin-vdb")), 0
    limits = range(8, 28, 4)
    for limit in limits:
        # By a shell: Python would have to fork for it, of which Lance complains where it is loaded.
        limited = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", program, *map(str, every["query"])]
        done = subprocess.run(limited, capture_output=True, text=True)
        if done.returncode:
            refused += 1
            last = done.stderr.splitlines()[-1]
            assert done.returncode == 1 and last.startswith("error: ") and "oo many open files" in last, done.stderr
            assert "damaged" not in last
    assert 0 < refused < len(limits)
    check(tmp_path / "db")
    tally(
        "too few file handles from the start", f"`query` in processes with {limits[0]} to {limits[-1]} of them", len(limits),
        f"{refused} times an error that says so, else an answer",
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


def test_a_page_that_has_no_room(context, database, disk):
    folder = disk("size=64m")
    (folder / "page.html").write_text("what was there")
    (folder / "filling").write_bytes(b"\0" * (free_of(folder) - 8192))
    asked = ["query", database.path, "--prompt", "Say 5", "--generation", "blue 35", "--html", folder / "page.html"]
    told(Running(context, asked).end())
    assert (folder / "page.html").read_text() == "what was there"
    assert {path.name for path in folder.iterdir()} == {"page.html", "filling"}
    assert rapidin_vdb.open(database.path).info().samples == 24
