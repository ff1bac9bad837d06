"""Batches shared among worker processes, each with the model, on several devices or on the cores of one machine."""

import logging
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock
from typing import Any

from rapidin_vdb.compute import (
    Batch,
    BatchMaker,
    Compute,
    Result,
    Road,
    Waiting,
    WorkerSpec,
    load_of,
    road_without_model,
    use_threads,
)
from rapidin_vdb.errors import GradientError, RapidInError, SpecError
from rapidin_vdb.records import Fingerprint

logger = logging.getLogger(__name__)

# A batch that has taken so many workers with it is not tried again.
_LIVES = 3
# The root's level is that of other libraries.
_LOGGERS = ("root", "rapidin_vdb")
_GUARD = 'put the calls of a script under `if __name__ == "__main__":`, for each worker runs it from its top'


def road_of_workers(
    fingerprint: Fingerprint,
    *,
    place: str,
    devices: Sequence[str],
    workers: int,
    model: str | None = None,
    adapter: str | None = None,
    token_width: int | None = None,
) -> Road:
    """Return the road through worker processes, dealt out to the devices in turn; no model is loaded in this one.

    Raises:
        ModelError: the model's tokenizer or configuration cannot be loaded.
    """
    specs = [
        WorkerSpec(
            fingerprint=fingerprint,
            place=place,
            model=model,
            adapter=adapter,
            device=devices[number % len(devices)],
            threads=threads_each(workers),
            token_width=token_width,
        )
        for number in range(workers)
    ]
    return road_without_model(specs[0], compute_in_workers(specs))


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPU cores this process may use: those that it is bound to, or its container's share of them."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = map(int, quota.read_text("ascii").split())
    except (OSError, ValueError):
        return bound  # no such group, an older kind, or "max"
    return max(1, min(bound, limit // period))


def threads_each(workers: int) -> int:
    """Return how many CPU threads each of some workers has."""
    return max(1, cores() // workers)


def speedup(workers: int, devices: Sequence[str]) -> int:
    """Return how many times as fast as one of them, alone, some workers can be at the most.

    Each CPU worker has `threads_each`; more of them than cores, and those of one GPU, take turns.
    """
    return min(workers, cores()) if devices[0] == "cpu" else len(devices)


def compute_in_workers(specs: Sequence[WorkerSpec]) -> Compute:
    """Return a function that shares batches among worker processes; a finished batch comes first, whoever did it.

    A worker that dies is reported and replaced, and its batch goes back to the queue.

    Raises:
        SpecError: this process is itself a worker that is only beginning, and may start none.
    """
    # What Python looks at, too, when a process is started; by then a corpus would have been planned here.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SpecError(f"this process is a worker, which starts no workers: {_GUARD}")

    def compute(batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
        workers = [_Worker(spec) for spec in specs]
        try:
            yield from _share(workers, batches)
        finally:
            for worker in workers:
                worker.stop()

    return compute


@dataclass(eq=False)
class _Worker:
    """A worker process, and the batch it is busy with."""

    spec: WorkerSpec
    busy: tuple[Batch, int] | None = None
    loaded: bool = False
    process: Any = field(init=False)
    pipe: Connection = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.loaded = False
        # Spawned, not forked: CUDA and OpenMP do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        levels = {name: logging.getLogger(name).level for name in _LOGGERS}
        self.process = context.Process(target=_work, args=(theirs, self.spec, levels), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, batch: Batch, attempt: int) -> None:
        self.busy = (batch, attempt)
        try:
            self.pipe.send(batch)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died; its end is seen as such when waited for

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(timeout=0 if self.busy else 5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _share(workers: list[_Worker], batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
    waiting, told = Waiting(batches), set[_Told]()

    def give() -> None:
        # To all that have nothing to do: what comes back in halves is for several.
        for worker in workers:
            if worker.busy is None and (task := waiting.next()) is not None:
                worker.give(*task)

    give()
    while busy := [worker for worker in workers if worker.busy is not None]:
        ready = wait([worker.pipe for worker in busy])
        for worker in busy:
            if worker.pipe not in ready:
                continue
            assert worker.busy is not None
            batch, attempt = worker.busy
            try:
                answer = worker.pipe.recv()
            except (EOFError, OSError):
                waiting.back(batch, attempt + 1, too_large=_bury(worker, batch, attempt))
                answer = None
            if isinstance(answer, _Loaded):
                worker.loaded = True
                continue
            if isinstance(answer, _Told):
                if answer not in told:  # each of them finds out the same
                    told.add(answer)
                    logging.getLogger(answer.name).log(answer.level, "%s", answer.message)
                continue
            worker.busy = None
            if isinstance(answer, BaseException):
                raise answer
            give()
            if answer is not None:
                yield batch, answer


def _bury(worker: _Worker, batch: Batch, attempt: int) -> bool:
    """Report a dead worker, start another in its place, and say whether its batch is likely to have been too large.

    Raises:
        GradientError: others would end as it did.
    """
    worker.process.join()
    code = worker.process.exitcode
    names = f"{batch[0].sample_id} to {batch[-1].sample_id}" if len(batch) > 1 else batch[0].sample_id
    if code > 0 and not worker.loaded:
        # An error of Python's before our own code ran, which would have told it: the batch has no part in it.
        raise GradientError(
            f"a worker on {worker.spec.device} ended with exit code {code} before it had the model; what it wrote to "
            f"stderr says why. If nothing else does: {_GUARD}"
        )
    if attempt >= _LIVES:
        smaller = " or smaller --batch-tokens" if worker.loaded else ""
        raise GradientError(
            f"{attempt} workers died (the last with exit code {code}) on the {len(batch)} samples {names}; "
            f"what was done before is kept. Run again with fewer --workers-per-device{smaller}"
        )
    # So ends what takes more memory than the system has, which raises nothing; the batch's or the model's.
    killed = code == -signal.SIGKILL and len(batch) > 1 and worker.loaded
    logger.warning(
        "a worker on %s died with exit code %s: its %d samples (%s) go back to the queue%s, another takes its place",
        worker.spec.device, code, len(batch), names, " in halves" if killed else "",
    )  # fmt: skip
    worker.start()
    return killed


class _Loaded:
    """A worker has its model."""


@dataclass(frozen=True)
class _Told:
    """What a worker has logged."""

    name: str
    level: int
    message: str


class _Line(logging.Handler):
    """A worker's end of its pipe: what it answers, and what it logs, which the parent knows where to put."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe
        self._alone = Lock()  # libraries have threads that log

    def send(self, told: Any) -> None:
        with self._alone:
            self._pipe.send(told)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # the parent is gone
            self.send(_Told(record.name, record.levelno, record.getMessage()))


def _work(pipe: Connection, spec: WorkerSpec, levels: Mapping[str, int]) -> None:
    """Run in a worker: load the model, then answer batches until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    use_threads(spec.threads)
    line = _Line(pipe)
    logging.getLogger().addHandler(line)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    maker = None
    try:
        while True:
            batch = pipe.recv()
            answer: list[Result] | Exception
            try:
                if maker is None:
                    maker = BatchMaker(load_of(spec), token_width=spec.token_width)
                    line.send(_Loaded())
                answer = maker.make(batch)
            except Exception as error:
                answer = _sendable(error)
            line.send(answer)
            if isinstance(answer, Exception):
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is done, or gone


def _sendable(error: Exception) -> Exception:
    """Return an error that the parent can raise: one that is not ours is a bug, and brings where it happened."""
    if isinstance(error, RapidInError):
        return error
    where = "in a worker:\n" + "".join(traceback.format_exception(error))
    try:
        sent: Exception = pickle.loads(pickle.dumps(error))  # noqa: S301 - what has just been written
    except Exception:
        # Not all errors of libraries survive it.
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note(where)
    return sent
