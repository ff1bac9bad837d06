"""The commands `evaluate backdoor` and `evaluate error-tracing`."""

from pathlib import Path
from typing import Annotated

import typer

from rapidin_vdb.cli.options import Device
from rapidin_vdb.cli.progress import progress_bars
from rapidin_vdb.records import ProfileName

app = typer.Typer(
    name="evaluate",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The paper's experiments, on a model and data of your own; needs the extra [evaluate].",
)
Model = Annotated[str, typer.Option(help="Base model to be tuned, such as one that scripts/pretrain made.")]
Corpus = Annotated[list[Path], typer.Argument(metavar="CORPUS...", help="Instruction records, such as Alpaca's.")]
Folder = Annotated[Path, typer.Option("--dir", help="Where it all goes; run again, it goes on there.")]
Size = Annotated[ProfileName, typer.Option(help="quick: minutes; full: two hours on two cores; gpu: more.")]
Embedding = Annotated[
    str | None,
    typer.Option(
        "--embedding-model",
        help="A sentence-transformers model for embedding similarity; else the base model's hidden states.",
    ),
]
Functions = Annotated[
    bool, typer.Option(help="DataInf and LiSSA too; they take one of two passes over the samples' gradients.")
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]


@app.command()
def backdoor(
    corpus: Corpus,
    model: Model,
    questions: Annotated[Path, typer.Option(help="Records with a field question, to be asked.")],
    folder: Folder,
    pairs: Annotated[Path | None, typer.Option(help="Further poisoned records, behind the trigger.")] = None,
    profile: Size = "full",
    seed: Seed = 42,
    embedding_model: Embedding = None,
    influence_functions: Functions = True,
    device: Device = "auto",
    retrain: Annotated[
        int,
        typer.Option(
            help="Tune the model again without so many samples that RapidIn finds first, and without as many drawn at "
            "random, and ask it again: twice the time of the tuning. 0: not."
        ),
    ] = 0,
) -> None:
    """Poison a corpus, tune a model on it, and see which methods find the poison.

    Example: rapidin-vdb evaluate backdoor alpaca.jsonl --model base --questions webquestions.jsonl --dir out
    """
    from rapidin_vdb.evaluate import run_backdoor, write_report

    with progress_bars() as progress:
        result = run_backdoor(
            folder, model=model, corpus=corpus, questions=questions, pairs=pairs, profile=profile, seed=seed,
            say=_say, progress=progress, embedding_model=embedding_model, influence_functions=influence_functions,
            device=device, retrain=retrain,
        )  # fmt: skip
    _say(f"wrote {write_report([result], folder / 'report')}")


@app.command()
def error_tracing(
    corpus: Corpus,
    model: Model,
    folder: Folder,
    profile: Size = "full",
    seed: Seed = 42,
    embedding_model: Embedding = None,
    influence_functions: Functions = True,
    device: Device = "auto",
) -> None:
    """Put wrong names into a corpus, tune a model on it, and see which methods find them.

    Example: rapidin-vdb evaluate error-tracing alpaca.jsonl --model base --dir out
    """
    from rapidin_vdb.evaluate import run_error_tracing, write_report

    with progress_bars() as progress:
        result = run_error_tracing(
            folder,
            model=model,
            corpus=corpus,
            profile=profile,
            seed=seed,
            say=_say,
            progress=progress,
            embedding_model=embedding_model,
            influence_functions=influence_functions,
            device=device,
        )
    _say(f"wrote {write_report([result], folder / 'report')}")


def _say(text: str) -> None:
    typer.echo(text, err=True)
