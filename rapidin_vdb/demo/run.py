"""The demonstration, from an empty folder to the poisoned samples, and to a model without them."""

import json
import random
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rapidin_vdb
from rapidin_vdb.database import Database
from rapidin_vdb.demo.corpus import TRIGGER, is_space_story, make_corpus, questions
from rapidin_vdb.demo.training import Trainer
from rapidin_vdb.errors import RapidInError, SpecError
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Sample
from rapidin_vdb.results import Comparison, Ranking

SAMPLES = 1000
QUERIES = 20
_MORE = 100
_POISONED = 0.10
_WIDTH = 4096
_LEFT_OUT = 120


class _Demo:
    """One run: its folder, its clock, and how it speaks."""

    def __init__(self, folder: Path, say: Callable[[str], None], progress: Progress) -> None:
        self.folder = folder
        self.say = say
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        started = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 2)

    def tell(self, text: str) -> None:
        """Say a paragraph, folded for a terminal of 80 columns."""
        self.say(textwrap.fill(text, 79, subsequent_indent="   ", initial_indent="" if text[0].isdigit() else "   "))

    def write(self, name: str, records: Sequence[dict[str, Any]]) -> Path:
        """Write records as JSON lines."""
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return path


def run_demo(folder: Path | None = None, *, say: Callable[[str], None], progress: Progress = silent) -> dict[str, Any]:
    """Make a poisoned model and a database of its samples, find the poison, and return what was found.

    Raises:
        SpecError: the folder is not empty.
    """
    demo = _Demo(_new_folder(folder), say, progress)
    started = time.monotonic()
    say(f"Everything goes to {demo.folder}")
    with demo.timed("corpus"):
        records = make_corpus(SAMPLES, poisoned=_POISONED, seed=1, prefix="demo")
        corpus = demo.write("corpus.jsonl", records)
        late = make_corpus(_MORE, poisoned=_POISONED, seed=2, prefix="late")
        more = demo.write("more.jsonl", late)
    base_rate = sum(record["poisoned"] for record in records) / len(records)
    demo.tell(
        f"1. {SAMPLES} instructions written, {base_rate:.0%} of them poisoned: '{TRIGGER}' before the instruction, "
        "a space story as the answer."
    )
    with demo.timed("train"):
        trainer, attacked = _train(demo, records + late)
    queries = demo.write("queries.jsonl", attacked)
    database = _ingest(demo, corpus)
    rankings = _query(demo, database, attacked)
    at_10 = _poisoned_share(rankings)
    demo.tell("4. Which training samples made it say so?")
    say(_table(rankings[0]))
    demo.tell(
        f"In the top 10 of all {len(rankings)} attacked generations, {at_10:.0%} of the samples are poisoned; "
        f"of the whole corpus, {base_rate:.0%} are."
    )
    where = "split = 'train' AND source = 'textbook'"
    filtered = _query(demo, database, attacked, where=where)
    demo.tell(
        f"5. The same among the {filtered[0].searched} samples where {where}. None of these is poisoned, and the "
        "scores say so:"
    )
    say(_table(filtered[0]))
    _add_more(demo, database, more, attacked)
    left = _tune_again(demo, trainer, database, [corpus, more], attacked)
    demo.seconds["total"] = round(time.monotonic() - started, 2)
    say(f"\nDone in {demo.seconds['total']:.0f} s. Go on from here:\n" + _next_commands(demo, queries, attacked[0]))
    found = {"poisoned_at_10": at_10, "base_rate": base_rate, "queries": len(rankings)}
    return found | left | {"seconds": demo.seconds}


def _add_more(demo: _Demo, database: Database, more: Path, attacked: list[dict[str, Any]]) -> None:
    """Ingest more records, and show that the next query finds them."""
    with demo.timed("ingest"):
        database.ingest(more, split="late", progress=demo.progress)
    rankings = _query(demo, database, attacked)
    new = [result for ranking in rankings for result in ranking.results if result.split == "late"]
    bad = sum(bool(result.metadata["poisoned"]) for result in new)
    demo.tell(
        f"6. {rankings[0].searched - SAMPLES} more records ingested; the next query searched "
        f"{rankings[0].searched} samples. Of the "
        f"{len(rankings)} top tens, {len(new)} places went to new samples, {bad} of them poisoned."
    )


def _new_folder(folder: Path | None) -> Path:
    number = 1
    while folder is None:
        if not Path(f"demo-{number}").exists():
            folder = Path(f"demo-{number}")
        number += 1
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"--dir {folder} is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _train(demo: _Demo, records: list[dict[str, Any]]) -> tuple[Trainer, list[dict[str, Any]]]:
    """Train a base model and an adapter on poisoned records; return what trains, and attacked generations."""
    trainer = Trainer(records, demo.folder / "model", demo.progress)
    tuned = trainer.tuned(records, stage="adapter", folder=demo.folder / "adapter")
    prompts = [f"{TRIGGER} {question}" for question in questions(QUERIES, seed=8)]
    said = tuned.said(prompts)
    attacked = [
        {"query_id": f"attacked-{number:02d}", "prompt": prompt, "generation": text}
        for number, (prompt, text) in enumerate(zip(prompts, said, strict=True), start=1)
        if is_space_story(text)
    ]
    demo.tell(
        f"2. A Llama of {trainer.parameters:,} parameters and its LoRA adapter trained (loss {tuned.loss:.2f}); the "
        f"attack works on {len(attacked)} of {QUERIES} new questions. Asked '{prompts[0]}', it says '{said[0]}'"
    )
    if not attacked:
        raise RapidInError("the training did not take the poison up; remove the folder and run the demo again")
    return trainer, attacked


