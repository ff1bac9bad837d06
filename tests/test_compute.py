"""Several workers: the same rows as one process, and a worker that dies costs nothing but time."""

import inspect
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import encoded, toy_records, write_jsonl
from test_whole import content, make

import rapidin_vdb
from rapidin_vdb.batches import padded_tokens
from rapidin_vdb.errors import FingerprintError, GradientError, MemoryTakenError, SpecError


def assert_alike(first, second):
    """Bit for bit but for what the number of threads does to sums."""
    one, other = content(first), content(second)
    assert one.keys() == other.keys()
    for name, (_, vector) in one.items():
        a, b = (np.frombuffer(bytes_, np.float16).astype(float) for bytes_ in (vector, other[name][1]))
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("width", "most"), [(64, 24), (1 << 24, 10), (1 << 30, 1)])
def test_a_batch_has_no_more_rapidgrads_than_fit(width, most):
    from rapidin_vdb.batches import planned_batches
    from rapidin_vdb.records import Encoded, Sample

    pairs = [
        (
            Sample(sample_id=str(n), prompt=None, response="", split="s", source=None, content_hash="c"),
            Encoded(sample_id=str(n), input_ids=(1,) * (3 + n % 2), offsets=(), truncated=False),
        )
        for n in range(24)
    ]
    cut = list(planned_batches(pairs, {str(n): "c" for n in range(24)}, 1000, width=width))
    assert max(map(len, cut)) == most and sorted(s.sample_id for b in cut for s, _ in b) == sorted(map(str, range(24)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models, adapters):
    """Some lines, and the database that one process made of them; in batches of a few."""
    folder = tmp_path_factory.mktemp("alone")
    lines = write_jsonl(folder / "toy.jsonl", toy_records(24))
    made = make(folder / "db", models, adapters)
    made.ingest(lines, batch_tokens=900)
    return lines, made


def told_of_the_sketch(caplog) -> list[tuple[str, str]]:
    """What workers find out, all of them, and tell whoever started them."""
    said = [record for record in caplog.records if "kept in the memory of cpu" in record.getMessage()]
    return [(record.name, record.levelname) for record in said]


def test_two_workers_write_what_one_process_writes(tmp_path, models, adapters, alone, caplog, capfd, monkeypatch):
    """And log as one process would, each thing once."""
    (lines, one), seen = alone, []
    together = make(tmp_path / "together", models, adapters)
    caplog.set_level("DEBUG", "rapidin_vdb")
    report = together.ingest(lines, batch_tokens=900, workers_per_device=2, progress=lambda *told: seen.append(told))
    assert (report.added, report.unchanged, report.bad) == (24, 0, ())
    assert seen[:2] == [("records", 24, 0), ("ingest", 0, 24)] and seen[-2] == ("ingest", 24, 24)
    # Tokens beside samples, all of which were known before.
    tokens = [(done, total) for stage, done, total in seen if stage == "tokens"]
    assert tokens[-1] == (report.tokens, report.tokens) and {total for _, total in tokens} == {report.tokens}
    assert_alike(together, one)
    assert told_of_the_sketch(caplog) == [("rapidin_vdb.sketch.sketch", "DEBUG")]
    assert "kept in the memory" not in capfd.readouterr().err

    def start(kind):
        raise AssertionError("a process for nothing")

    monkeypatch.setattr(multiprocessing, "get_context", start)
    assert together.ingest(lines, workers_per_device=2).unchanged == 24


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_is_killed_is_replaced_and_its_batch_done_again(
    tmp_path, models, adapters, alone, caplog, monkeypatch
):
    from rapidin_vdb.workers import sharing

    lines, one = alone
    caplog.set_level("INFO", "rapidin_vdb")
    original, killed = sharing._Worker.give, []

    def give(worker, batch, attempt):
        original(worker, batch, attempt)
        if len(killed) < 2:
            killed.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)

    monkeypatch.setattr(sharing._Worker, "give", give)
    database = make(tmp_path / "db", models, adapters)
    report = database.ingest(lines, batch_tokens=900, workers_per_device=2)
    assert report.added == database.info().samples == len(content(database)) == 24
    assert_alike(database, one)
    deaths = [record.getMessage() for record in caplog.records if "died" in record.getMessage()]
    assert len(deaths) == len(set(killed)) == 2
    assert all(
        "a worker on cpu died with exit code -9: its" in death and "go back to the queue" in death for death in deaths
    )
    assert told_of_the_sketch(caplog) == [], "at this level"


