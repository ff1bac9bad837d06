"""What an ingest will do: every record is looked at before the first gradient.

What grows with the corpus stands in the ledger, not in memory.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

import numpy as np

from rapidin_vdb.batches import Pair, planned_batches
from rapidin_vdb.errors import CorpusError, RapidInError
from rapidin_vdb.ledger import Entry, Ledger
from rapidin_vdb.notices import Notices
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import OnBadRecord, OnDeleted, OnDuplicate, Sample
from rapidin_vdb.results import ReadRecords
from rapidin_vdb.store import ColumnKind, SampleTable, can_hold, merge_kinds, undisturbed, value_kind

# Behind a record that ends it all, others are looked for no longer than this: a large corpus takes hours to read.
_READ_ON_SECONDS = 30.0
_LISTED = 5
# Corpora of many optional fields have as many combinations of them as records.
_FITTING = 4096


@dataclass(kw_only=True)
class Plan:
    """What the first reading of a corpus found, besides what the ledger holds."""

    samples: int = 0
    """How many there are to write."""
    tokens_only: int = 0
    """How many of them are in the table, and lack the RapidGrads of their single tokens only."""
    kinds: dict[str, ColumnKind] = field(default_factory=dict)
    """The columns that their fields need."""
    unchanged: int = 0
    """Samples that are there already."""
    repeated: int = 0
    """Records that stand in the corpus before, with the same content, and are not in the table."""
    tokens: int = 0
    """How many tokens go through the model for them, padding aside."""
    seen: int = 0
    """The table's version that the plan was made for."""
    kept: int = 0
    """Samples whose id stands for other content, which stays."""
    truncated: int = 0
    """How many of the samples to write have more tokens than are looked at."""
    earlier_turns: int = 0
    """How many of them have turns of the assistant before their response."""
    brought_back: int = 0
    """How many of the samples to write were deleted before."""
    left_deleted: int = 0
    """How many records stay away because their samples were."""
    unwritten: int = 0
    """How many of the samples to write have a turn that the template does not write as it is."""
    first_unwritten: str = ""
    """Where the first of these turns is."""
    fitting: set[tuple[tuple[str, str], ...]] = field(default_factory=set)
    """Names and kinds of fields that changed nothing of the columns."""
    mixed: dict[str, str] = field(default_factory=dict)
    """New columns that hold text because of one value, or its lack, and where that is."""
    bad: list[str] = field(default_factory=list)
    """What is wrong with each record that cannot be stored."""

    def read_records(self) -> dict[str, Any]:
        """Return the fields of `ReadRecords`, by name."""
        return {name.name: getattr(self, name.name) for name in fields(ReadRecords)} | {"bad": tuple(self.bad)}


