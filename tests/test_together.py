"""Two at once, in processes of their own: no row lost, none twice, and readers see committed versions only."""

import random
import signal
import threading
import time
from pathlib import Path

import pytest
from children import Running, check, content
from conftest import toy_records, write_jsonl
from filelock import FileLock

import rapidin_vdb
from rapidin_vdb.locks import holder_of

SLOW = pytest.mark.slow


def samples(path) -> dict[str, tuple]:
    """Rows of samples, without what depends on who came first: nothing does."""
    return {key[0]: row for key, row in content(path).items() if key[1] is None}


def both(context, first, second, *, apart: float = 0.0):
    """Run two commands at once, the second some seconds later; both must end well."""
    one = Running(context, first)
    time.sleep(apart)
    other = Running(context, second)
    ended = one.end(), other.end()
    assert [e.code for e in ended] == [0, 0], ended
    return ended


@pytest.fixture
def empty(tmp_path, models, adapters):
    def make(name: str):
        return rapidin_vdb.init(tmp_path / name, model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)

    return make


@SLOW
def test_two_ingests(context, tmp_path, empty, tally):
    """Of files that overlap, with single tokens too, begun at various distances."""
    first = write_jsonl(tmp_path / "first.jsonl", toy_records(40))
    second = write_jsonl(tmp_path / "second.jsonl", toy_records(40, first=20))
    options = ["--token-gradients", "--token-width", 16, "--batch-tokens", 300]
    whole = empty("whole")
    whole.ingest(first, second, token_gradients=True, token_width=16, batch_tokens=300)
    wanted = content(whole.path)
    for attempt, apart in enumerate((0.0, 0.1, 0.3, 0.6)):
        path = empty(f"db{attempt}").path
        both(context, ["ingest", path, first, *options], ["ingest", path, second, *options], apart=apart)
        check(path)
        assert set(content(path)) == set(wanted)
    tally(
        "two ingests at once",
        "of files that overlap, begun 0 to 0.6 s apart, with single tokens",
        4,
        "every sample and token once",
    )


@SLOW
def test_two_replacements_of_the_same(context, tmp_path, database, tally):
    """One of the two is what is left, of each sample; never both, never neither."""
    changed = [[record | {"output": f"{word} {record['id']}"} for record in toy_records(24)] for word in ("one", "two")]
    files = [write_jsonl(tmp_path / f"{number}.jsonl", records) for number, records in enumerate(changed)]
    for _ in range(3):
        both(
            context,
            *(["ingest", database.path, file, "--on-duplicate", "replace", "--batch-tokens", 200] for file in files),
        )
        check(database.path)
        found = rapidin_vdb.open(database.path)._table.snapshot().samples([r["id"] for r in toy_records(24)])
        assert len(found) == 24
        assert all(sample.response in (f"one {name}", f"two {name}") for name, sample in found.items())
    tally(
        "two replacements of the same samples at once",
        "`ingest --on-duplicate replace`, other texts",
        3,
        "each once, from one of the two",
    )


@SLOW
def test_an_ingest_and_deletes(context, tmp_path, database, tally):
    """What is deleted was there; what is not matched stays."""
    more = write_jsonl(tmp_path / "more.jsonl", toy_records(60, first=24))
    running = Running(context, ["ingest", database.path, more, "--batch-tokens", 200])
    deleted = times = 0
    while running.process.is_alive():
        times += 1
        gone = rapidin_vdb.open(database.path).delete(where="source = 'odd'")
        deleted += gone
    ended = running.end()
    assert ended.code == 0, ended.err
    check(database.path)
    left = samples(database.path)
    assert {f"toy-{number:03d}" for number in range(0, 84, 2)} <= set(left)
    assert len(left) + deleted == 84
    tally(
        "deletes while an ingest is running",
        "`delete --where` again and again",
        times,
        "what matched was there and is gone, the rest is there",
    )


@SLOW
def test_an_ingest_and_queries(context, tmp_path, database, tally):
    """Every answer is that of one committed version, whole."""
    more = write_jsonl(tmp_path / "more.jsonl", toy_records(60, first=24))
    database.index("cpu")
    database._loaded()
    running = Running(context, ["ingest", database.path, more, "--batch-tokens", 200])
    answers = []
    while running.process.is_alive():
        answers += database.query("Say 5", "blue 35", top_k=100)
    assert running.end().code == 0
    answers += database.query("Say 5", "blue 35", top_k=100)
    scores = {result.sample_id: result.score for result in answers[-1].results}
    assert len(scores) == 84
    sizes = [answer.searched for answer in answers]
    assert sizes == sorted(sizes) and sizes[-1] == 84 and len(set(sizes)) > 2, sizes
    for answer in answers:
        assert len(answer.results) == answer.searched
        assert all(result.score == scores[result.sample_id] for result in answer.results)
    tally(
        "queries while an ingest is running",
        "again and again",
        len(answers),
        f"{len(set(sizes))} committed versions seen, each whole",
    )


