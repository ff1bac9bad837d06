"""What an ingest will take: counted without the model, and timed on a few of its batches."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice

from rapidin_vdb.batches import Pair, padded_tokens
from rapidin_vdb.compute import Compute, Result
from rapidin_vdb.corpus import Template, Tokenizer
from rapidin_vdb.errors import CorpusError, GradientError
from rapidin_vdb.gradient.memory import peak_bytes
from rapidin_vdb.gradient.probe import kind_of
from rapidin_vdb.intake import Corpus, encoded_windows
from rapidin_vdb.ledger import Entry, Ledger
from rapidin_vdb.plan import make_plan, planned_windows
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded, OnBadRecord, OnDeleted, OnDuplicate
from rapidin_vdb.results import IngestEstimate
from rapidin_vdb.store import SampleTable
from rapidin_vdb.workers import speedup

_TIMED = 5


def estimate(
    table: SampleTable,
    corpus: Corpus,
    compute: Compute,
    *,
    tokenizer: Tokenizer,
    template: Template,
    batch_tokens: int,
    workers: int,
    devices: Sequence[str],
    on_bad_record: OnBadRecord = "stop",
    on_duplicate: OnDuplicate = "error",
    on_deleted: OnDeleted = "add",
    token_width: int | None = None,
    progress: Progress = silent,
) -> IngestEstimate:
    """Return what an ingest with these arguments would take; nothing is written.

    `compute` is one of its workers, timed alone with its share of the threads; that they come into each other's way
    where they read the same memory, and how long they take to start, is left out.

    Raises:
        CorpusError: a record cannot be stored, where the options do not allow it.
        GradientError: none of the samples that are timed has a gradient.
    """
    max_tokens, width = table.fingerprint.max_tokens, table.fingerprint.sketch.width

    def windows() -> Iterator[list[Pair | CorpusError]]:
        return encoded_windows(corpus, tokenizer=tokenizer, template=template, max_tokens=max_tokens)

    with closing(Ledger()) as ledger:
        plan = make_plan(
            table,
            windows(),
            ledger,
            on_bad_record=on_bad_record,
            on_duplicate=on_duplicate,
            on_deleted=on_deleted,
            token_gradients=token_width is not None,
            progress=progress,
        )
        sizes: list[int] = []  # the work of each batch
        tokens = text = samples = single = 0
        for batch, _ in planned_windows(windows(), ledger, batch_tokens, width=width):
            sizes.append(_work([encoded for _, encoded in batch], token_width is not None))
            samples += len(batch)
            tokens += sum(len(encoded.input_ids) for _, encoded in batch)
            single += sum(encoded.response_tokens for _, encoded in batch) if token_width is not None else 0
            text += sum(len((s.prompt or "") + s.response) + 8 * len(e.offsets) for s, e in batch)
        work = sum(sizes)
        seconds = 0.0
        if sizes:
            timed = _spread(sizes)
            ledger.hand_out_again()
            chosen = _pick(planned_windows(windows(), ledger, batch_tokens, width=width), timed)
            list(compute(iter(_one_of_each_kind(chosen))))  # for what happens once: compiling, the self-check
            started = time.monotonic()
            _see_to(list(compute(iter(chosen))))
            measured = sum(_work(batch, token_width is not None) for batch in chosen)
            seconds = (time.monotonic() - started) * work / measured / speedup(workers, devices)
    return IngestEstimate(
        **plan.read_records(),
        samples=samples,
        tokens=tokens,
        batches=len(sizes),
        token_gradients=single,
        # RapidGrads in half precision, token ids, and the text.
        bytes=(samples - plan.tokens_only) * 2 * width + 2 * single * (token_width or 0) + 4 * tokens + text,
        # Each worker is a process that holds the model for itself.
        peak_memory=workers * max(peak_bytes(devices[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10),
        seconds=seconds,
    )


def _see_to(made: Sequence[tuple[Sequence[Encoded], Sequence[Result]]]) -> None:
    """Refuse to reckon with batches of which nothing came.

    Raises:
        GradientError: no sample has a gradient.
    """
    results = [result for _, batch in made for result in batch]
    errors = [result for result in results if isinstance(result, GradientError)]
    if errors and len(errors) == len(results):
        raise GradientError(f"none of the {len(results):,} samples that were timed has a gradient: {errors[0]}")


def _work(batch: Sequence[Encoded], token_gradients: bool) -> int:
    """Return how many tokens go through the model for a batch and for RapidGrads of its single tokens."""
    # For each response token, all that stands before it.
    single = sum(s.place(number) + 1 for s in batch for number in range(s.response_tokens)) if token_gradients else 0
    return padded_tokens(batch) + single


def _spread(sizes: Sequence[int]) -> set[int]:
    """Return the numbers of a few batches, from the lightest to the heaviest."""
    order = sorted(range(len(sizes)), key=lambda number: sizes[number])
    return {order[round(part * (len(order) - 1) / (_TIMED - 1))] for part in range(_TIMED)}


def _one_of_each_kind(batches: Sequence[list[Encoded]]) -> list[list[Encoded]]:
    """Return a batch of each kind that there is, one of several lengths first: then no other is checked."""
    kinds = {kind_of(batch): batch for batch in batches}
    return [kinds[kind] for kind in sorted(kinds, reverse=True)]


def _pick(planned: Iterator[tuple[list[Pair], dict[str, Entry]]], numbers: set[int]) -> list[list[Encoded]]:
    chosen = [batch for number, (batch, _) in enumerate(islice(planned, max(numbers) + 1)) if number in numbers]
    return [[encoded for _, encoded in batch] for batch in chosen]
