"""Killed at any moment: the database opens, is what was committed, and the same command finishes it."""

import itertools
import os
import random
import re
import shutil
import signal

import pytest
from children import Running, check, content
from conftest import toy_records, write_jsonl

from rapidin_vdb.errors import TableNotFoundError

# How often each command is killed; the issue of a whole night may be asked for from outside.
KILLS = int(os.environ.get("RAPIDIN_KILLS", "1"))


def replacing(record: dict) -> dict:
    return record | {"output": f"other {record['id']}"}


@pytest.mark.slow
def test_killed_at_any_moment(context, tmp_path, models, adapters, tally):
    """Each command of a database's life, killed many times in a row until it is done, then begun anew."""
    records = toy_records(24)
    corpus = write_jsonl(tmp_path / "toy.jsonl", records)
    changed = write_jsonl(tmp_path / "changed.jsonl", [replacing(record) for record in records[::3]])
    # Stars were whole numbers until now.
    halves = write_jsonl(tmp_path / "halves.jsonl", [r | {"stars": 0.5} for r in toy_records(8, first=24)])
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(f"toy-{number:03d}" for number in range(0, 24, 2)))
    single = ["--token-gradients", "--token-width", 16, "--batch-tokens", 300]

    def commands(path) -> dict[str, list]:
        return {
            "init": ["init", path, "--model", models["llama"], "--adapter", adapters["llama"], "--width", 64],
            "ingest": ["ingest", path, corpus, *single],
            "index": ["index", path],
            "ingest --on-duplicate replace": ["ingest", path, changed, "--on-duplicate", "replace", *single],
            "ingest that widens a column": ["ingest", path, halves, *single],
            "delete": ["delete", path, "--ids", ids],
            "delete --purge": ["delete", path, "--where", "source = 'odd' AND stars > 1", "--purge"],
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
    names = list(states)
    before = dict(itertools.pairwise(names))
    before = {later: earlier for earlier, later in before.items()}
    sizes = [len(wanted[name]) for name in names]
    assert sizes[0] == 0 < sizes[1] == sizes[2] < sizes[4] > sizes[5] > sizes[6] > 0, sizes
    assert set(wanted["ingest"]) == set(wanted["index"]) and wanted["ingest"] == wanted["index"]
    stars = [row["stars"] for (_, number), (*_, row) in wanted["ingest that widens a column"].items() if number is None]
    assert {0.5, 1.0} <= set(stars) and {type(value) for value in stars} == {float}

    kills = dict.fromkeys(states, 0)
    place = tmp_path / "killed"
    for name in names:
        earlier = wanted[before[name]] if name in before else {}
        while kills[name] < KILLS:
            shutil.rmtree(place, ignore_errors=True)
            if name in before:
                shutil.copytree(states[before[name]], place)
            rows = dict(earlier)
            for attempt in range(100):
                # Most of what is written is written late. Every now and then a command is left alone, for a machine that
                # is slower now than it was.
                share = draw.uniform(0.0, 1.1) if attempt % 2 else draw.uniform(0.6, 1.05)
                moment = None if attempt % 12 == 11 else share * durations[name]
                code = Running(context, commands(place)[name]).end(after=moment).code
                if code == -signal.SIGKILL:
                    kills[name] += 1
                try:
                    check(place)
                except TableNotFoundError:
                    assert name == "init"
                    continue
                rows, there = content(place), rows
                for key, row in rows.items():
                    assert same(row, earlier.get(key)) or same(row, wanted[name].get(key)), (name, key, row)
                if name.startswith("delete"):
                    assert set(wanted[name]) <= set(rows) <= set(there), (
                        f"{name}: what is gone stays so, the rest stays"
                    )
                else:
                    assert names_of(there) <= names_of(rows), f"{name}: what was committed is still there"
                    # And what was new stays so: nothing committed is undone.
                    kept = [key for key, row in there.items() if same(row, wanted[name].get(key))]
                    assert all(same(rows.get(key), wanted[name][key]) for key in kept), name
                if code == 0 or (name == "init" and attempt):
                    break
            assert content(place) == wanted[name], f"{name} ends as an undisturbed run does"
    assert all(count >= KILLS for count in kills.values()), kills
    for name, count in kills.items():
        tally(
            f"`{name}` is killed", "`kill -9` at a moment drawn at random, again and again until it ends", count,
            "opens, `verify` is clean, nothing but what was committed, and all of that; the same command ends with the table of an "
            "undisturbed run, bit by bit",
        )  # fmt: skip


def names_of(rows: dict) -> set[str]:
    """The samples; a token may be of a text that was replaced since."""
    return {name for name, number in rows if number is None}


def same(row: tuple | None, other: tuple | None) -> bool:
    """Are they one row? A column that is being widened may be away until a next writer has finished that."""
    if row is None or other is None:
        return row is other
    return (
        row[:2] == other[:2]
        and all(other[2].get(name) == value for name, value in row[2].items())
        and (set(other[2]) - set(row[2]) <= {"stars"})
    )


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
    wanted, stops, numbers = content(tmp_path / "whole"), 0, []
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
        last = ended.err.splitlines()[-1]
        told = re.fullmatch(
            r"interrupted: what was committed is kept( \((\d+) samples are in the table\))?; run the same command again to go on",
            last,
        )
        assert told, ended.err
        if told[2] is not None:
            numbers.append(int(told[2]))
            assert numbers[-1] == len(rows)
        stops += 1
    assert stops and numbers, "else it was never interrupted"
    assert Running(context, ["ingest", tmp_path / "stopped", *options]).end().code == 0
    assert content(tmp_path / "stopped") == wanted
    tally(
        f"`ingest` with {workers} worker{'s' if workers > 1 else ''} is interrupted", "Ctrl-C (SIGINT) at moments spread over the run",
        stops, "exit 130, what was computed is committed and said; the same command ends as an undisturbed run",
    )  # fmt: skip
