"""The commands, one function each."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rapidin_vdb.cli import show
from rapidin_vdb.cli.clean import clean
from rapidin_vdb.cli.compare import compare
from rapidin_vdb.cli.ids import read_ids
from rapidin_vdb.cli.ingest import ingest
from rapidin_vdb.cli.interrupted import interruptible
from rapidin_vdb.cli.options import DB, AsJson, AsOf, Cluster, Device, Ids, IndexName, Moved, MovedAdapter
from rapidin_vdb.cli.pages import check_matrix, check_writable, write_page
from rapidin_vdb.cli.pool import pool
from rapidin_vdb.cli.progress import progress_bars
from rapidin_vdb.cli.serve import serve
from rapidin_vdb.records import Aggregate, DType, Level, Normalize, Quantization, Turns


def init(
    db: DB,
    model: Annotated[
        str, typer.Option(help="Causal language model: a local folder, or a name on the Hugging Face hub.")
    ],
    adapter: Annotated[str | None, typer.Option(help="PEFT (LoRA) adapter: a local folder or a hub name.")] = None,
    quantization: Annotated[Quantization, typer.Option(help="How base weights are held; nf4 is QLoRA.")] = "none",
    dtype: Annotated[DType, typer.Option(help="Type of the base weights; auto takes the checkpoint's.")] = "auto",
    width: Annotated[int, typer.Option(help="Length of a RapidGrad, a power of two.")] = 65536,
    shuffles: Annotated[int, typer.Option(help="How often rows and columns are shuffled.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of shuffles and signs.")] = 42,
    normalize: Annotated[
        Normalize, typer.Option(help="Scale each parameter tensor's gradient to norm 1, or not.")
    ] = "layer",
    parameters: Annotated[
        str, typer.Option(help="trainable, all, or a regular expression over parameter names.")
    ] = "trainable",
    template: Annotated[str, typer.Option(help="alpaca, chat, text, or a Jinja file.")] = "alpaca",
    turns: Annotated[
        Turns, typer.Option(help="Which of the assistant's turns have a loss; all goes with --template chat.")
    ] = "last",
    max_tokens: Annotated[int, typer.Option(help="Longer samples are cut from the right.")] = 512,
    epochs: Annotated[float, typer.Option(help="Epochs of the fine-tuning; scores are multiplied by it.")] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the fine-tuning; likewise.")] = 1.0,
    device: Device = "auto",
) -> None:
    """Make a database for a model's training samples.

    Example: rapidin-vdb init db --model ./llama --adapter ./lora --template alpaca
    """
    import rapidin_vdb

    database = rapidin_vdb.init(
        db, model=model, adapter=adapter, quantization=quantization, dtype=dtype, width=width, shuffles=shuffles,
        seed=seed, normalize=normalize, parameters=parameters, template=template, turns=turns,
        max_tokens=max_tokens, epochs=epochs, learning_rate=learning_rate, device=device,
    )  # fmt: skip
    show.created(database)


def index(
    db: DB,
    recipe: Annotated[
        str, typer.Option(help="A file such as indexes/cpu.toml, or the name of one that is shipped.")
    ] = "indexes/cpu.toml",
    level: Annotated[Level, typer.Option(help="Of samples, or of single tokens.")] = "sample",
) -> None:
    """Build a search index, or bring one up to date. A query needs none, and updates one that is built by itself.

    Example: rapidin-vdb index db --recipe indexes/cpu.toml
    """
    import rapidin_vdb

    database = rapidin_vdb.open(db)
    with progress_bars() as progress:
        built = database.index(recipe, level=level, progress=progress)
    show.indexed(built)


def query(
    db: DB,
    prompt: Annotated[str | None, typer.Option(help="What the model was asked, before the template.")] = None,
    generation: Annotated[str | None, typer.Option(help="What the model said.")] = None,
    file: Annotated[Path | None, typer.Option(help="Many queries: records with prompt and generation.")] = None,
    top_k: Annotated[int, typer.Option(help="How many samples to return.")] = 10,
    where: Annotated[str | None, typer.Option(help="SQL filter, applied before the search.")] = None,
    harmful: Annotated[bool, typer.Option("--harmful", help="Rank the most negative influence first.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Both ends: most positive, and most negative.")] = False,
    level: Annotated[
        Level, typer.Option(help="What to rank: samples, or single tokens of those with --token-gradients.")
    ] = "sample",
    focus: Annotated[
        list[str] | None, typer.Option(help="Ask only about this text of the generation; may be given several times.")
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Give every token of the results its exact influence.")
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="The same on each token of the generation; with --json or --html.")
    ] = False,
    refine: Annotated[int, typer.Option(help="Rank this many of the first results again, by exact influence.")] = 0,
    group_by: Annotated[
        str | None, typer.Option(help="Influence of all samples by the values of this column, such as source.")
    ] = None,
    aggregate: Annotated[Aggregate, typer.Option(help="Whether --group-by adds up or averages.")] = "sum",
    index_name: IndexName = None,
    as_of: AsOf = None,
    as_json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to look at: tokens in colours, for every generated token.")
    ] = None,
    device: Device = "auto",
    cluster: Cluster = None,
    model: Moved = None,
    adapter: MovedAdapter = None,
) -> None:
    """Rank the training samples by their influence on a generation.

    Example: rapidin-vdb query db --prompt "Name a fruit." --generation "A comet." --where "split = 'train'"
    """
    import rapidin_vdb
    from rapidin_vdb.query import query_from, read_queries
    from rapidin_vdb.question import Question
    from rapidin_vdb.store import undisturbed

    if (generation is None) == (file is None) or (prompt is not None and file is not None):
        raise typer.BadParameter("give --generation (and --prompt), or --file QUERIES.jsonl")
    check_matrix(matrix, as_json=as_json, html=html)
    if html is not None:
        check_writable(html, level)
    database = rapidin_vdb.open(db)
    asked = read_queries(file) if file is not None else [query_from(prompt, generation or "")]
    question = Question(
        top_k=top_k, where=where, harmful=harmful, both=both, level=level, focus=tuple(focus or ()),
        tokens=tokens or html is not None, matrix=matrix or html is not None, refine=refine, group_by=group_by,
        aggregate=aggregate, index=index_name, as_of=as_of,
    )  # fmt: skip
    with progress_bars() as progress:
        database.prepare(question, model=model, adapter=adapter, device=device)
        if as_json and html is None and not sys.stdout.isatty():
            # Each as soon as it is there: what an interruption or an error cuts off was hours of work.
            answers = database.ask(question, asked, cluster=cluster, progress=progress)
            for ranking, query in zip(answers, asked, strict=True):
                show.ranked([ranking], [query], as_json=True)
            return
        rankings = undisturbed(lambda: list(database.ask(question, asked, cluster=cluster, progress=progress)))()
    if html is not None:
        write_page(html, rankings, title=db)
    # The page shows the words; the terminal does where they were asked for.
    show.ranked(rankings, asked, as_json=as_json, words=tokens)


def show_sample(
    db: DB,
    sample_id: Annotated[str, typer.Argument(metavar="SAMPLE_ID", help="Which sample.")],
    as_json: AsJson = False,
) -> None:
    """Show one sample as it is stored.

    Example: rapidin-vdb show db alpaca-00001
    """
    import rapidin_vdb

    show.sample(rapidin_vdb.open(db).show(sample_id), as_json=as_json)


def info(
    db: DB,
    versions: Annotated[
        bool, typer.Option("--versions", help="List the versions that query --as-of can answer from.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a database holds and what made it.

    Example: rapidin-vdb info db --json
    """
    import rapidin_vdb

    database = rapidin_vdb.open(db)
    if versions:
        show.versions(database.versions(), as_json=as_json)
    else:
        show.info(database.info(), as_json=as_json)