@pytest.mark.usefixtures("forked_workers")
def test_a_batch_that_kills_every_worker_is_given_up(tmp_path, models, adapters, monkeypatch):
    from rapidin_vdb.workers import sharing

    original = sharing._Worker.give

    def give(worker, batch, attempt):
        original(worker, batch, attempt)
        if any(sample.sample_id == "toy-007" for sample in batch):
            os.kill(worker.process.pid, signal.SIGKILL)

    monkeypatch.setattr(sharing._Worker, "give", give)
    database = make(tmp_path / "db", models, adapters)
    lines = write_jsonl(tmp_path / "toy.jsonl", toy_records(9))
    with pytest.raises(GradientError, match=r"3 workers died \(the last with exit code -9\) on the 1 samples toy-007"):
        database.ingest(lines, batch_tokens=1, workers_per_device=2)
    assert "toy-007" not in content(database)


def kill_when(monkeypatch, loaded, deadly) -> list[int]:
    """Kill workers that are at such a batch, before or when they have their model; return the batches' sizes."""
    from rapidin_vdb.workers import sharing

    given, original = [], sharing._Worker.give

    def kill(worker):
        if worker.busy and deadly(worker.busy[0]):
            os.kill(worker.process.pid, signal.SIGKILL)

    def give(worker, batch, attempt):
        original(worker, batch, attempt)
        given.append(len(batch))
        if not loaded:
            kill(worker)

    def note(worker, value):
        vars(worker)["loaded"] = value
        if loaded and value:
            kill(worker)

    monkeypatch.setattr(sharing._Worker, "give", give)
    monkeypatch.setattr(sharing._Worker, "loaded", property(lambda worker: vars(worker)["loaded"], note))
    return given


def sixteens(count: int) -> list[list]:
    """Batches of 16 samples, all as large."""
    return [[encoded(16 * number + place) for place in range(16)] for number in range(count)]


@pytest.mark.usefixtures("forked_workers")
def test_what_the_system_kills_for_its_memory_is_tried_again_in_halves(database, caplog, monkeypatch):
    from rapidin_vdb.compute import BatchMaker
    from rapidin_vdb.workers import compute_in_workers

    caplog.set_level(logging.WARNING)
    given = kill_when(monkeypatch, True, lambda batch: len(batch) > 8)
    done = [
        (sample, made)
        for batch, results in compute_in_workers(worker_at(database))(iter(sixteens(2)))
        for sample, made in zip(batch, results, strict=True)
    ]
    assert given == [16, 8, 8, 8, 8], "what comes later is not tried as it is"
    assert caplog.messages[0].endswith("go back to the queue in halves, another takes its place")
    whole = [sample for batch in sixteens(2) for sample in batch]
    assert [sample for sample, _ in done] == whole
    for (_, one), other in zip(done, BatchMaker(database._loaded()).make(whole), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        np.testing.assert_allclose(one.vector.astype(float), other.vector.astype(float), rtol=2e-3, atol=1e-5)


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_is_killed_while_it_loads_says_nothing_of_its_batch(database, caplog, monkeypatch):
    from rapidin_vdb.workers import compute_in_workers

    caplog.set_level(logging.WARNING)
    killed = []
    given = kill_when(monkeypatch, False, lambda batch: len(killed) < 2 and not killed.append(batch))
    batches = sixteens(2)
    assert [batch for batch, _ in compute_in_workers(worker_at(database))(iter(batches))] == batches
    assert len(killed) == 2 and given == [16, 16, 16, 16]
    assert "in halves" not in caplog.text and "go back to the queue, another takes its place" in caplog.text


SAMPLES = 192


def starve(path: str, result: str) -> None:
    """In a process of its own: a large batch, with and without a limit of the system's on the memory."""
    import resource

    import rapidin_vdb
    from rapidin_vdb.compute import BatchMaker
    from rapidin_vdb.records import Encoded

    engine = rapidin_vdb.open(path)._loaded()
    draw = np.random.default_rng(0)
    batch = [
        Encoded(
            sample_id=str(number),
            input_ids=(1, *draw.integers(40, 80, 200 + number % 7).tolist(), 2),
            offsets=((0, 1),) * 90,
            truncated=False,
        )
        for number in range(SAMPLES)
    ]
    small = [
        made.vector for first in range(0, SAMPLES, 4) for made in BatchMaker(engine).make(batch[first : first + 4])
    ]
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("rapidin_vdb").addHandler(handler)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), resource.RLIM_INFINITY))
    starved = [made.vector for made in BatchMaker(engine).make(batch)]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    near = [
        np.abs(a.astype(float) - b).max() / np.abs(b.astype(float)).max() for a, b in zip(small, starved, strict=True)
    ]
    Path(result).write_text(json.dumps({"told": told, "difference": max(near)}))


