"""Connections whose other end reads nothing any more are ended: their answers would be kept for nobody, for good."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

UNREAD_SECONDS = 60.0


class GivingUp(H11Protocol):
    """HTTP whose connections end where for some time not a byte of what waits to be sent has been taken.

    To wait for the end of a send would not do: an answer in one piece is sent once it lies in the connection's buffer.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._look: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Begin to look whether what is sent is read."""
        super().pause_writing()
        self._look_again()

    def resume_writing(self) -> None:
        """Need not look any more."""
        super().resume_writing()
        self._look_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """Need not look any more."""
        self._look_no_more()
        super().connection_lost(exc)

    def _look_again(self) -> None:
        left = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < left:
                self._look_again()  # slow, but at it
            else:
                self.transport.abort()

        self._look = self.loop.call_later(UNREAD_SECONDS, look)

    def _look_no_more(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
