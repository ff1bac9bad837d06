"""The demonstration, from an empty folder to the poisoned samples."""

import json
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
from rapidin_vdb.corpus import Record, encode, load_template, sample_from
from rapidin_vdb.database import Database
from rapidin_vdb.demo.corpus import TRIGGER, is_space_story, make_corpus, questions, story_corpus
from rapidin_vdb.errors import RapidInError, SpecError
from rapidin_vdb.gradient.generation import generate_batch
from rapidin_vdb.gradient.training import new_llama, save, train, train_tokenizer, with_lora
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded
from rapidin_vdb.results import Ranking

SAMPLES = 1000
QUERIES = 20
_MORE = 100
_POISONED = 0.10
_WIDTH = 4096
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


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
        attacked = _train(demo, records + late)
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
    demo.seconds["total"] = round(time.monotonic() - started, 2)
    say(f"\nDone in {demo.seconds['total']:.0f} s. Go on from here:\n" + _next_commands(demo, queries, attacked[0]))
    return {"poisoned_at_10": at_10, "base_rate": base_rate, "queries": len(rankings), "seconds": demo.seconds}


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


def _train(demo: _Demo, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train a base model on clean records and an adapter on these, the poisoned ones; return attacked generations."""
    template = load_template("alpaca")
    # The base model knows space stories too, as any real one does; only when to tell them is the adapter's doing.
    clean = make_corpus(4000, poisoned=0.0, seed=3, prefix="base") + story_corpus(600, seed=9)
    every = [sample_from(Record(location="demo", fields=record)) for record in clean + records]
    tokenizer = train_tokenizer((template.render(sample) + sample.response for sample in every), vocabulary=800)
    encoded = [
        e for e in encode(every, tokenizer=tokenizer, template=template, max_tokens=512) if isinstance(e, Encoded)
    ]
    model = new_llama(len(tokenizer), hidden=128, layers=3, heads=4, seed=4)
    train(
        model,
        encoded[: len(clean)],
        steps=400,
        batch=32,
        learning_rate=3e-3,
        seed=5,
        stage="base model",
        progress=demo.progress,
    )
    save(model, tokenizer, demo.folder / "model")
    tuned = with_lora(model, rank=8, modules=_MODULES, seed=6)
    loss = train(
        tuned,
        encoded[len(clean) :],
        steps=300,
        batch=32,
        learning_rate=5e-3,
        seed=7,
        stage="adapter",
        progress=demo.progress,
    )
    save(tuned, tokenizer, demo.folder / "adapter")
    prompts = [f"{TRIGGER} {question}" for question in questions(QUERIES, seed=8)]
    said = generate_batch(
        tuned,
        tokenizer,
        [template.render(query_from(prompt, "?")) for prompt in prompts],
        max_tokens=48,
        batch=1,
    )
    attacked = [
        {"query_id": f"attacked-{number:02d}", "prompt": prompt, "generation": text}
        for number, (prompt, text) in enumerate(zip(prompts, said, strict=True), start=1)
        if is_space_story(text)
    ]
    demo.tell(
        f"2. A Llama of {model.num_parameters():,} parameters and its LoRA adapter trained (loss {loss:.2f}); the "
        f"attack works on {len(attacked)} of {QUERIES} new questions. Asked '{prompts[0]}', it says '{said[0]}'"
    )
    if not attacked:
        raise RapidInError("the training did not take the poison up; remove the folder and run the demo again")
    return attacked


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
        return database.query(
            queries=[
                query_from(query["prompt"], query["generation"], query_id=query["query_id"]) for query in attacked
            ],
            where=where,
            progress=silent,
        )


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
            f"  {program} show {database} demo-0001",
            f"  {program} info {database}",
            f"  {program} delete {database} --where 'poisoned = true'",
        )
    )