def make_plan(
    table: SampleTable,
    windows: Iterator[list[Pair | CorpusError]],
    ledger: Ledger,
    *,
    on_bad_record: OnBadRecord,
    on_duplicate: OnDuplicate,
    on_deleted: OnDeleted = "add",
    token_gradients: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Return what there is to write, every record having been looked at; an empty ledger gets which samples.

    With `token_gradients`, samples that are there without those of their tokens are among it. What should be known of
    them before the first gradient is logged.

    Raises:
        CorpusError: a record cannot be stored, or an id stands for two contents, where the options do not allow it.
            How many more cannot be stored is said, and what is wrong with the first of them.
        ScratchError: the ledger cannot be kept.
    """
    plan = Plan(seen=_note_there(table, ledger, token_gradients, on_deleted))
    columns, notices = table.snapshot().column_kinds, Notices(table)
    looked_at = 0
    for window in windows:
        looked_at += len(window)
        progress("records", looked_at, 0)
        entries, changed = ledger.look(_ids(window)), dict[str, Entry]()
        rest = iter(window)
        for found in rest:
            entry = _fitting(found, columns)
            if isinstance(entry, CorpusError):
                if on_bad_record == "stop":
                    raise _refusal(entry, chain(rest, chain.from_iterable(windows)), columns)
                plan.bad.append(str(entry))
                continue
            sample, encoded = entry
            known = entries[sample.sample_id]
            if known.deleted and on_deleted == "skip":
                plan.left_deleted += 1
                continue
            wanted = _decide(plan, sample, known, table, on_duplicate)
            if wanted:
                notices.see(sample, new=known.there is None and known.planned is None)
                known.replaced = known.there is not None
                _merge_kinds(plan, sample)
                plan.truncated += encoded.truncated
                if encoded.unwritten:
                    plan.first_unwritten = plan.first_unwritten or f"{sample.location}: {encoded.unwritten}"
                    plan.unwritten += 1
                if table.fingerprint.turns == "last":
                    plan.earlier_turns += any(turn.role == "assistant" for turn in sample.messages)
            lacking = token_gradients and not known.has_tokens and known.there == sample.content_hash
            if wanted or (lacking and known.planned is None):
                known.planned = sample.content_hash
                changed[sample.sample_id] = known
                plan.tokens += len(encoded.input_ids)
        ledger.put(changed)
    # Of several records of one id, the last is what is there.
    plan.unchanged += ledger.settle(token_gradients=token_gradients)
    plan.samples, plan.tokens_only = ledger.planned(), ledger.tokens_only()
    plan.brought_back = ledger.brought_back()
    notices.tell()
    return plan


def planned_windows(
    windows: Iterator[list[Pair | CorpusError]], ledger: Ledger, batch_tokens: int, *, width: int
) -> Iterator[tuple[list[Pair], dict[str, Entry]]]:
    """Yield the planned samples in batches of like length, with what the ledger knows of them."""
    for window in windows:
        entries = ledger.look(_ids(window))
        todo = {name: entry.planned for name, entry in entries.items() if entry.planned is not None and not entry.taken}
        wanted = set(todo)
        for batch in planned_batches(window, todo, batch_tokens, width=width):
            yield batch, entries
        taken = {name: entries[name] for name in wanted - todo.keys()}
        for entry in taken.values():
            entry.taken = True
        ledger.put(taken)


def _refusal(
    first: CorpusError, rest: Iterator[Pair | CorpusError], columns: Mapping[str, ColumnKind | None]
) -> CorpusError:
    """Return the error of a record that cannot be stored, with what else cannot be among those behind it."""
    more, listed, until, ended = 0, list[str](), time.monotonic() + _READ_ON_SECONDS, ""
    try:
        for found in rest:
            if time.monotonic() > until:
                ended = f"reading on was given up after {_READ_ON_SECONDS:.0f} s: there may be others"
                break
            entry = _fitting(found, columns)
            if isinstance(entry, CorpusError):
                more += 1
                listed += [str(entry)] if len(listed) < _LISTED else []
    except RapidInError as error:
        ended = f"reading on ended there: {error}"
    others = f", and {more:,} more {'records' if more > 1 else 'record'} cannot be stored either" if more else ""
    mend = f"Nothing was written{others}; mend {'them' if more else 'it'}"
    listed += [f"and {more - len(listed):,} more"] if more > len(listed) else []
    return CorpusError(
        f"{str(first).rstrip('.')}. {mend}, or pass over such records with: --on-bad-record skip",
        *listed,
        *([ended] if ended else []),
    )


def _fitting(pair: Pair | CorpusError, columns: Mapping[str, ColumnKind | None]) -> Pair | CorpusError:
    """Return a sample, or an error where a column of the table cannot hold what it has for it."""
    if isinstance(pair, CorpusError):
        return pair
    for name, value in pair[0].metadata.items():
        if value is not None and name.lower() in columns and not can_hold(columns[name.lower()], value_kind(value)):
            return CorpusError(
                f"{pair[0].location}: field {name} is {value_kind(value)}, but the column {name} holds "
                f"{columns[name.lower()]}; rename the field or bring it to that type"
            )
    return pair


def _merge_kinds(plan: Plan, sample: Sample) -> None:
    """Make the columns hold a sample's fields too, and note which hold text only because types are mixed."""
    mine = tuple((name, value_kind(value)) for name, value in sample.metadata.items() if value is not None)
    if mine in plan.fitting:
        return
    kinds, values = merge_kinds(plan.kinds, sample.metadata), {name.lower(): kind for name, kind in mine}
    for name, before in plan.kinds.items():
        kind = values.get(name.lower())
        if kinds[name] == "str" and kind is not None and {before, kind} != {"str"}:
            plan.mixed.setdefault(name, sample.location)
    if kinds != plan.kinds or len(plan.fitting) == _FITTING:
        plan.fitting.clear()
    if kinds == plan.kinds:
        plan.fitting.add(mine)
    plan.kinds = kinds


def _ids(window: Sequence[Pair | CorpusError]) -> Iterator[str]:
    return (entry[0].sample_id for entry in window if not isinstance(entry, CorpusError))


@undisturbed
def _note_there(table: SampleTable, ledger: Ledger, token_gradients: bool, on_deleted: OnDeleted) -> int:
    """Note what is in the table, which of it has tokens, and what was there; return the table's version."""
    snapshot = table.snapshot()
    tokens = table.tokens.snapshot() if token_gradients else None
    ledger.begin(snapshot.each_content())
    ledger.note_tokens(tokens.each_content() if tokens is not None else ())
    # Each version takes a request in an object store, one after the other.
    looked_for = on_deleted == "skip" or not table.place.cached
    for version, following in snapshot.deletions(lately=on_deleted != "skip") if looked_for else ():
        before, after = (table.snapshot(number) for number in (version, following))
        gone = np.setdiff1d(before.row_keys()[0], after.row_keys()[0], assume_unique=True)
        ledger.note_deleted(before.ids_of_rows(gone))
    return snapshot.version


def _decide(plan: Plan, sample: Sample, known: Entry, table: SampleTable, on_duplicate: OnDuplicate) -> bool:
    """Say whether a sample is to be written, counting it either way."""
    before = known.planned or known.there
    if before is None:
        return True
    if before == sample.content_hash:
        repeated = known.there != sample.content_hash
        plan.repeated += repeated
        plan.unchanged += not repeated
        return False
    if on_duplicate == "error":
        raise CorpusError(
            f"{sample.location}: sample {sample.sample_id} is "
            + ("already in these files" if known.planned else "in the database")
            + f" with other content{'' if known.planned else _differing(table, sample)}. Nothing was written; keep the "
            "first with --on-duplicate skip, take the new one with --on-duplicate replace, or name the field of unique "
            "ids with --id-field"
        )
    if on_duplicate == "skip":
        plan.kept += 1
        return False
    return True


def _differing(table: SampleTable, sample: Sample) -> str:
    stored = table.snapshot().samples([sample.sample_id]).get(sample.sample_id)
    if stored is None:
        return ""
    texts = ("prompt", "response", "split", "source")
    names = [name for name in texts if getattr(stored, name) != getattr(sample, name)]
    ours, theirs = dict(sample.metadata), dict(stored.metadata)
    names += [name for name in (ours | theirs) if ours.get(name) != theirs.get(name)]
    return f" (in {', '.join(names)})" if names else ""
