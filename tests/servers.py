"""Servers in threads of the test's own process, on this machine alone."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from rapidin_vdb.web.unread import GivingUp


@contextmanager
def listening(app, *, port: int = 0) -> Iterator[int]:
    """Yield the port on which an app answers: a socket that is bound refuses whoever comes before the server listens."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", http=GivingUp)
    server, bound = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it answered"
            time.sleep(0.01)
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