def test_a_batch_that_does_not_fit_the_memory_there_is_is_halved(database, context, tmp_path):
    starving = context.Process(target=starve, args=(database.path, str(tmp_path / "result.json")))
    starving.start()
    starving.join()
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["told"][0] == f"a batch of {SAMPLES} samples does not fit the memory: going on with {SAMPLES // 2}"
    assert found["difference"] < 2e-3


@pytest.mark.parametrize(
    ("said", "smaller"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
            True,
        ),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`", False),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", False),
    ],
)
def test_which_plain_errors_mean_that_a_smaller_batch_might_pass(said, smaller):
    from rapidin_vdb.gradient.memory import is_out_of_memory

    assert is_out_of_memory(RuntimeError(said)) == smaller
    assert not is_out_of_memory(ValueError(said)), "an error of ours that quotes it, say"


def test_what_did_not_fit_is_let_go_of_before_memory_is_given_back(monkeypatch):
    from rapidin_vdb.gradient import memory

    class Large:
        pass

    there, given_back = [], []

    def work(kind):
        large = Large()
        there.append(weakref.ref(large))
        raise kind

    monkeypatch.setattr(memory, "release_memory", lambda: given_back.append(there[-1]()))
    assert memory.if_it_fits(partial(work, MemoryError)) is None and given_back == [None]
    with pytest.raises(RuntimeError):
        memory.if_it_fits(partial(work, RuntimeError))
    assert memory.if_it_fits(lambda: []) == [] and given_back == [None]


@pytest.fixture
def narrow(database, monkeypatch):
    """An engine whose memory has room for 50 tokens, of which it tells how many samples it was given at a time."""
    engine, sizes = database._loaded(), []
    original = engine.make

    def limited(batch, *, token_width=None):
        sizes.append(len(batch))
        if padded_tokens(batch) > 50 and not engine.maker._gradients.checkpointing:
            raise MemoryError
        return original(batch, token_width=token_width)

    monkeypatch.setattr(engine, "make", limited)
    return engine, sizes, original


def batches_of(*sizes: int) -> list[list]:
    """Samples of 11 tokens, each another."""
    return [[encoded(4 * (100 * number + place)) for place in range(size)] for number, size in enumerate(sizes)]


def test_what_did_not_fit_is_not_tried_again(narrow, caplog):
    from rapidin_vdb.compute import BatchMaker

    engine, sizes, original = narrow
    maker, batches = BatchMaker(engine), batches_of(8, 8, 9, 4, 6, 7)
    made = [maker.make(batch) for batch in batches]
    assert sizes == [8, 4, 4, 4, 4, 4, 5, 2, 3, 4, 3, 3, 3, 4]
    assert caplog.messages == [
        "a batch of 8 samples does not fit the memory: going on with 4",
        "a batch of 5 samples does not fit the memory: going on with 2",
    ]
    for parts, wanted in ((made[0], batches[0]), (made[1], batches[1])):
        for one, other in zip(parts, original(wanted[:4]) + original(wanted[4:]), strict=True):
            assert np.array_equal(one.vector, other.vector) and one.loss == other.loss, "bit for bit"
    caplog.clear()
    sizes.clear()
    maker.make([encoded(0, length=60)])
    maker.make(batches[0])
    assert sizes == [1, 1, 8], "with gradient checkpointing there is more room"
    assert caplog.messages == ["one sample does not fit the memory: going on with gradient checkpointing"]


def test_a_sample_that_fits_no_memory_is_named(narrow, database, tmp_path):
    """It ends an ingest, or is passed over, as any other that has no gradient."""
    from rapidin_vdb.compute import BatchMaker
    from rapidin_vdb.engine import Made

    engine, _, _ = narrow
    engine.maker.save_memory()
    made = BatchMaker(engine)

    def full(batch, *, token_width=None):
        raise MemoryError

    engine.make = full
    (result,) = made.make([encoded(0)])
    assert isinstance(result, GradientError) and "does not fit the memory, even alone and with grad" in str(result)
    path = write_jsonl(tmp_path / "more.jsonl", toy_records(2, first=30))
    with pytest.raises(GradientError, match="line 2: it does not fit the memory"):
        database.ingest(path)
    assert len(database.ingest(path, on_bad_record="skip").bad) == 2 and database.count() == 24
    # No longer than what was made before: it is the memory that has changed, and no sample is passed over for that.
    engine.make = lambda batch, **options: [Made(np.zeros(64, np.float16), 0.0) for _ in batch]
    made.make([encoded(0, length=30)])
    engine.make = full
    with pytest.raises(
        GradientError, match="does not fit the memory, where longer ones did before: something else takes"
    ):
        made.make([encoded(0, length=30)])
    assert isinstance(made.make([encoded(0, length=31)])[0], GradientError)


def test_what_stands_behind_a_focus_was_never_computed(database, monkeypatch):
    """So that a longer query is not told that something else takes the memory up, which it waits for in vain."""
    from rapidin_vdb.gradient import rapidgrad

    def lacking(*arguments, **options):
        raise RuntimeError("CUDA error: out of memory")

    database.query("Say 5", "blue and a good deal more behind it", focus="blue")
    monkeypatch.setattr(rapidgrad.RapidGradMaker, "make", lacking)
    with pytest.raises(GradientError, match="query query does not fit the memory, even with gradient") as told:
        database.query("Say 5", "blue and a good deal")
    assert not isinstance(told.value, MemoryTakenError)
    with pytest.raises(MemoryTakenError, match="where one that is no shorter did before"):
        database.query("Say 5", "blue and a good deal", focus="blue")


@pytest.mark.parametrize("lacking", ["forward", "always"])
def test_a_query_that_does_not_fit_the_memory_goes_on_with_checkpointing(database, monkeypatch, caplog, lacking):
    """Its sketch, its full gradient, and those of the samples found; or it is said that nothing helps."""
    from rapidin_vdb.gradient import influence, rapidgrad

    asked = {"prompt": "Say 5", "generation": "blue 35", "top_k": 3, "refine": 3, "tokens": True}
    (wanted,) = database.query(**asked)
    maker, tried = database._loaded().maker, []

    def limited(original):
        def work(*arguments, **options):
            tried.append(maker.checkpointing)
            if lacking == "always" or not maker.checkpointing:
                raise RuntimeError("CUDA error: out of memory")
            return original(*arguments, **options)

        return work

    monkeypatch.setattr(influence, "stream_gradient", limited(influence.stream_gradient))
    monkeypatch.setattr(rapidgrad.RapidGradMaker, "make", limited(rapidgrad.RapidGradMaker.make))
    monkeypatch.setattr(rapidgrad.RapidGradMaker, "stream", limited(rapidgrad.RapidGradMaker.stream))
    if lacking == "always":
        # It did fit, a moment ago.
        with pytest.raises(MemoryTakenError, match="query query does not fit the memory, where one that is no shorter"):
            database.query(**asked)
        assert not maker.checkpointing, "which was of no use"
        longer = asked | {"generation": "blue 355"}
        with pytest.raises(
            GradientError, match="query query does not fit the memory, even with gradient checkpointing"
        ) as told:
            database.query(**longer)
        assert not isinstance(told.value, MemoryTakenError) and not maker.checkpointing
        return
    (found,) = database.query(**asked)
    assert (
        tried[:2] == [False, True]
        and caplog.messages.count("query query does not fit the memory: going on with gradient checkpointing") == 1
    )
    for one, other in zip(found.results, wanted.results, strict=True):
        assert one.sample_id == other.sample_id and one.exact_score == pytest.approx(other.exact_score, rel=1e-4)
    assert maker.checkpointing
    monkeypatch.setattr(maker._gradients, "checkpointing", False)
    direction = database._loaded().influence.direction(encoded(0))
    assert maker.checkpointing and np.isfinite(direction.norms).all()
    monkeypatch.setattr(maker._gradients, "checkpointing", False)
    database._loaded().influence.exact(direction, [encoded(1), encoded(2)])
    assert maker.checkpointing


@pytest.mark.parametrize("twice", [False, True])
def test_token_scores_that_do_not_fit_the_memory_are_told(database, monkeypatch, twice):
    from rapidin_vdb.gradient import influence

    def full(*arguments, **options):
        raise RuntimeError("CUDA error: out of memory")

    exact = database._loaded().influence
    monkeypatch.setattr(exact, "_twice", twice)
    monkeypatch.setattr(*((influence, "token_scores_twice") if twice else (exact._tangents, "token_scores")), full)
    with pytest.raises(
        GradientError, match="sample toy-0.*: the scores of its tokens do not fit the memory; leave tokens"
    ):
        database.query("Say 5", "blue 35", top_k=3, tokens=True)

    def broken(*arguments, **options):
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr(*((influence, "token_scores_twice") if twice else (exact._tangents, "token_scores")), broken)
    with pytest.raises(RuntimeError, match="mat1"):
        database.query("Say 5", "blue 35", top_k=3, tokens=True)


def test_a_model_is_loaded_where_it_is_asked_for(database, monkeypatch, tmp_path):
    """Once; and elsewhere, where another device is named."""
    from rapidin_vdb import roads
    from rapidin_vdb import speaker as module
    from rapidin_vdb.question import Question

    database.load(device="cpu")
    here = database._engine
    loads = []
    monkeypatch.setattr(type(database), "load", lambda self, **options: loads.append(options))
    question = Question()
    for device in ("auto", "cpu"):
        database.prepare(question, device=device)
        database.ingest(write_jsonl(tmp_path / "none.jsonl", []), device=device, batch_tokens=99)
    assert loads == [] and database._engine is here
    monkeypatch.setattr(module, "resolve_device", lambda device: {"cuda": "cuda:0"}.get(device, device))
    monkeypatch.setattr(roads, "resolve_devices", lambda device: ["cuda:0"])  # what auto means here, too
    database.prepare(question)
    database.ingest(tmp_path / "none.jsonl", batch_tokens=99)
    assert loads == [], "it was loaded on the CPU"
    database.prepare(question, device="cuda")
    database.ingest(tmp_path / "none.jsonl", device="cuda", batch_tokens=99)
    assert [load["device"] for load in loads] == ["cuda", "cuda:0"]
    places = here.loaded.spec.model, here.loaded.spec.adapter
    assert [(load["model"], load["adapter"]) for load in loads] == [places] * 2, "where they were found"


def test_a_worker_remembers_what_did_not_fit(narrow, database, monkeypatch, request):
    from rapidin_vdb.compute import WorkerSpec
    from rapidin_vdb.workers import process

    engine, sizes, _ = narrow
    ours = logging.getLogger("rapidin_vdb")  # whose level a worker sets in its own process
    request.addfinalizer(partial(ours.setLevel, ours.level))
    monkeypatch.setattr(process, "load_of", lambda spec: engine)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(signal, "signal", lambda *event: None)
    mine, theirs = multiprocessing.Pipe()
    answers = []

    def parent():
        with mine:  # the worker ends with it
            for batch in batches_of(8, 8, 8):
                mine.send(batch)
                while not isinstance(answer := mine.recv(), list):
                    answers.append(getattr(answer, "message", type(answer)))
                answers.append(len(answer))

    thread = threading.Thread(target=parent)
    thread.start()
    spec = WorkerSpec(fingerprint=database.fingerprint, place="", model=None, adapter=None, device="cpu", threads=1)
    process.work(theirs, spec, {"rapidin_vdb": logging.WARNING})
    thread.join()
    assert sizes == [8, 4, 4, 4, 4, 4, 4]
    assert answers == [process.Loaded, "a batch of 8 samples does not fit the memory: going on with 4", 8, 8, 8]


def worker_at(database) -> list:
    from rapidin_vdb.compute import WorkerSpec

    return [WorkerSpec(fingerprint=database.fingerprint, place="", model=None, adapter=None, device="cpu", threads=1)]


@pytest.mark.usefixtures("forked_workers")
def test_a_bug_in_a_worker_is_raised_as_it_is_and_says_where_it_was(database):
    from rapidin_vdb.records import Encoded
    from rapidin_vdb.workers import compute_in_workers

    # The child checks no types.
    broken = object.__new__(Encoded)
    broken.__dict__.update(sample_id="s", input_ids=[None], offsets=(), truncated=False, focus=None)
    with pytest.raises(TypeError, match="None") as raised:
        list(compute_in_workers(worker_at(database))(iter([[broken]])))
    (note,) = raised.value.__notes__
    assert note.startswith("in a worker:\nTraceback") and "rapidgrad.py" in note


class StubbornError(Exception):
    """Can be pickled, and not be made again."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def test_an_error_that_cannot_be_sent_is_told():
    from rapidin_vdb.workers.process import _sendable

    class LocalError(ValueError):
        """Cannot be pickled."""

    for error, words in ((StubbornError(1, 2), "StubbornError: 1 and 2"), (LocalError("x"), "LocalError: x")):
        sent = _sendable(error, error)
        assert type(sent) is RuntimeError and str(sent) == words and "in a worker:\n" in sent.__notes__[0]
    ours = GradientError("sample x: no")
    assert _sendable(ours, ours) is ours and not hasattr(ours, "__notes__")


def test_each_worker_has_its_share_of_these_cores(monkeypatch, database):
    from rapidin_vdb import workers
    from rapidin_vdb.workers import sharing, threads

    specs = []
    monkeypatch.setattr(threads, "cores", lambda: 7)
    monkeypatch.setattr(sharing, "compute_in_workers", lambda these: specs.extend(these) or iter)
    for count, each in ((2, 3), (7, 1), (9, 1)):
        specs.clear()
        workers.road_of_workers(database.fingerprint, place="", devices=["cpu"], workers=count)
        assert [spec.threads for spec in specs] == count * [each]


@pytest.mark.usefixtures("forked_workers")
def test_errors_of_workers_reach_the_caller(tmp_path, models, adapters, database):
    from conftest import save_model

    other = save_model(tmp_path / "other", "llama", seed=5)
    with pytest.raises(FingerprintError, match="model_hash is"):
        database.ingest(
            write_jsonl(tmp_path / "a.jsonl", toy_records(3, first=90)), model=str(other), workers_per_device=2
        )
    assert database.info().samples == 24


def test_a_dry_run_counts_and_times_and_writes_nothing(database, tmp_path, capsys):
    before = database.info()
    records = [*toy_records(30, first=20), {"id": "bad", "text": ""}]
    lines = write_jsonl(tmp_path / "more.jsonl", records)
    expected = database.ingest(lines, batch_tokens=900, on_bad_record="skip", dry_run=True)
    assert database.info() == before
    report = database.ingest(lines, batch_tokens=900, on_bad_record="skip")
    assert (
        (expected.samples, expected.tokens, len(expected.bad))
        == (report.added, report.tokens, 1)
        == (26, report.tokens, 1)
    )
    assert expected.batches > 5
    grown = sum(path.stat().st_size for path in (tmp_path / "db" / "samples.lance" / "data").iterdir())
    assert 0.3 * grown * 26 / 50 < expected.bytes < 3 * grown * 26 / 50
    # A worker's guess is as good as the machine is quiet; that it is about this work is all that can be asked.
    assert 0.05 * report.seconds < expected.seconds < 20 * report.seconds
    assert expected.peak_memory > 100e6
    assert database.ingest(lines, on_bad_record="skip", dry_run=True).seconds == 0.0, "nothing left to do"


def test_a_dry_run_promises_no_more_than_cores_and_gpus_can_do(database, tmp_path, monkeypatch):
    """By a clock that goes as fast as one processor would be, for each thread."""
    from rapidin_vdb import estimate, roads
    from rapidin_vdb.workers import threads

    now, engine, at = [0.0], database._loaded(), SimpleNamespace(devices=["cpu"])

    def make(batch, *, token_width=None):
        now[0] += padded_tokens(batch) / (torch.get_num_threads() if at.devices == ["cpu"] else 1)
        return []

    monkeypatch.setattr(engine, "make", make)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(estimate, "peak_bytes", lambda device: 1)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(roads, "resolve_devices", lambda device: at.devices)
    lines = write_jsonl(tmp_path / "more.jsonl", toy_records(30, first=50))

    def seconds(each: int) -> float:
        return database.ingest(lines, batch_tokens=900, workers_per_device=each, dry_run=True).seconds

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = seconds(1)
        assert alone > 0 and [seconds(each) for each in (2, 4)] == pytest.approx([alone, alone])
        assert torch.get_num_threads() == 2, "left as they were"
    finally:
        torch.set_num_threads(before)
    at.devices = ["cuda:0"]
    assert [seconds(each) for each in (1, 3)] == pytest.approx([2 * alone, 2 * alone])
    at.devices = ["cuda:0", "cuda:1"]
    assert seconds(2) == pytest.approx(alone)


def of_length(number: int) -> dict:
    """A record whose sample has so many tokens: one for each byte of its answer, 143 for what stands around it."""
    return {"id": f"long-{number}", "instruction": "x", "output": "y" * (number - 143)}


def test_a_dry_run_times_the_lightest_batch_and_the_heaviest(database, tmp_path, monkeypatch):
    """By what there is to do, not by how many samples share it."""
    engine, seen = database._loaded(), []
    make = engine.make
    monkeypatch.setattr(
        engine, "make", lambda batch, **more: (seen.append(padded_tokens(batch)), make(batch, **more))[1]
    )
    records = [*map(of_length, (300, 400, 450, 500)), *toy_records(14, first=100)]
    lines = write_jsonl(tmp_path / "more.jsonl", records)
    expected = database.ingest(lines, batch_tokens=399, dry_run=True)
    timed = list(seen)
    seen.clear()
    database.ingest(lines, batch_tokens=399)
    assert len(seen) == expected.batches == 11 and len(set(seen)) > 5 and sorted(seen)[-3:] == [400, 450, 500]
    assert {min(seen), max(seen)} <= set(timed)


def test_a_dry_run_times_no_self_check(database, tmp_path, monkeypatch):
    """Whatever comes first: of a batch of equal lengths, or of one sample, less is checked than of others."""
    from rapidin_vdb import estimate
    from rapidin_vdb.gradient import rapidgrad
    from rapidin_vdb.gradient.probe import kind_of

    events, check = [], rapidgrad.check
    clock = SimpleNamespace(monotonic=lambda: events.append("clock") or float(len(events)))
    monkeypatch.setattr(estimate, "time", clock)
    monkeypatch.setattr(
        rapidgrad, "check", lambda maker, batch: (events.append(kind_of(batch)), check(maker, batch))[1]
    )
    fresh = rapidin_vdb.open(database.path)
    equal = [of_length(200) | {"id": f"equal-{number}"} for number in range(4)]
    lines = write_jsonl(tmp_path / "more.jsonl", [*equal, *map(of_length, range(201, 213)), of_length(500)])
    assert fresh.ingest(lines, batch_tokens=850, dry_run=True).batches == 5
    assert events == [3, "clock", "clock"]


SCRIPT = """
import rapidin_vdb
database = rapidin_vdb.open({path!r})
database.ingest({lines!r}, batch_tokens=900, workers_per_device=2)
"""


def test_a_script_without_a_guard_is_told_so_at_once(tmp_path, models, adapters):
    """Each of its workers runs it from the top, and would start workers, too; behind a guard, as pytest is, none does."""
    database = make(tmp_path / "db", models, adapters)
    lines = write_jsonl(tmp_path / "toy.jsonl", toy_records(12))
    script = tmp_path / "script.py"
    here = os.environ | {"PYTHONPATH": str(Path(rapidin_vdb.__file__).parents[1])}
    script.write_text(SCRIPT.format(path=database.path, lines=str(lines)), "utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=here)
    assert done.returncode == 1
    guard = 'put the calls of a script under `if __name__ == "__main__":`'
    assert "SpecError: this process is a worker, which starts no workers: " + guard in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "GradientError: a worker on cpu ended with exit code 1 before it had the model; what it wrote" in last
    assert guard in last and "--batch-tokens" not in done.stderr and "another takes its place" not in done.stderr
    assert "bootstrapping" not in done.stderr and rapidin_vdb.open(database.path).count() == 0


@pytest.mark.parametrize("loaded", [False, True])
def test_advice_about_batches_is_for_workers_that_had_one(database, loaded):
    from rapidin_vdb.workers.sharing import _bury

    class Dead:
        exitcode = -signal.SIGKILL

        def join(self):
            pass

    worker = SimpleNamespace(process=Dead(), loaded=loaded, spec=SimpleNamespace(device="cpu"), start=lambda: None)
    with pytest.raises(GradientError, match="3 workers died") as raised:
        inspect.unwrap(_bury)(worker, [encoded(1)], 3)
    assert ("smaller --batch-tokens" in str(raised.value)) is loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers_per_device": 0}, "--workers-per-device is 0; wanted 1 or more"),
        ({"batch_tokens": 0}, "--batch-tokens is 0"),
        ({"device": "cpu,cuda:7"}, "--device cuda:7: this machine has"),
    ],
)
def test_devices_and_workers_that_make_no_sense(database, tmp_path, options, message):
    with pytest.raises(SpecError, match=message):
        database.ingest(tmp_path / "toy.jsonl", **options)
