"""What an ingest will do: every record is looked at before the first gradient.

What grows with the corpus stands in the ledger, not in memory.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from rapidin_vdb.batches import Pair, planned_batches
from rapidin_vdb.corpus import Template, Tokenizer, as_written, encode, read_corpus
from rapidin_vdb.errors import CorpusError, RapidInError, SpecError, check_unicode
from rapidin_vdb.gradient import check_token_width
from rapidin_vdb.ledger import Entry, Ledger
from rapidin_vdb.records import OnBadRecord, OnDuplicate, Sample, Turns
from rapidin_vdb.store import ColumnKind, SampleTable, can_hold, merge_kinds, undisturbed, value_kind

# Records checked, encoded and sorted by length together.
_WINDOW = 1024
# Behind a record that ends it all, others are looked for no longer than this: a large corpus takes hours to read.
_READ_ON_SECONDS = 30.0
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What to ingest."""

    paths: tuple[Path, ...]
    """Files, in order."""
    split: str | None = None
    """Wins over the records' own field; `train` without either."""
    source: str | None = None
    """Wins over the records' own field."""
    id_field: str = "id"
    """Which field holds the sample id."""
    limit: int | None = None
    """How many records to read at most."""
    turns: Turns = "last"
    """Which turns of the assistant have a loss."""

    def __post_init__(self) -> None:
        """Refuse what no sample could have.

        Raises:
            SpecError: a split or source is no valid Unicode.
        """
        check_unicode(self.split, "--split")
        check_unicode(self.source, "--source")

    def read(self) -> Iterator[Sample | CorpusError]:
        """Yield the samples, an error in the place of each record that cannot be one."""
        samples = read_corpus(
            self.paths, split=self.split, source=self.source, id_field=self.id_field, turns=self.turns
        )
        return islice(samples, self.limit)


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
    mixed: dict[str, str] = field(default_factory=dict)
    """New columns that hold text because of one value, or its lack, and where that is."""
    bad: list[str] = field(default_factory=list)
    """What is wrong with each record that cannot be stored."""


def token_width_for(table: SampleTable, given: int | None) -> int:
    """Return the width of single tokens' RapidGrads: that which they have in the table, or the one asked for.

    Raises:
        SpecError: the two differ, or it cannot be honoured.
    """
    here, widest = table.tokens.width, table.fingerprint.sketch.width
    if here is not None and given not in (None, here):
        raise SpecError(f"--token-width is {given}, but tokens are stored with {here} here; leave it out")
    width = next(known for known in (here, given, min(4096, widest)) if known is not None)
    check_token_width(width, widest)
    return width


def encoded_windows(
    corpus: Corpus, *, tokenizer: Tokenizer, template: Template, max_tokens: int
) -> Iterator[list[Pair | CorpusError]]:
    """Yield a corpus's samples with their tokens, some at a time, an error in the place of each that has none."""
    samples = corpus.read()
    while window := list(islice(samples, _WINDOW)):
        yield _encode_window(window, tokenizer=tokenizer, template=template, max_tokens=max_tokens)


def _encode_window(
    window: Sequence[Sample | CorpusError], *, tokenizer: Tokenizer, template: Template, max_tokens: int
) -> list[Pair | CorpusError]:
    samples = [entry for entry in window if isinstance(entry, Sample)]
    encoded = iter(encode(samples, tokenizer=tokenizer, template=template, max_tokens=max_tokens))
    result: list[Pair | CorpusError] = []
    for entry in window:
        if isinstance(entry, CorpusError):
            result.append(entry)
        else:
            tokens = next(encoded)
            result.append(tokens if isinstance(tokens, CorpusError) else (as_written(entry, tokens), tokens))
    return result


def make_plan(
    table: SampleTable,
    windows: Iterator[list[Pair | CorpusError]],
    ledger: Ledger,
    *,
    on_bad_record: OnBadRecord,
    on_duplicate: OnDuplicate,
    token_gradients: bool = False,
) -> Plan:
    """Return what there is to write, every record having been looked at; an empty ledger gets which samples.

    With `token_gradients`, samples that are there without those of their tokens are among it.

    Raises:
        CorpusError: a record cannot be stored, or an id stands for two contents, where the options do not allow it.
            How many more cannot be stored is said, and what is wrong with the first of them.
        ScratchError: the ledger cannot be kept.
    """
    plan = Plan(seen=_note_there(table, ledger, token_gradients))
    columns = table.snapshot().column_kinds
    for window in windows:
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
            wanted = _decide(plan, sample, known, table, on_duplicate)
            if wanted:
                known.replaced = known.there is not None
                _merge_kinds(plan, sample)
                plan.truncated += encoded.truncated
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
        f"{first}. {mend}, or pass over such records with: --on-bad-record skip", *listed, *([ended] if ended else [])
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
    kinds = merge_kinds(plan.kinds, sample.metadata)
    for name, before in plan.kinds.items():
        values = [value for other, value in sample.metadata.items() if other.lower() == name.lower()]
        if kinds[name] == "str" and any(v is not None and {before, value_kind(v)} != {"str"} for v in values):
            plan.mixed.setdefault(name, sample.location)
    plan.kinds = kinds


def _ids(window: Sequence[Pair | CorpusError]) -> Iterator[str]:
    return (entry[0].sample_id for entry in window if not isinstance(entry, CorpusError))


@undisturbed
def _note_there(table: SampleTable, ledger: Ledger, token_gradients: bool) -> int:
    """Note what is in the table, and which of it has tokens; return the table's version."""
    snapshot = table.snapshot()
    tokens = table.tokens.snapshot() if token_gradients else None
    ledger.begin(snapshot.each_content())
    ledger.note_tokens(tokens.each_content() if tokens is not None else ())
    return snapshot.version


def _decide(plan: Plan, sample: Sample, known: Entry, table: SampleTable, on_duplicate: OnDuplicate) -> bool:
    """Say whether a sample is to be written, counting it either way."""
    before = known.planned or known.there
    if before is None:
        return True
    if before == sample.content_hash:
        plan.unchanged += 1
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
