"""What becomes of an ingest that waits for another process which writes to the database."""

import logging
import time
from collections.abc import Callable

from rapidin_vdb.web.lines import Job, stopping

logger = logging.getLogger(__name__)

WAITS = "waiting"
"""The stage of progress in which it is."""
LAST_SECONDS = 5.0
"""After the server was told to stop, what has been computed waits so long before it is let go."""
_WORD_SECONDS = 1.0


class Patience:
    """What is done between two looks at the lock of the database: others are let in, or it ends."""

    def __init__(self, job: Job, *, make_way: Callable[[Job], bool], stopped: Callable[[], float]) -> None:
        """Wait for a job; `make_way` lets others in, and `stopped` is when the server was told to stop, or infinity."""
        self._job = job
        self._make_way = make_way
        self._stopped = stopped
        self._told = 0.0
        self._lost = False

    def __call__(self, keeping: bool) -> bool:
        """Let others in, and say whether there were any.

        Raises:
            BusyError: the server is stopping.
            CancelledError, LateError: nobody waits for it any more, and nothing was computed that is to be kept.
        """
        now, stopped = time.monotonic(), self._stopped()
        if keeping and self._job.patient:
            # Also where nobody waits for it any more: what it has computed is to be kept, if not for ever.
            if now > stopped + LAST_SECONDS:
                self._tell_of_loss()
                raise stopping()
        elif now >= stopped:
            raise stopping()
        else:
            self._job.check()
        if now > self._told + _WORD_SECONDS and not self._job.cancelled:
            self._told = now
            self._job.progress(WAITS, 0, 0)
        return self._make_way(self._job)

    def _tell_of_loss(self) -> None:
        if not self._lost:
            logger.warning(
                "another process is still writing to the database: what an ingest has computed since its last commit "
                "is lost, for the server ends; give the same records again"
            )
        self._lost = True
