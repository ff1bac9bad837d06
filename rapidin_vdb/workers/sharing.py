"""Batches shared among worker processes: one that dies is replaced, and its batch done again."""

import logging
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from rapidin_vdb.compute import (
    Batch,
    Compute,
    DeviceError,
    Result,
    Road,
    Waiting,
    WorkerSpec,
    names_of,
    road_without_model,
)
from rapidin_vdb.errors import GradientError, SpecError
from rapidin_vdb.records import Fingerprint
from rapidin_vdb.worker_log import Hearer, Told
from rapidin_vdb.workers.process import Loaded, work
from rapidin_vdb.workers.threads import threads_each

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


def compute_in_workers(specs: Sequence[WorkerSpec]) -> Compute:
    """Return a function that shares batches among worker processes; a finished batch comes first, whoever did it.

    A worker that dies, or whose device fails, is reported and replaced, and its batch goes back to the queue. One whose
    device fails again before it has done a batch is not replaced, as long as there are others.

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
    failed: bool = False
    """Its device has, and no batch was done there since."""
    process: Any = None
    """None as long as there is nothing to do."""
    pipe: Connection = field(init=False)

    def start(self) -> None:
        if self.process is not None:
            return
        self.loaded = False
        # Spawned, not forked: CUDA and OpenMP do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        levels = {name: logging.getLogger(name).level for name in _LOGGERS}
        self.process = context.Process(target=work, args=(theirs, self.spec, levels), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, batch: Batch, attempt: int) -> None:
        self.busy = (batch, attempt)
        try:
            self.pipe.send(batch)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died; its end is seen as such when waited for

    def stop(self) -> None:
        if self.process is None:
            return
        self.pipe.close()
        self.process.join(timeout=0 if self.busy else 5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _share(workers: list[_Worker], batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
    waiting, hearer = Waiting(batches), Hearer()

    def give() -> None:
        # To all that have nothing to do: what comes back in halves is for several. Where a device failed, what came
        # back is for others, so that it is found out whose fault it was.
        sound = any(not worker.failed for worker in workers)
        idle = [worker for worker in workers if worker.busy is None]
        tasks = [(worker, waiting.next(untried=sound and worker.failed)) for worker in idle]
        given = [(worker, task) for worker, task in tasks if task is not None]
        for worker, _ in given:
            worker.start()  # all of them, before one is waited for until it takes its batch
        for worker, task in given:
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
            if isinstance(answer, Loaded):
                worker.loaded = True
                continue
            if isinstance(answer, Told):
                hearer.hear([answer])
                continue
            worker.busy = None
            if isinstance(answer, DeviceError):
                _replace(worker, workers, batch, attempt, answer)
                waiting.back(batch, attempt + 1)
                answer = None
            elif isinstance(answer, BaseException):
                raise answer
            elif answer is not None:
                worker.failed = False
            give()
            if answer is not None:
                yield batch, answer


def _bury(worker: _Worker, batch: Batch, attempt: int) -> bool:
    """Report a dead worker, make way for another, and say whether its batch is likely to have been too large.

    Raises:
        GradientError: others would end as it did.
    """
    worker.process.join()
    code = worker.process.exitcode
    names = names_of(batch)
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
    worker.process = None
    return killed


def _replace(worker: _Worker, workers: list[_Worker], batch: Batch, attempt: int, error: DeviceError) -> None:
    """Report a worker whose device failed; make way for another, or let it go, if another was of no use before.

    Raises:
        GradientError: others would fail as it did, or there is no other.
    """
    worker.stop()
    names = names_of(batch)
    if attempt >= _LIVES:
        raise GradientError(
            f"{attempt} workers died on the {len(batch)} samples {names} (the last: {error}); what was done before is "
            "kept. Run again with smaller --batch-tokens, or without these samples"
        ) from error
    if worker.failed and len(workers) == 1:
        raise GradientError(
            f"{error}, as before, with no batch done in between, and no other worker is left; what was done before is "
            "kept. See to the device, or leave it out of --device, and run it again to go on"
        ) from error
    told = (
        "; it failed before, and the other workers go on without it" if worker.failed else ", another takes its place"
    )
    logger.warning("%s: a worker's %d samples (%s) go back to the queue%s", error, len(batch), names, told)
    if worker.failed:
        workers.remove(worker)
    else:
        worker.failed, worker.process = True, None
