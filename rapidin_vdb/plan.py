"""What an ingest will do: every record is looked at before the first gradient."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rapidin_vdb.batches import Pair
from rapidin_vdb.corpus import Template, Tokenizer, encode, read_corpus
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.gradient import check_token_width
from rapidin_vdb.records import OnBadRecord, OnDuplicate, Sample
from rapidin_vdb.store import ColumnKind, SampleTable, merge_kinds, undisturbed

# Records checked, encoded and sorted by length together.
_WINDOW = 1024


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

    def read(self) -> Iterator[Sample | CorpusError]:
        """Yield the samples, an error in the place of each record that cannot be one."""
        samples = read_corpus(self.paths, split=self.split, source=self.source, id_field=self.id_field)
        return islice(samples, self.limit)


@dataclass(kw_only=True)
class Plan:
    """What the first reading of a corpus found."""

    todo: dict[str, str] = field(default_factory=dict)
    """Content hash of each sample to write, by id."""
    kinds: dict[str, ColumnKind] = field(default_factory=dict)
    """The columns that their fields need."""
    tokens_only: set[str] = field(default_factory=set)
    """Those of them that are in the table, and lack the RapidGrads of their single tokens."""
    replaced: set[str] = field(default_factory=set)
    """Those of them whose id is in the table, with other content."""
    unchanged: int = 0
    """Samples that are there already."""
    tokens: int = 0
    """How many tokens go through the model for them, padding aside."""
    seen: int = 0
    """The table's version that the plan was made for."""
    kept: int = 0
    """Samples whose id stands for other content, which stays."""
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
            result.append(tokens if isinstance(tokens, CorpusError) else (entry, tokens))
    return result


def make_plan(
    table: SampleTable,
    windows: Iterator[list[Pair | CorpusError]],
    *,
    on_bad_record: OnBadRecord,
    on_duplicate: OnDuplicate,
    token_gradients: bool = False,
) -> Plan:
    """Return what there is to write, every record having been looked at.

    With `token_gradients`, samples that are there without those of their tokens are among it.

    Raises:
        CorpusError: a record cannot be stored, or an id stands for two contents, where the options do not allow it.
    """
    version, stored, having = _there(table, token_gradients)
    plan = Plan(seen=version)
    for window in windows:
        for entry in window:
            if isinstance(entry, CorpusError):
                if on_bad_record == "stop":
                    raise CorpusError(
                        f"{entry}. Nothing was written; mend it, or pass over such records with: --on-bad-record skip"
                    )
                plan.bad.append(str(entry))
                continue
            sample = entry[0]
            wanted = _decide(plan, sample, stored, table, on_duplicate)
            if not wanted and token_gradients and sample.sample_id not in plan.todo:
                lacking = (sample.sample_id, sample.content_hash) not in having
                if lacking and stored.get(sample.sample_id) == sample.content_hash:
                    plan.tokens_only.add(sample.sample_id)
                    plan.todo[sample.sample_id] = sample.content_hash
                    plan.tokens += len(entry[1].input_ids)
            if wanted and sample.sample_id in plan.tokens_only:
                # What was there without tokens is replaced by a later record of these files.
                plan.tokens_only.remove(sample.sample_id)
                plan.replaced.add(sample.sample_id)
            if wanted:
                plan.todo[sample.sample_id] = sample.content_hash
                plan.tokens += len(entry[1].input_ids)
                plan.kinds = merge_kinds(plan.kinds, sample.metadata)
    for name in [name for name in plan.replaced if plan.todo[name] == stored[name]]:
        # Of several records of one id, the last is what is there.
        plan.replaced.remove(name)
        plan.unchanged += 1
        if token_gradients and (name, stored[name]) not in having:
            plan.tokens_only.add(name)
        else:
            del plan.todo[name]
    return plan


@undisturbed
def _there(table: SampleTable, token_gradients: bool) -> tuple[int, dict[str, str], set[tuple[str, str]]]:
    """Return the table's version, the content hash of each sample, and which of them have tokens."""
    snapshot = table.snapshot()
    tokens = table.tokens.snapshot() if token_gradients else None
    return snapshot.version, snapshot.content_hashes(), tokens.content_hashes() if tokens is not None else set()


def _decide(plan: Plan, sample: Sample, stored: dict[str, str], table: SampleTable, on_duplicate: OnDuplicate) -> bool:
    """Say whether a sample is to be written, counting it either way."""
    planned = plan.todo.get(sample.sample_id)
    before = planned or stored.get(sample.sample_id)
    if before is None:
        return True
    if before == sample.content_hash:
        plan.unchanged += 1
        return False
    if on_duplicate == "error":
        raise CorpusError(
            f"{sample.location}: sample {sample.sample_id} is "
            + ("already in these files" if planned else "in the database")
            + f" with other content{'' if planned else _differing(table, sample)}. Nothing was written; keep the first "
            "with --on-duplicate skip, take the new one with --on-duplicate replace, or name the field of unique ids "
            "with --id-field"
        )
    if on_duplicate == "skip":
        plan.kept += 1
        return False
    if planned is None:
        plan.replaced.add(sample.sample_id)
    return True


def _differing(table: SampleTable, sample: Sample) -> str:
    stored = table.snapshot().samples([sample.sample_id]).get(sample.sample_id)
    if stored is None:
        return ""
    names = [
        name for name in ("prompt", "response", "split", "source") if getattr(stored, name) != getattr(sample, name)
    ]
    return f" (its {' and '.join(names or ['other fields'])} differ)"
