"""The server: on this machine alone, unless asked otherwise."""

import logging
import math
import re
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from rapidin_vdb.database import Database
from rapidin_vdb.errors import SpecError
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.web.app import make_app
from rapidin_vdb.web.guard import LOOPBACK
from rapidin_vdb.web.unread import GivingUp


def _quiet() -> AbstractContextManager[Progress]:
    return nullcontext(silent)


def serve(
    database: Database, *, host: str = "127.0.0.1", port: int = 8000, writable: bool = False, token: str | None = None,
    served_as: str | None = None, time_limit: float = 300.0, model: str | None = None, adapter: str | None = None,
    device: str = "auto", say: Callable[[str], None], opening: Callable[[], AbstractContextManager[Progress]] = _quiet,
) -> None:  # fmt: skip
    """Answer until interrupted; `model`, `adapter` and `device` are as for `Database.load`.

    The index is opened before anything is answered; `opening` gives what hears of it.

    Raises:
        SpecError: another host than this machine without a token, or an address that cannot be had.
    """
    if host not in LOOPBACK and token is None:
        raise SpecError(
            f"--host {host} is open to others: give --token SECRET too, which every request must carry; or leave "
            "--host out, and put a reverse proxy with https in front, which sees to who may ask (--served-as URL). "
            "Without encryption whoever listens on the network reads the token"
        )
    if token is not None and not re.fullmatch("[!-~]{16,}", token):
        raise SpecError(
            f"--token has {len(token)} characters; wanted 16 or more, and only letters, digits and signs of ASCII, "
            "which a header can carry"
        )
    if not (math.isfinite(time_limit) and time_limit > 0):
        raise SpecError(f"--time-limit is {time_limit}; wanted a number of seconds above 0")
    if not 0 <= port <= 65535:
        raise SpecError(f"--port is {port}; wanted 0 (any that is free) to 65535")
    origin = None if served_as is None else origin_of(served_as)
    # Whoever serves all addresses does not know by which names it is asked; the token stands in for the check.
    everywhere = host in ("0.0.0.0", "::")  # noqa: S104
    hosts = LOOPBACK if host in LOOPBACK else frozenset({"*"}) if everywhere else LOOPBACK | {host.lower()}
    # First: to find the address taken only after the model was loaded would cost minutes.
    with closing(_bound(host, port)) as bound:
        database.load(model=model, adapter=adapter, device=device)
        with opening() as progress:
            database.open_index(progress=progress)
        app = make_app(database, writable=writable, token=token, hosts=hosts, served_as=origin, time_limit=time_limit)
        # Only a proxy is believed when it says where a request comes from, and only one on this machine.
        config = uvicorn.Config(
            app, http=GivingUp, log_level="warning", timeout_keep_alive=30, limit_concurrency=1000,
            proxy_headers=origin is not None, timeout_graceful_shutdown=3,
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        told = f"serving {database.path} on http://{shown}:{bound.getsockname()[1]} (Ctrl-C ends it)"
        if origin is not None and token is None:
            told += (
                f"\nwhoever reaches {origin} can read this database: the proxy must see to who may (or give --token)"
            )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        _Server(config, ready=lambda: say(told), stopping=app.state.stop).run(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket of an address, on which nobody is answered yet.

    Raises:
        SpecError: it cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended still has its last words
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        why = error.strerror or error
        raise SpecError(f"--host {host} --port {port}: this address cannot be had: {why}; give another") from None
    return bound


def origin_of(url: str) -> str:
    """Return the origin of an address, as a browser names it.

    >>> origin_of("https://Rapidin.example.org:443/db/")
    'https://rapidin.example.org'

    Raises:
        SpecError: it is no address of a site.
    """
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        name, port = None, None
    if not name or parts.scheme not in ("http", "https") or parts.username is not None:
        raise SpecError(
            f"--served-as {url}: wanted the public address of the proxy, such as https://rapidin.example.org"
        )
    host = f"[{name}]" if ":" in name else name
    usual = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + ("" if port in (None, usual) else f":{port}")


class _Server(uvicorn.Server):
    """Says that it answers once it does, and lets those who wait know when it ends."""

    def __init__(self, config: uvicorn.Config, *, ready: Callable[[], None], stopping: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready
        self._stopping = stopping

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Begin to listen."""
        try:
            await super().startup(sockets=sockets)
        except OSError as error:
            # Two may be given one address as long as neither listens.
            raise SpecError(f"the address cannot be had any more: {error.strerror or error}; give another") from None
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """End: what is open gets a moment to be told."""
        self._stopping()
        await super().shutdown(sockets=sockets)
