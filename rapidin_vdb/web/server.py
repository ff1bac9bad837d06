"""The server: on this machine alone, unless asked otherwise."""

import logging
from collections.abc import Callable
from typing import Any

import uvicorn

from rapidin_vdb.database import Database
from rapidin_vdb.errors import SpecError
from rapidin_vdb.web.app import make_app
from rapidin_vdb.web.guard import LOOPBACK


def serve(
    database: Database, *, host: str = "127.0.0.1", port: int = 8000, writable: bool = False, token: str | None = None,
    time_limit: float = 300.0, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Answer until interrupted.

    Raises:
        SpecError: another host than this machine without a token, or an address that cannot be had.
    """
    if host not in LOOPBACK and token is None:
        raise SpecError(
            f"--host {host} is open to others: give --token SECRET too, which every request must carry; without "
            "encryption whoever listens on the network reads it, so put a reverse proxy with https in front"
        )
    if token is not None and len(token) < 16:
        raise SpecError(f"--token has {len(token)} characters; wanted 16 or more")
    # Whoever serves all addresses does not know by which names it is asked; the token stands in for the check.
    everywhere = host in ("0.0.0.0", "::")  # noqa: S104
    hosts = LOOPBACK if host in LOOPBACK else frozenset({"*"}) if everywhere else LOOPBACK | {host.lower()}
    database.load()
    app = make_app(database, writable=writable, token=token, hosts=hosts, time_limit=time_limit)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_keep_alive=30, limit_concurrency=1000
    )
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise SpecError(f"--host {host} --port {port}: this address cannot be had; give another port") from None
    shown = f"[{host}]" if ":" in host else host
    told = f"serving {database.path} on http://{shown}:{socket.getsockname()[1]} (Ctrl-C ends it)"
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    _Server(config, ready=lambda: say(told)).run(sockets=[socket])


class _Server(uvicorn.Server):
    """Says that it answers once it does."""

    def __init__(self, config: uvicorn.Config, *, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()
