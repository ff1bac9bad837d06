"""What an ingest knows of each id, kept off memory: against plain dicts, in little memory, and where there is no room."""

import os
import random
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field

import pytest
from conftest import toy_records, write_jsonl

from rapidin_vdb.ledger import Content, Contents, Entry, Ledger, Names, Numbers
from rapidin_vdb.plan import make_plan, planned_windows
from rapidin_vdb.records import Encoded, Sample

IDS = tuple(f"toy-{number:03d}" for number in range(20, 28))


@dataclass
class Wanted:
    """What a plan should be, from one record after another."""

    stored: dict[str, str]
    having: set[str]
    now: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0
    repeated: int = 0
    kept: int = 0

    def see(self, name: str, content: str, on_duplicate: str) -> None:
        before = self.now.get(name, self.stored.get(name))
        if before == content:
            self.unchanged += self.stored.get(name) == content
            self.repeated += self.stored.get(name) != content
        elif before is not None and on_duplicate == "skip":
            self.kept += 1
            return
        self.now[name] = content

    def outcome(self, token_gradients: bool) -> dict[str, tuple[str, str]]:
        """Return content and manner of all that is to be written, by id."""
        found = {}
        for name, content in self.now.items():
            if name not in self.stored:
                found[name] = (content, "new")
            elif self.stored[name] != content:
                found[name] = (content, "replaces")
            elif token_gradients and name not in self.having:
                found[name] = (content, "tokens only")
        return found


def manner(entry: Entry) -> str:
    return "tokens only" if entry.tokens_only else "replaces" if entry.replaces else "new"


@pytest.fixture
def stored(database, tmp_path):
    """A table with four of the ids, two of them with single tokens; and what is in it."""
    database.ingest(write_jsonl(tmp_path / "two.jsonl", toy_records(2, first=20)), token_gradients=True)
    contents = dict(database._table.snapshot().each_content(IDS))
    assert set(contents) == set(IDS[:4])
    return database._table, contents, {name for name, _ in database._table.tokens.snapshot().each_content()}


@pytest.mark.parametrize("token_gradients", [False, True])
@pytest.mark.parametrize("on_duplicate", ["skip", "replace"])
def test_a_plan_is_that_of_dicts(stored, on_duplicate, token_gradients):
    table, contents, having = stored
    draw = random.Random(1)
    seen = set()
    for _ in range(60):
        wanted, windows = Wanted(contents, having), []
        for _ in range(draw.randint(1, 3)):
            window = []
            for _ in range(draw.randint(1, 8)):
                name = draw.choice(IDS)
                content = draw.choice([contents.get(name, "a"), "b", "c"])
                wanted.see(name, content, on_duplicate)
                window.append((sample_of(name, content), encoded_of(name)))
            windows.append(window)
        with closing(Ledger()) as ledger:
            plan = make_plan(
                table, iter(windows), ledger, on_bad_record="stop", on_duplicate=on_duplicate,
                token_gradients=token_gradients,
            )  # fmt: skip
            outcome = wanted.outcome(token_gradients)
            assert (plan.samples, plan.kept) == (len(outcome), wanted.kept)
            assert plan.tokens_only == sum(how == "tokens only" for _, how in outcome.values())
            if on_duplicate == "skip":
                assert plan.unchanged == wanted.unchanged
            for _ in range(2):
                planned = list(planned_windows(iter(windows), ledger, 1000, width=8))
                written = [
                    (sample.sample_id, (sample.content_hash, manner(entries[sample.sample_id])))
                    for batch, entries in planned
                    for sample, _ in batch
                ]
                assert len(written) == len(outcome) and dict(written) == outcome
                assert list(planned_windows(iter(windows), ledger, 1000, width=8)) == [], "each is handed out once"
                ledger.hand_out_again()
        seen |= {how for _, how in outcome.values()}
    manners = {"new"} | ({"replaces"} if on_duplicate == "replace" else set())
    assert seen == manners | ({"tokens only"} if token_gradients else set())


def sample_of(name: str, content: str) -> Sample:
    return Sample(
        sample_id=name, prompt=None, response="x", split="train", source=None, content_hash=content, location="here"
    )


