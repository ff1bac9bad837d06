"""A worker's own end: it loads the model, answers batches, and hands on what it logs."""

import logging
import os
import pickle
import signal
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

from rapidin_vdb.compute import BatchMaker, Result, WorkerSpec, device_error, load_of, use_threads
from rapidin_vdb.errors import RapidInError
from rapidin_vdb.worker_log import Teller, Told


class Loaded:
    """A worker has its model."""


class _Line:
    """A worker's end of its pipe: what it answers, and what it logs, which the parent knows where to put."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._alone = Lock()  # libraries have threads that log

    def send(self, told: Any) -> None:
        with self._alone:
            self._pipe.send(told)

    def tell(self, told: Told) -> None:
        with suppress(OSError):  # the parent is gone
            self.send(told)


def work(pipe: Connection, spec: WorkerSpec, levels: Mapping[str, int]) -> None:
    """Run in a worker: load the model, then answer batches until the other end closes, or the answer is an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    use_threads(spec.threads)
    line = _Line(pipe)
    logging.getLogger().addHandler(Teller(line.tell))
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    maker = None
    try:
        while True:
            batch = pipe.recv()
            answer: list[Result] | Exception
            try:
                if maker is None:
                    maker = BatchMaker(load_of(spec), token_width=spec.token_width)
                    line.send(Loaded())
                answer = maker.make(batch)
            except Exception as error:
                answer = _sendable(device_error(error, spec.device) or error, error)
            line.send(answer)
            if isinstance(answer, Exception):
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is done, or gone


def _sendable(error: Exception, met: Exception) -> Exception:
    """Return an error that the parent can raise: one that is not ours brings where what it tells of was met."""
    if isinstance(error, RapidInError):
        return error
    where = "in a worker:\n" + "".join(traceback.format_exception(met))
    try:
        sent: Exception = pickle.loads(pickle.dumps(error))  # noqa: S301 - what has just been written
    except Exception:
        # Not all errors of libraries survive it.
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note(where)
    return sent