def delete(
    db: DB,
    where: Annotated[str | None, typer.Option(help="SQL filter: what matches is deleted.")] = None,
    ids: Ids = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="Leave nothing of what is deleted in any file; older versions go too.")
    ] = False,
) -> None:
    """Delete samples.

    Example: rapidin-vdb delete db --where "source = 'scraped'"
    """
    import rapidin_vdb

    if (where is None) == (ids is None) and not (purge and where is None):
        raise typer.BadParameter("give --where SQL, or --ids FILE")
    database = rapidin_vdb.open(db)
    wanted = None if ids is None else read_ids(ids, database)
    before = database.bytes if purge else 0
    show.deleted(database.delete(where=where, ids=wanted, purge=purge), wanted)
    if purge:
        show.purged(before - database.bytes)
    typer.echo(f"version {database.version}", err=True)


def verify(db: DB, as_json: AsJson = False) -> None:
    """Read all of a database and say what is wrong; exit 1 if anything is. Damaged indexes are built anew.

    Example: rapidin-vdb verify db
    """
    import rapidin_vdb

    database = rapidin_vdb.open(db)
    with progress_bars() as progress:
        report = database.verify(progress=progress)
    show.verified(report, as_json=as_json)
    if report.findings:
        raise typer.Exit(1)


def demo(
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where to put it [default: a new folder demo-...].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Poison a small model's training data, find the poison from what the model says, and train it without.

    Example: rapidin-vdb demo --dir demo-1
    """
    from rapidin_vdb.demo import run_demo

    with progress_bars() as progress:
        outcome = run_demo(folder, say=lambda text: typer.echo(text, err=as_json), progress=progress)
    if as_json:
        show.json_line(outcome)


def add_to(app: typer.Typer) -> None:
    """Register every command, in the order of a database's life."""
    for function in (init, ingest, index, query, pool, show_sample, info, delete, clean, compare, verify, serve, demo):
        name = function.__name__.removesuffix("_sample")
        goes_on = function in (ingest, index, delete)
        app.command(name=name)(interruptible(function, endless=function is serve, goes_on=goes_on))