def encoded_of(name: str) -> Encoded:
    return Encoded(sample_id=name, input_ids=(1, 2), offsets=((0, 1),), truncated=False)


def test_names_are_those_of_a_set():
    draw, known = random.Random(2), set()
    with closing(Names()) as names:
        for _ in range(2000):
            name = f"{draw.randint(0, 900)}\0é"
            assert names.add(name) == (name not in known)
            known.add(name)


def test_contents_are_those_of_a_dict():
    draw = random.Random(4)
    with closing(Contents()) as contents:
        for _ in range(2):
            contents.clear()
            assert not contents.any() and contents.of("s1") == []
            wanted = {}
            for number in range(2000):
                name, content_hash = f"s{draw.randint(0, 300)}\0é", draw.choice("abc")
                # Of one content the first that is known stays.
                source = draw.choice([None, "x"])
                made = Content(
                    sample_id=name, content_hash=content_hash, texts=f"{number}", split="train", source=source
                )
                contents.add(made)
                wanted.setdefault(name, {}).setdefault(content_hash, made)
            assert contents.any() and max(map(len, wanted.values())) == 3
            for name, mine in wanted.items():
                assert sorted(contents.of(name), key=lambda one: one.content_hash) == [
                    mine[key] for key in sorted(mine)
                ]


def test_what_is_there_is_told_in_order():
    draw = random.Random(5)
    with closing(Ledger()) as ledger:
        names = {f"s{draw.randint(0, 900)}" for _ in range(400)}
        ledger.begin((name, "") for name in names)
        ledger.note_deleted(["s000", *list(names)[:3]])
        assert list(ledger.each_there()) == sorted(names) and ledger.there() == len(names)


def test_numbers_are_those_of_sets():
    draw, known = random.Random(3), {}
    with closing(Numbers()) as numbers:
        for _ in range(3000):
            key, number = (f"s{draw.randint(0, 40)}", draw.choice("ab")), draw.randint(0, 4)
            mine = known.setdefault(key, set())
            assert numbers.add(*key, number) == (number not in mine)
            mine.add(number)
            count = draw.randint(1, 6)
            assert numbers.some_are_missing(*key, count) == (mine != set(range(count)))
        assert not numbers.some_are_missing("none", "a", 3), "a sample without any lacks none"


MANY = """
from contextlib import closing
from pathlib import Path

from rapidin_vdb.ledger import Ledger, Names

def peak():
    # Not ru_maxrss, which begins with that of the parent process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10

def pairs(count):
    # In no order, as hashes are.
    return ((f"row-{number * 7919 % count:09d}", f"{number:064x}") for number in range(count))

count, before = 400_000, peak()
with closing(Ledger()) as ledger, closing(Names()) as names:
    ledger.begin(pairs(count))
    for name, content in pairs(count):
        assert names.add(name)
    entries = ledger.look(name for name, _ in pairs(1000))
    for entry in entries.values():
        entry.planned = "b"
    ledger.put(entries)
    assert ledger.planned() == 1000
    print("grew by", peak() - before, "MiB")
    del entries
    everything = dict(pairs(count))
    print("a dict by", peak() - before, "MiB")
"""


def test_it_takes_little_memory_however_many_there_are():
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True)
    grown, dict_grown = (int(line.split()[-2]) for line in done.stdout.splitlines())
    # The caches of both may be full: 32 MiB each.
    assert grown < 80 < dict_grown, done.stdout


SMALL = """
import resource
import signal
from contextlib import closing

from rapidin_vdb import ledger

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
ledger._CACHE_KIBIBYTES = 16
with closing(ledger.Ledger()) as kept:
    try:
        kept.begin((f"{number:0100d}", "a") for number in range(100_000))
    except ledger.ScratchError as error:
        print(error)
"""


def test_a_full_disk_is_told():
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True)
    folder = os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/var/tmp"
    assert f"Make room in {folder}, " in done.stdout, "where SQLite puts it, not Python"
    assert "cannot be kept: " in done.stdout and "SQLITE_TMPDIR=FOLDER" in done.stdout, done.stdout + done.stderr
