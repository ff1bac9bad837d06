"""Several workers: the same rows as one process, and a worker that dies costs nothing but time."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import toy_records, write_jsonl
from test_whole import content, make

from rapidin_vdb.errors import FingerprintError, GradientError, SpecError


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


def test_two_workers_write_what_one_process_writes(tmp_path, models, adapters):
    lines = write_jsonl(tmp_path / "toy.jsonl", toy_records(40))
    alone, together = (make(tmp_path / name, models, adapters) for name in ("alone", "together"))
    alone.ingest(lines, batch_tokens=900)
    seen = []
    report = together.ingest(lines, batch_tokens=900, workers_per_device=2, progress=lambda *told: seen.append(told))
    assert (report.added, report.unchanged, report.bad) == (40, 0, ())
    assert seen[0] == ("ingest", 0, 40) and seen[-2] == ("ingest", 40, 40)
    # Tokens beside samples, all of which were known before.
    tokens = [(done, total) for stage, done, total in seen if stage == "tokens"]
    assert tokens[-1] == (report.tokens, report.tokens) and {total for _, total in tokens} == {report.tokens}
    assert_alike(together, alone)
    assert together.ingest(lines, workers_per_device=2).unchanged == 40


def test_a_worker_that_is_killed_is_replaced_and_its_batch_done_again(tmp_path, models, adapters, caplog, monkeypatch):
    from rapidin_vdb import compute

    caplog.set_level(logging.WARNING)
    original, killed = compute._Worker.give, []

    def give(worker, batch, attempt):
        original(worker, batch, attempt)
        if len(killed) < 2:
            killed.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)

    monkeypatch.setattr(compute._Worker, "give", give)
    database = make(tmp_path / "db", models, adapters)
    report = database.ingest(
        write_jsonl(tmp_path / "toy.jsonl", toy_records(24)), batch_tokens=900, workers_per_device=2
    )
    assert report.added == database.info().samples == len(content(database)) == 24
    deaths = [record.getMessage() for record in caplog.records if "died" in record.getMessage()]
    assert len(deaths) == len(set(killed)) == 2
    assert all(
        "a worker on cpu died with exit code -9: its" in death and "go back to the queue" in death for death in deaths
    )


def test_a_batch_that_kills_every_worker_is_given_up(tmp_path, models, adapters, monkeypatch):
    from rapidin_vdb import compute

    original = compute._Worker.give

    def give(worker, batch, attempt):
        original(worker, batch, attempt)
        if any(sample.sample_id == "toy-007" for sample in batch):
            os.kill(worker.process.pid, signal.SIGKILL)

    monkeypatch.setattr(compute._Worker, "give", give)
    database = make(tmp_path / "db", models, adapters)
    lines = write_jsonl(tmp_path / "toy.jsonl", toy_records(9))
    with pytest.raises(GradientError, match=r"3 workers died \(the last with exit code -9\) on the 1 samples toy-007"):
        database.ingest(lines, batch_tokens=1, workers_per_device=2)
    assert "toy-007" not in content(database)


def starve(path: str) -> None:
    """In a process of its own: a large batch, with and without a limit of the system's on the memory."""
    import resource

    import rapidin_vdb
    from rapidin_vdb.compute import make_batch
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
        for number in range(480)
    ]
    small = [made.vector for first in range(0, 480, 4) for made in make_batch(engine, batch[first : first + 4], None)]
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("rapidin_vdb").addHandler(handler)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
    starved = [made.vector for made in make_batch(engine, batch, None)]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    near = [
        np.abs(a.astype(float) - b).max() / np.abs(b.astype(float)).max() for a, b in zip(small, starved, strict=True)
    ]
    sys.stdout.write(json.dumps({"told": told, "difference": max(near)}))


def test_a_batch_that_does_not_fit_the_memory_there_is_is_halved(database):
    done = subprocess.run(
        [sys.executable, "-c", f"import test_compute; test_compute.starve({str(database.path)!r})"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["told"][0] == "a batch of 480 samples does not fit the memory: going on with 240"
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
