"""What the server counts about itself, in Prometheus' text format."""

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from rapidin_vdb.web.guard import Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters of one server."""

    TYPE = CONTENT_TYPE_PLAIN_0_0_4
    """Content type of the text."""

    def __init__(
        self, *, samples: Callable[[], float], waiting: Callable[[], float], reading: Callable[[], float]
    ) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("rapidin_requests", "Requests answered.", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "rapidin_request_seconds", "From request to answer.", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self._together = Histogram(
            "rapidin_together",
            "Requests answered by one piece of work.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self._registry,
        )
        self._work = Counter(
            "rapidin_work_seconds", "Time that the model and the index were busy.", registry=self._registry
        )
        Gauge("rapidin_samples", "Samples in the database.", registry=self._registry).set_function(samples)
        Gauge("rapidin_waiting", "Requests that wait.", registry=self._registry).set_function(waiting)
        Gauge(
            "rapidin_reads", "Reads and exports under way or waiting, of the table alone.", registry=self._registry
        ).set_function(reading)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def worked(self, together: int, seconds: float) -> None:
        """Count a piece of work."""
        self._together.observe(together)
        self._work.inc(seconds)

    def text(self) -> bytes:
        """Return all of them."""
        return generate_latest(self._registry)


class Counted:
    """Counts every request, also those that are refused or fail, and times answers to their last byte."""

    def __init__(self, app: Any, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500  # unless an answer begins

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(route, status, time.monotonic() - started)
