"""The command `compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rapidin_vdb.cli.options import DB, AsJson, Device, Moved, MovedAdapter
from rapidin_vdb.cli.progress import progress_bars
from rapidin_vdb.cli.show import json_line
from rapidin_vdb.cli.text import columns, cut, padded, printable
from rapidin_vdb.results import Comparison

_COLUMNS = 80


def compare(
    db: DB,
    prompt: Annotated[str | None, typer.Option(help="What the model was asked, before the template.")] = None,
    generation: Annotated[str | None, typer.Option(help="What the model had said.")] = None,
    file: Annotated[Path | None, typer.Option(help="Many of them: records with prompt and generation.")] = None,
    new_model: Annotated[str | None, typer.Option(help="A model that was trained anew.")] = None,
    new_adapter: Annotated[
        str | None, typer.Option(help="An adapter that was trained anew, on the database's model or --new-model.")
    ] = None,
    focus: Annotated[
        list[str] | None, typer.Option(help="Look only at this text of the generation; may be given several times.")
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(help="Have the new model answer each prompt too, in so many tokens at most.")
    ] = 0,
    as_json: AsJson = False,
    device: Device = "auto",
    model: Moved = None,
    adapter: MovedAdapter = None,
) -> None:
    """Say how likely generations are for a model that was trained anew, beside the database's own.

    Example: rapidin-vdb compare db --new-adapter ./retrained --file queries.jsonl
    """
    import rapidin_vdb

    if (generation is None) == (file is None) or (prompt is not None and file is not None):
        raise typer.BadParameter("give --generation (and --prompt), or --file QUERIES.jsonl")
    with progress_bars() as progress:
        found = rapidin_vdb.open(db).compare(
            prompt, generation, file=file, new_model=new_model, new_adapter=new_adapter, focus=focus,
            answer_tokens=answer_tokens, model=model, adapter=adapter, device=device, progress=progress,
        )  # fmt: skip
    if as_json:
        for one in found:
            json_line(one.to_dict())
    else:
        _table(found)
    _summed_up(found)


def _table(found: Sequence[Comparison]) -> None:
    wide = min(max(len("query_id"), *(columns(printable(one.query_id)) for one in found)), 24)
    head = f"{'tokens':>6}  {'before':>8}  {'after':>8}  {'query_id':<{wide}}  "
    typer.echo(f"{head}generation")
    for one in found:
        name = padded(cut(one.query_id, wide), wide)
        line = f"{len(one.tokens):>6}  {one.loss_before:>8.3f}  {one.loss_after:>8.3f}  {name}  "
        typer.echo(line + cut(one.generation, max(_COLUMNS - columns(line), 14)))
        if one.answer is not None:
            says = " " * (len(head) - 5) + "now: "
            typer.echo(says + (cut(one.answer, max(_COLUMNS - len(says), 14)) or "(nothing)"))


def _summed_up(found: Sequence[Comparison]) -> None:
    less, same = (sum(test(one.change) for one in found) for test in (lambda by: by > 0, lambda by: by == 0))
    before, after = (sum(losses) / len(found) for losses in _losses(found))
    what = "1 generation is" if less == 1 else f"{less:,} generations are"
    typer.echo(
        f"{what} less likely now, of {len(found):,}; the loss is {before:.3f} before and {after:.3f} after (nats a "
        "token, mean over generations)",
        err=True,
    )
    if cut_short := sum(one.truncated for one in found):
        typer.echo(f"{cut_short:,} of them were cut to the database's limit of tokens (init --max-tokens)", err=True)
    if same == len(found):
        typer.echo("every loss is the same: is this the model that was trained anew?", err=True)


def _losses(found: Sequence[Comparison]) -> tuple[list[float], list[float]]:
    return [one.loss_before for one in found], [one.loss_after for one in found]
