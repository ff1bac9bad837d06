"""Batches of samples become RapidGrads: in this process, or in workers on several devices."""

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from rapidin_vdb.corpus import Template, load_template
from rapidin_vdb.engine import Engine, Made, load_engine
from rapidin_vdb.errors import GradientError, RapidInError
from rapidin_vdb.gradient import load_config, load_tokenizer
from rapidin_vdb.gradient.memory import is_out_of_memory, release_memory
from rapidin_vdb.records import Encoded, Fingerprint

logger = logging.getLogger(__name__)

Batch = list[Encoded]
Result = Made | GradientError
"""What a sample was turned into, or why it could not be."""
Compute = Callable[[Iterator[Batch]], Iterator[tuple[Batch, list[Result]]]]

# A batch that has taken so many workers with it is not tried again.
_LIVES = 3
# RapidGrads of single tokens that are made, and sent, at once.
_TOKEN_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Road:
    """All that it takes to turn records into RapidGrads."""

    compute: Compute
    """Batches to results."""
    tokenizer: Any
    """Texts to tokens."""
    template: Template
    """Prompts to texts."""
    config: Any
    """The model's configuration."""


def road_here(engine: Engine, *, token_width: int | None = None) -> Road:
    """Return the road through a model in this process; with `token_width`, single tokens get RapidGrads too."""
    return Road(
        compute=compute_here(engine, token_width=token_width),
        tokenizer=engine.loaded.tokenizer,
        template=engine.template,
        config=engine.loaded.model.config,
    )


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
            threads=max(1, (os.cpu_count() or 1) // workers),
            token_width=token_width,
        )
        for number in range(workers)
    ]
    return road_without_model(specs[0], compute_in_workers(specs))


def road_without_model(spec: "WorkerSpec", compute: Compute) -> Road:
    """Return a road of which only the tokenizer, template and configuration are in this process.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    name, stored = spec.model or spec.fingerprint.model, spec.fingerprint
    tokenizer = load_tokenizer(name)
    return Road(
        compute=compute,
        tokenizer=tokenizer,
        template=load_template(stored.template, tokenizer=tokenizer, text=stored.template_text),
        config=load_config(name),
    )


def compute_here(engine: Engine, *, token_width: int | None = None) -> Compute:
    """Return a function that computes batches in this process, one after the other."""

    def compute(batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
        for batch in batches:
            yield batch, make_batch(engine, batch, token_width)

    return compute


def make_batch(engine: Engine, batch: Batch, token_width: int | None) -> list[Result]:
    """Compute a batch, in halves where it does not fit the memory."""
    size = 2 * (token_width or 0) * sum(sample.response_tokens for sample in batch)
    if size > _TOKEN_BYTES and len(batch) > 1:
        # Short samples make large batches, and their tokens as many RapidGrads again.
        half = len(batch) // 2
        return make_batch(engine, batch[:half], token_width) + make_batch(engine, batch[half:], token_width)
    try:
        return engine.make(batch, token_width=token_width)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1 and not engine.maker.save_memory():
            raise
    # Out here, where the error no longer holds what did not fit.
    release_memory()
    if len(batch) == 1:
        logger.warning("one sample does not fit the memory: going on with gradient checkpointing")
        return make_batch(engine, batch, token_width)
    half = len(batch) // 2
    logger.warning("a batch of %d samples does not fit the memory: going on with %d", len(batch), half)
    return make_batch(engine, batch[:half], token_width) + make_batch(engine, batch[half:], token_width)


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to load the model for itself."""

    fingerprint: Fingerprint
    """The database's; checked by each worker."""
    place: str
    """The database, for messages."""
    model: str | None
    """Where the model is, if it has moved."""
    adapter: str | None
    """Where the adapter is, if it has moved."""
    device: str
    """Where to compute."""
    threads: int
    """CPU threads."""
    token_width: int | None = None
    """Width of single tokens' RapidGrads; None where none are asked for."""


def use_threads(count: int) -> None:
    """Let this process compute with so many CPU threads."""
    import torch

    torch.set_num_threads(count)


def load_of(spec: WorkerSpec) -> Engine:
    """Load the model in a worker, and check its fingerprint."""
    return load_engine(spec.fingerprint, place=spec.place, model=spec.model, adapter=spec.adapter, device=spec.device)


def compute_in_workers(specs: Sequence[WorkerSpec]) -> Compute:
    """Return a function that shares batches among worker processes; a finished batch comes first, whoever did it.

    A worker that dies is reported and replaced, and its batch goes back to the queue.
    """

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
    process: Any = field(init=False)
    pipe: Connection = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        # Spawned, not forked: CUDA and OpenMP do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.spec), daemon=True)
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
    waiting: deque[tuple[Batch, int]] = deque()

    def next_batch() -> tuple[Batch, int] | None:
        if waiting:
            return waiting.popleft()
        batch = next(batches, None)
        return None if batch is None else (batch, 1)

    for worker in workers:
        if (task := next_batch()) is not None:
            worker.give(*task)
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
                waiting.append(_bury(worker, batch, attempt))
                answer = None
            worker.busy = None
            if isinstance(answer, BaseException):
                raise answer
            if (task := next_batch()) is not None:
                worker.give(*task)
            if answer is not None:
                yield batch, answer


def _bury(worker: _Worker, batch: Batch, attempt: int) -> tuple[Batch, int]:
    """Report a dead worker, start another in its place, and return its batch for the queue."""
    worker.process.join()
    code = worker.process.exitcode
    names = f"{batch[0].sample_id} to {batch[-1].sample_id}" if len(batch) > 1 else batch[0].sample_id
    if attempt >= _LIVES:
        raise GradientError(
            f"{attempt} workers died (the last with exit code {code}) on the {len(batch)} samples {names}; "
            "what was done before is kept. Run again with fewer --workers-per-device or smaller --batch-tokens"
        )
    logger.warning(
        "a worker on %s died with exit code %s: its %d samples (%s) go back to the queue, and another takes its place",
        worker.spec.device, code, len(batch), names,
    )  # fmt: skip
    worker.start()
    return batch, attempt + 1


def _work(pipe: Connection, spec: WorkerSpec) -> None:
    """Run in a worker: load the model, then answer batches until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    use_threads(spec.threads)
    engine = None
    try:
        while True:
            batch = pipe.recv()
            try:
                if engine is None:
                    engine = load_of(spec)
                pipe.send(make_batch(engine, batch, spec.token_width))
            except (RapidInError, RuntimeError, MemoryError) as error:
                pipe.send(error)
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is done, or gone
