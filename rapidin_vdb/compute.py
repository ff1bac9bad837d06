"""Batches of samples become RapidGrads with one model, in parts where they do not fit the memory."""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from rapidin_vdb.batches import padded_tokens
from rapidin_vdb.corpus import Template, load_template
from rapidin_vdb.engine import Engine, Made, load_engine
from rapidin_vdb.errors import GradientError, MemoryTakenError, SpecError
from rapidin_vdb.gradient import load_config, load_tokenizer, resolve_devices
from rapidin_vdb.gradient.device import device_failure
from rapidin_vdb.gradient.memory import if_it_fits
from rapidin_vdb.records import Encoded, Fingerprint

logger = logging.getLogger(__name__)

Batch = list[Encoded]
Result = Made | GradientError
"""What a sample was turned into, or why it could not be."""
Compute = Callable[[Iterator[Batch]], Iterator[tuple[Batch, list[Result]]]]

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


def road_here(engine: Engine, *, token_width: int | None = None, threads: int | None = None) -> Road:
    """Return the road through a model in this process; with `token_width`, single tokens get RapidGrads too.

    It has so many CPU threads; by default, as many as this process has.
    """
    return Road(
        compute=compute_here(engine, token_width=token_width, threads=threads),
        tokenizer=engine.loaded.tokenizer,
        template=engine.template,
        config=engine.loaded.model.config,
    )


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


def compute_here(engine: Engine, *, token_width: int | None = None, threads: int | None = None) -> Compute:
    """Return a function that computes batches in this process, one after the other; with so many threads, if given."""
    maker = BatchMaker(engine, token_width=token_width)

    def compute(batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
        for batch in batches:
            with _threads(threads) if threads is not None else nullcontext():
                made = maker.make(batch)
            yield batch, made

    return compute


class Room:
    """How large a batch was that did not fit the memory: such batches, and larger ones, are not tried again."""

    def __init__(self) -> None:
        """Begin with room for any batch."""
        self._too_large: int | None = None

    def has(self, batch: Batch) -> bool:
        """Say whether a batch may fit, as far as is known."""
        return self._too_large is None or padded_tokens(batch) < self._too_large

    def lacked(self, batch: Batch) -> None:
        """Note a batch that did not fit."""
        self._too_large = min(padded_tokens(batch), self._too_large or sys.maxsize)


class Waiting:
    """Batches for workers: first those that came back, in halves where they are known not to fit the memory."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        """Begin with those that are to come."""
        self._batches = batches
        self._again: deque[tuple[Batch, int]] = deque()
        self._room = Room()

    def next(self, *, untried: bool = False) -> tuple[Batch, int] | None:
        """Return the next batch, with the number of the attempt at it; None where there is none just now.

        With `untried`, what came back is left to others.
        """
        if untried or not self._again:
            fresh = next(self._batches, None)
            if fresh is None:
                return None
            self._again.appendleft((fresh, 1))
        batch, attempt = self._again.popleft()
        while len(batch) > 1 and not self._room.has(batch):
            (batch, rest), attempt = halves(batch), 1  # nobody has died of a half as yet
            self._again.appendleft((rest, attempt))
        return batch, attempt

    def back(self, batch: Batch, attempt: int, *, too_large: bool = False) -> None:
        """Take a batch that is to be tried once more; with `too_large`, batches that are no smaller come in halves."""
        if too_large:
            self._room.lacked(batch)
        self._again.append((batch, attempt))


class BatchMaker:
    """Makes batches with one engine, in halves where they do not fit the memory, and remembers how large those were."""

    def __init__(self, engine: Engine, *, token_width: int | None = None) -> None:
        """With `token_width`, single tokens get RapidGrads too."""
        self._engine = engine
        self._token_width = token_width
        self._room = Room()
        self._fitted = 0  # tokens of the longest sample that was made

    def make(self, batch: Batch) -> list[Result]:
        """Return what each sample of a batch is turned into, or why it cannot be.

        Raises:
            MemoryTakenError: a sample does not fit the memory that is no longer than others before it.
        """
        # Short samples make large batches, and their tokens as many RapidGrads again.
        size = 2 * (self._token_width or 0) * sum(sample.response_tokens for sample in batch)
        if len(batch) > 1 and (size > _TOKEN_BYTES or not self._room.has(batch)):
            return self._make_halves(batch)
        longest = max(len(sample.input_ids) for sample in batch)
        made = if_it_fits(partial(self._engine.make, batch, token_width=self._token_width))
        if made is not None:
            self._fitted = max(self._fitted, longest)
            return made
        saved = len(batch) > 1 or self._engine.maker.save_memory()
        if not saved and longest <= self._fitted:
            raise MemoryTakenError(
                f"sample {batch[0].sample_id} does not fit the memory, where longer ones did before: something else "
                "takes it up. What was done before is kept; run it again to go on"
            )
        if not saved:
            return [GradientError("it does not fit the memory, even alone and with gradient checkpointing")]
        if len(batch) == 1:
            logger.warning("one sample does not fit the memory: going on with gradient checkpointing")
            self._room = Room()  # with that, batches may fit which did not
            return self.make(batch)
        logger.warning("a batch of %d samples does not fit the memory: going on with %d", len(batch), len(batch) // 2)
        self._room.lacked(batch)
        return self._make_halves(batch)

    def _make_halves(self, batch: Batch) -> list[Result]:
        first, second = halves(batch)
        return self.make(first) + self.make(second)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Return the two halves of a batch of several samples."""
    half = len(batch) // 2
    return batch[:half], batch[half:]


def names_of(batch: Batch) -> str:
    """Return which samples a batch is of, in a few words."""
    return f"{batch[0].sample_id} to {batch[-1].sample_id}" if len(batch) > 1 else batch[0].sample_id


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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads for as long as the block lasts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DeviceError(Exception):
    """A worker's device failed, so that the worker is as good as dead; whoever started it is told, and no user."""


def device_error(error: Exception, device: str) -> DeviceError | None:
    """Return what an error that a worker met on a device says of that, if the device failed; else None."""
    if isinstance(error, DeviceError):
        return error
    failure = device_failure(error)
    return None if failure is None else DeviceError(f"{device} failed ({failure})")


def load_of(spec: WorkerSpec) -> Engine:
    """Load the model in a worker, and check its fingerprint.

    Raises:
        DeviceError: the worker's device, which was there before, is gone.
        ModelError, FingerprintError, SpecError: see `load_engine`.
    """
    try:
        resolve_devices(spec.device)
    except SpecError as error:
        raise DeviceError(f"{spec.device} is gone ({error})") from error
    return load_engine(spec.fingerprint, place=spec.place, model=spec.model, adapter=spec.adapter, device=spec.device)
