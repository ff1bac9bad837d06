"""Killed at any moment: the database opens, is what was committed, and the same command finishes it."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.errors import TableNotFoundError

# How often each command is killed; the issue of a whole night may be asked for from outside.
KILLS = int(os.environ.get("RAPIDIN_KILLS", "4"))


def child(arguments: list[str], ready) -> None:
    """Run a command as the program does, with a commit after every few samples; say when all is loaded but the model."""
    import torch

    import rapidin_vdb.creation
    import rapidin_vdb.ingest
    from rapidin_vdb.cli import main

    torch.set_num_threads(1)
    rapidin_vdb.ingest._COMMIT_BYTES = 1024
    sys.argv = ["rapidin-vdb", *arguments]
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    ready.send(True)
    main()


@pytest.fixture(scope="module")
def context():
    """Processes are forked from one that has the heavy libraries loaded, but not Lance, whose threads do not survive it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "numba", "rapidin_vdb.gradient"])
    return context


def run(context, arguments, kill_after: float | None = None) -> tuple[int, float]:
    """Run a command, killed some seconds after it was loaded where asked; return its exit code and how long it took."""
    mine, theirs = context.Pipe()
    process = context.Process(target=child, args=([str(argument) for argument in arguments], theirs))
    process.start()
    theirs.close()
    mine.recv()
    started = time.monotonic()
    if kill_after is not None:
        process.join(kill_after)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode, time.monotonic() - started


def content(path) -> dict[str, tuple]:
    """Every row with everything in it, and every token's."""
    database = rapidin_vdb.open(path)
    snapshot, tokens = database._table.snapshot(), database._table.tokens.snapshot()
    rows = {}
    for row, vector, _ in [*snapshot.whole_rows(), *(tokens.whole_rows() if tokens is not None else ())]:
        key = (row["sample_id"], row.get("token_index"))
        assert key not in rows, "no row stands twice"
        rows[key] = (repr(sorted(row.items(), key=lambda pair: pair[0])), vector.tobytes())
    return rows


def check(path) -> None:
    report = rapidin_vdb.open(path).verify()
    assert report.findings == (), report.findings


@pytest.mark.slow
def test_killed_at_any_moment(context, tmp_path, models, adapters):
    """init, ingest, index and delete, each killed many times in a row until it is done, then begun anew."""
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(24))
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(f"toy-{number:03d}" for number in range(0, 24, 2)))

    def commands(path) -> dict[str, list]:
        return {
            "init": ["init", path, "--model", models["llama"], "--adapter", adapters["llama"], "--width", 64],
            "ingest": ["ingest", path, corpus, "--token-gradients", "--token-width", 16, "--batch-tokens", 300],
            "index": ["index", path],
            "delete": ["delete", path, "--ids", ids],
        }

    draw = random.Random(int(os.environ.get("RAPIDIN_SEED", "1")))
    states, durations = {}, {}
    for name, arguments in commands(tmp_path / "whole").items():
        code, durations[name] = run(context, arguments)
        assert code == 0
        states[name] = tmp_path / f"after-{name}"
        shutil.copytree(tmp_path / "whole", states[name])
    wanted = {name: content(state) for name, state in states.items()}
    assert len(wanted["ingest"]) > 24 and len(wanted["delete"]) < len(wanted["ingest"])

    kills = dict.fromkeys(states, 0)
    place, before = tmp_path / "killed", {"ingest": "init", "index": "ingest", "delete": "index"}
    for name in states:
        while kills[name] < KILLS:
            shutil.rmtree(place, ignore_errors=True)
            if name in before:
                shutil.copytree(states[before[name]], place)
            for attempt in range(100):
                # Every now and then it is left alone, for a machine that is slower now than it was.
                moment = None if attempt % 12 == 11 else draw.uniform(0.0, 1.1) * durations[name]
                code, _ = run(context, commands(place)[name], kill_after=moment)
                if code == -signal.SIGKILL:
                    kills[name] += 1
                try:
                    check(place)
                except TableNotFoundError:
                    assert name == "init"
                    continue
                rows = content(place)
                allowed = wanted["ingest"] if name == "ingest" else wanted[before.get(name, "init")]
                assert all(allowed[key] == row for key, row in rows.items()), "nothing but what was committed"
                if code == 0 or (name == "init" and attempt):
                    break
            assert content(place) == wanted[name], f"{name} ends as an undisturbed run does"
    assert all(count >= KILLS for count in kills.values()), kills
