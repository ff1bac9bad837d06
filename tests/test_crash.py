"""Killed at any moment: the database opens, is what was committed, and the same command finishes it."""

import os
import random
import shutil
import signal

import pytest
from children import Running, check, content
from conftest import toy_records, write_jsonl

from rapidin_vdb.errors import TableNotFoundError

# How often each command is killed; the issue of a whole night may be asked for from outside.
KILLS = int(os.environ.get("RAPIDIN_KILLS", "4"))


@pytest.mark.slow
def test_killed_at_any_moment(context, tmp_path, models, adapters, tally):
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
        ended = Running(context, arguments).end()
        assert ended.code == 0, ended.err
        durations[name] = ended.seconds
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
                code = Running(context, commands(place)[name]).end(after=moment).code
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
    for name, count in kills.items():
        tally(
            f"`{name}` is killed", "`kill -9` at a moment drawn at random, again and again until it ends", count,
            "opens, `verify` is clean, nothing but what was committed; the same command ends with the table of an undisturbed "
            "run, bit by bit",
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_at_any_moment(context, tmp_path, models, adapters, workers, tally):
    """Ctrl-C: what was computed is committed, said, and gone on with."""
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(60))
    init = ["--model", models["llama"], "--adapter", adapters["llama"], "--width", 64]
    options = [corpus, "--batch-tokens", 200, "--workers-per-device", workers, "--device", "cpu"]
    for name in ("whole", "stopped"):
        assert Running(context, ["init", tmp_path / name, *init]).end().code == 0
    seconds = Running(context, ["ingest", tmp_path / "whole", *options]).end().seconds
    wanted, stops = content(tmp_path / "whole"), 0
    for attempt in range(8):
        ended = Running(context, ["ingest", tmp_path / "stopped", *options]).end(
            after=seconds * (0.1 + 0.1 * attempt), sign=signal.SIGINT
        )
        check(tmp_path / "stopped")
        rows = content(tmp_path / "stopped")
        assert all(wanted[key] == row for key, row in rows.items())
        if ended.code == 0:
            break
        assert ended.code == 130, ended.err
        assert ended.err.endswith("interrupted: what was committed is kept; run the same command again to go on\n")
        stops += 1
    assert stops, "else it was never interrupted"
    assert Running(context, ["ingest", tmp_path / "stopped", *options]).end().code == 0
    assert content(tmp_path / "stopped") == wanted
    tally(
        f"`ingest` with {workers} worker{'s' if workers > 1 else ''} is interrupted", "Ctrl-C (SIGINT) at moments spread over the run",
        stops, "exit 130, what was computed is committed and said; the same command ends as an undisturbed run",
    )  # fmt: skip