@SLOW
def test_two_inits(context, tmp_path, models, tally):
    """One of them makes it; the other is told so."""
    for attempt in range(3):
        place = tmp_path / f"new{attempt}"
        running = [
            Running(context, ["init", place, "--model", models["llama"], "--width", width]) for width in (64, 128)
        ]
        ended = [one.end() for one in running]
        assert sorted(one.code for one in ended) == [0, 1], ended
        (loser,) = [one for one in ended if one.code]
        assert "already" in loser.err, loser
        winner = ended.index(next(one for one in ended if not one.code))
        assert rapidin_vdb.open(place).info().width == (64, 128)[winner]
    tally("two inits of one place at once", "of other widths", 3, "one makes it, the other says that it is there")


@SLOW
@pytest.mark.parametrize(
    "others",
    [
        [["index", "{db}"], ["index", "{db}"]],
        [["index", "{db}"], ["delete", "{db}", "--where", "stars = 1"]],
        [["delete", "{db}", "--purge"], ["index", "{db}", "--recipe", "streamed"]],
        [["delete", "{db}", "--purge"], ["delete", "{db}", "--purge", "--where", "stars = 2"]],
        [["delete", "{db}", "--purge"], ["ingest", "{db}", "{more}", "--batch-tokens", "200"]],
        [["verify", "{db}"], ["ingest", "{db}", "{more}", "--batch-tokens", "200"]],
        [["verify", "{db}"], ["delete", "{db}", "--purge", "--where", "stars = 2"]],
        [["query", "{db}", "--generation", "blue 35"], ["delete", "{db}", "--purge", "--where", "stars = 2"]],
    ],
    ids=lambda others: " and ".join(" ".join(word for word in other if word.isalpha()) for other in others),
)
def test_other_pairs(context, tmp_path, database, others, tally):
    more = write_jsonl(tmp_path / "more.jsonl", toy_records(30, first=24))
    database.index("cpu")
    database.delete(where="stars = 4")
    draw = random.Random(0)
    for _ in range(3):
        filled = [[word.format(db=database.path, more=more) for word in words] for words in others]
        both(context, *filled, apart=draw.uniform(0, 0.3))
        check(database.path)
        assert rapidin_vdb.open(database.path).query("Say 5", "blue 35", top_k=1)[0].results
    names = [" ".join([words[0], *(word for word in words if word in ("--purge", "--where"))]) for words in others]
    tally(
        f"`{names[0]}` and `{names[1]}` at once",
        "begun 0 to 0.3 s apart",
        3,
        "both end well, the table is sound, a query answers",
    )


def _hold(path: str, ready) -> None:
    # Kept by name: whoever collects the database lets go of its lock.
    database = rapidin_vdb.open(path)
    database._table.place.lock.__enter__()
    ready.send(True)
    time.sleep(600)


@pytest.mark.parametrize("busy", ["", "indexes/cpu"])
def test_who_waits_says_for_whom(context, database, busy):
    """After a second, and only then: which process holds the lock, and since when it runs."""
    database.index("cpu")
    database.delete(where="stars = 3")
    mine, theirs = context.Pipe()
    lock = Path(database.path, busy, ".lock" if busy else ".commit.lock")
    holder = context.Process(target=_hold_file, args=(str(lock), theirs), daemon=True)
    holder.start()
    mine.recv()
    waiting = Running(
        context, ["index" if busy else "delete", database.path, *([] if busy else ["--where", "stars = 1"])]
    )
    said = Path(waiting._folder.name, "err")
    for _ in range(600):
        if not waiting.process.is_alive() or "waiting for " in said.read_text("utf-8"):
            break
        time.sleep(0.1)
    assert waiting.process.is_alive()
    holder.kill()
    ended = waiting.end()
    what = f"the index cpu in {database.path}/indexes" if busy else f"the database {database.path}"
    told = [line for line in ended.err.splitlines() if line.startswith("waiting for ")]
    assert ended.code == 0 and len(told) == 1, ended
    assert told[0].startswith(f"waiting for {what}, which process {holder.pid} (") and ", running since 2" in told[0]
    assert "waiting" not in Running(context, ["delete", database.path, "--where", "stars = 2"]).end().err


def test_who_holds_a_lock_as_far_as_known(tmp_path):
    lock = FileLock(tmp_path / "lock")
    with lock:
        assert holder_of(tmp_path / "lock") == "this process itself"
    assert holder_of(tmp_path / "lock") == holder_of(tmp_path / "nothing") == "another process"


def _hold_file(path: str, ready) -> None:
    lock = FileLock(path)
    lock.acquire()
    ready.send(True)
    time.sleep(600)


def test_a_dead_holder_never_blocks(context, tmp_path, database, tally):
    """While it lives the others wait; when it is gone they go on."""
    more = write_jsonl(tmp_path / "more.jsonl", toy_records(2, first=24))
    mine, theirs = context.Pipe()
    holder = context.Process(target=_hold, args=(database.path, theirs))
    holder.start()
    mine.recv()
    waiting = threading.Thread(target=database.ingest, args=(more,))
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive() and database.info().samples == 24, "readers do not wait"
    holder.kill()
    waiting.join(60)
    assert not waiting.is_alive() and database.info().samples == 26
    assert holder.exitcode in (None, -signal.SIGKILL) and Path(database.path, ".commit.lock").exists()
    tally(
        "the holder of a database's lock is killed",
        "`kill -9` while another waits",
        1,
        "the other goes on; readers never waited",
    )
