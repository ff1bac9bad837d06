"""The command `serve`."""

from typing import Annotated

import typer

from rapidin_vdb.cli.options import DB, Device, Moved, MovedAdapter
from rapidin_vdb.errors import SpecError

_EXTRA = ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn")


def serve(
    db: DB,
    host: Annotated[
        str, typer.Option(help="Address to answer on; another than this machine needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to answer on; 0 takes a free one.")] = 8000,
    writable: Annotated[
        bool, typer.Option("--writable", help="Let records be added, and put in the place of others, over HTTP.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(envvar="RAPIDIN_TOKEN", help="Secret that every request must carry, of 16 characters or more."),
    ] = None,
    served_as: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Public address of a reverse proxy in front, which sees to who may ask."),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that a request may take, waiting included.")] = 300.0,
    device: Device = "auto",
    model: Moved = None,
    adapter: MovedAdapter = None,
) -> None:
    """Answer on HTTP: a page to look at, and a JSON API; needs the extra [web].

    Example: rapidin-vdb serve db --port 8000
    """
    import rapidin_vdb
    from rapidin_vdb.cli.progress import progress_bars

    try:
        from rapidin_vdb.web import serve as answer
    except ImportError as error:  # also of one that is too old
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise SpecError(f"serve needs the extra [web]: pip install 'rapidin-vdb[web]' ({error})") from error
    answer(
        rapidin_vdb.open(db), host=host, port=port, writable=writable, token=token, served_as=served_as,
        time_limit=time_limit, device=device, model=model, adapter=adapter, say=lambda text: typer.echo(text, err=True),
        opening=progress_bars,
    )  # fmt: skip
