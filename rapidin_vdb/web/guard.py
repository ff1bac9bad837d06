"""Who may ask, and what: hosts, origins, tokens, sizes; and the headers of every answer."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from rapidin_vdb.web.document import guarded

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """Lets through only what comes from this machine's own page or from whoever knows the token.

    A name that was pointed at this machine by a stranger (DNS rebinding) has another Host; another site's page has
    another Origin; and both lack the token, where there is one.
    """

    def __init__(
        self, app: Any, *, hosts: frozenset[str], token: str | None, most_bytes: int, body_seconds: float,
        served_as: str | None = None,
    ) -> None:  # fmt: skip
        """Guard an application; `served_as` is the public origin of a reverse proxy in front of it."""
        self._app = app
        self._origin = served_as
        self._hosts = hosts if served_as is None else hosts | {_name_of(urlsplit(served_as).netloc)}
        self._token = token
        self._most_bytes = most_bytes
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in names)]
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(sent, *refusal)
            return
        try:
            messages = await asyncio.wait_for(self._read(receive), self._body_seconds)
        except TimeoutError:
            await _answer(sent, 408, f"the request did not arrive whole within {self._body_seconds:g} seconds")
            return
        if messages is None:
            await _answer(sent, 413, f"the request is larger than {self._most_bytes:,} bytes")
            return

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        try:
            await self._app(scope, again, sent)
        except asyncio.CancelledError:
            # The server is stopping, and this took too long: the connection ends, without a traceback.
            if not begun:
                await _answer(sent, 503, "the server is stopping")
        except Exception:
            # Whatever went wrong, its traceback is for the log, and the answer has the headers of all others.
            if not begun:
                await _answer(sent, 500, "something went wrong in the server; its log says what")
            raise

    async def _read(self, receive: Receive) -> list[Message] | None:
        """Return all messages of a request; None where they are too large together."""
        messages, read = [], 0
        while True:
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                return None
            messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body"):
                return messages

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if "*" not in self._hosts and _name_of(host) not in self._hosts:
            return (
                421,
                f"the host {host!r} is not served here; start the server with --host to serve another, or with "
                "--served-as behind a reverse proxy",
            )
        reading = scope["method"] in ("GET", "HEAD")
        if not self._is_own(headers.get("origin"), host):
            return 403, "the request comes from another site's page"
        # A link on another site's page may lead to the page, which holds nothing of the database and cannot be framed.
        followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not (
            reading and followed and scope["path"] == "/"
        ):
            return 403, "the request comes from another site's page"
        if not reading and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A page of another site can send forms without asking, but no JSON.
            return 415, "wanted content-type: application/json"
        if self._token is not None and guarded(scope["path"]):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # The name of the scheme may be written in any case.
            right = hmac.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.lower() != "bearer" or not right:
                return (
                    401,
                    "wanted the header Authorization: Bearer TOKEN, with the token that the server was started with",
                )
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return 400, "content-length is no number"
        if int(length) > self._most_bytes:
            return 413, f"the request is larger than {self._most_bytes:,} bytes"
        return None

    def _is_own(self, origin: str | None, host: str) -> bool:
        """Say whether an Origin is none, that of the page that is served here, or that of the proxy in front."""
        if origin is None or (self._origin is not None and origin.lower() == self._origin):
            return True
        if self._origin is not None and host.lower() == urlsplit(self._origin).netloc:
            return False  # the proxy's name, but not under the scheme that it serves
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False


def _name_of(host: str) -> str:
    """Return a Host header's name without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


async def _answer(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 408:
        headers.append((b"connection", b"close"))  # the rest may still come
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