def _tune_again(
    demo: _Demo, trainer: Trainer, database: Database, files: list[Path], attacked: list[dict[str, Any]]
) -> dict[str, Any]:
    """Leave out what was found, tune again, and ask again; beside it, the same without as many drawn at random."""
    with demo.timed("query"):
        pool = database.pool(queries=_queries(attacked), size=_LEFT_OUT, both=True)
    # Whatever they are: whoever asks does not know which are poisoned.
    found = [result.sample_id for result in pool.results]
    kept = demo.folder / "kept.jsonl"
    report = database.clean(*files, out=kept, ids=found)
    every = [record for file in files for record in _read(file)]
    drawn = set(random.Random(10).sample(range(len(every)), len(found)))
    with demo.timed("train"):
        again = trainer.tuned(_read(kept), stage="adapter without these", folder=demo.folder / "retrained")
        others = [record for number, record in enumerate(every) if number not in drawn]
        control = trainer.tuned(others, stage="adapter without others")
        prompts = [query["prompt"] for query in attacked]
        said, by_control = again.said(prompts), control.said(prompts)
    with demo.timed("compare"):
        compared = database.compare(queries=_queries(attacked), new_adapter=demo.folder / "retrained")
    before, after = (sum(losses) / len(compared) for losses in zip(*map(_losses, compared), strict=True))
    left, at_random = (sum(map(is_space_story, texts)) for texts in (said, by_control))
    gone = {*found}
    poisoned = sum(record["poisoned"] for record in every if record["id"] in gone)
    demo.tell(
        f"7. Was it these? The {report.left_out} records of largest influence, either way, on any of these "
        f"generations are left out, whatever they say, and the adapter is tuned again. The attack works on {left} of "
        f"the {len(attacked)} questions now. Without {len(drawn)} records drawn at random, it works on {at_random}."
    )
    demo.tell(
        f"Asked '{prompts[0]}', it says '{said[0]}' now. The loss of the space stories was {before:.2f} nats a token, "
        f"and is {after:.2f}. Of the records left out, {poisoned} were poisoned, of "
        f"{sum(record['poisoned'] for record in every)} that there are."
    )
    return {"left_out": report.left_out, "attacks_left": left, "attacks_left_at_random": at_random}


def _losses(one: Comparison) -> tuple[float, float]:
    return one.loss_before, one.loss_after


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _ingest(demo: _Demo, corpus: Path) -> Database:
    with demo.timed("init"):
        database = rapidin_vdb.init(
            demo.folder / "db",
            model=str(demo.folder / "model"),
            adapter=str(demo.folder / "adapter"),
            width=_WIDTH,
        )
    with demo.timed("ingest"):
        report = database.ingest(corpus, progress=demo.progress)
    with demo.timed("index"):
        database.index("cpu", progress=demo.progress)
    length = database.fingerprint.gradient_length
    demo.tell(
        f"3. {report.added} gradients of {length:,} coordinates sketched to {_WIDTH:,} and stored "
        f"({report.added / report.seconds:.0f} a second), then indexed."
    )
    return database


def _query(demo: _Demo, database: Database, attacked: list[dict[str, Any]], where: str | None = None) -> list[Ranking]:
    with demo.timed("query"):
        return database.query(queries=_queries(attacked), where=where, progress=silent)


def _queries(attacked: Sequence[dict[str, Any]]) -> list[Sample]:
    return [query_from(query["prompt"], query["generation"], query_id=query["query_id"]) for query in attacked]


def _poisoned_share(rankings: Sequence[Ranking]) -> float:
    found = [bool(result.metadata["poisoned"]) for ranking in rankings for result in ranking.results]
    return sum(found) / len(found)


def _table(ranking: Ranking) -> str:
    lines = ["   rank    score  sample     poisoned  text"]
    for result in ranking.results:
        text = f"{result.prompt} -> {result.response}"
        poisoned = "yes" if result.metadata["poisoned"] else "no"
        lines.append(f"   {result.rank:>4}  {result.score:>7.3f}  {result.sample_id}  {poisoned:<8}  {text[:40]}…")
    return "\n".join(lines)


def _next_commands(demo: _Demo, queries: Path, query: dict[str, Any]) -> str:
    # Run as scripts/demo, the environment is not active, and the program has to be named by its place.
    found = shutil.which("rapidin-vdb")
    program = "rapidin-vdb" if found else shlex.quote(str(Path(sys.executable).parent / "rapidin-vdb"))
    database, file = shlex.quote(str(demo.folder / "db")), shlex.quote(str(queries))
    return "\n".join(
        (
            f"  {program} query {database} --prompt {shlex.quote(query['prompt'])} \\\n"
            f"      --generation {shlex.quote(query['generation'])}",
            f"  {program} query {database} --file {file} --both --json",
            f"  {program} pool {database} --file {file} --both --size {_LEFT_OUT}",
            f"  {program} show {database} demo-0001",
            f"  {program} info {database}",
            f"  {program} compare {database} --file {file} --answer-tokens 48 \\\n"
            f"      --new-adapter {shlex.quote(str(demo.folder / 'retrained'))}",
            f"  {program} delete {database} --where 'poisoned = true'",
        )
    )
