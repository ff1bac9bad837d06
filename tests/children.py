"""Commands in processes of their own, which can be killed, starved, or run beside each other."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import rapidin_vdb


def _child(arguments: list[str], before: Callable | None, folder: str, ready) -> None:
    """Run a command as the program does, with a commit after every few samples; say when all is loaded but the model."""
    import torch

    import rapidin_vdb.creation
    import rapidin_vdb.ingest
    from rapidin_vdb.cli import main

    # Shells let what they run in the background ignore it, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    rapidin_vdb.ingest._COMMIT_BYTES = 1024
    sys.argv = ["rapidin-vdb", *arguments]
    for descriptor, name in ((1, "out"), (2, "err")):
        with Path(folder, name).open("w") as file:
            os.dup2(file.fileno(), descriptor)
    ready.send(True)
    if before is not None:
        before()
    main()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


class Running:
    """A command on its way."""

    def __init__(self, context, arguments, *, before: Callable | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="child-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
        )
        mine, theirs = context.Pipe()
        words = [str(argument) for argument in arguments]
        self.process = context.Process(target=_child, args=(words, before, self._folder.name, theirs))
        self.process.start()
        theirs.close()
        mine.recv()
        self.started = time.monotonic()

    def wait_for(self, words: str) -> str:
        """Wait until it has written a line with these words on stderr, and return what follows on that line."""
        file = Path(self._folder.name, "err")
        while True:
            alive, (_, found, rest) = self.process.is_alive(), file.read_text("utf-8").partition(words)
            if found and "\n" in rest:
                return rest.partition("\n")[0]
            assert alive, file.read_text("utf-8")
            time.sleep(0.02)

    def end(self, *, after: float | None = None, sign: signal.Signals = signal.SIGKILL) -> Ended:
        """Wait for its end; `after` some seconds, a signal is sent to it first."""
        if after is not None:
            self.process.join(after)
            if self.process.is_alive():
                os.kill(self.process.pid, sign)
        self.process.join(300)
        assert self.process.exitcode is not None, "it never ends"
        out, err = (Path(self._folder.name, name).read_text("utf-8") for name in ("out", "err"))
        self._folder.cleanup()
        assert "Traceback" not in err, err
        return Ended(self.process.exitcode, out, err, time.monotonic() - self.started)


def make_context():
    """Processes are forked from one that has the heavy libraries loaded, but not Lance, whose threads do not survive it."""
    context = multiprocessing.get_context("forkserver")
    # The last ones are most of what Lance and the program load besides; without them a process takes 3 s more.
    context.set_forkserver_preload(
        [
            "torch", "transformers", "peft", "numba", "pandas", "rapidin_vdb.gradient", "typer", "rich.progress",
            "transformers.models.llama.modeling_llama", "lance_namespace_urllib3_client.api", "warm",
        ]
    )  # fmt: skip
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else ())])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def content(path) -> dict[tuple, tuple]:
    """Every row with everything in it, further fields last, and the row of every token that counts."""
    database = rapidin_vdb.open(path)
    snapshot, tokens = database._table.snapshot(), database._table.tokens.snapshot()
    hashes = dict(snapshot.each_content())
    fields = {name: dict(sample.metadata) for name, sample in snapshot.samples(list(hashes)).items()}
    rows = {}
    for row, vector, _ in [*snapshot.whole_rows(), *(tokens.whole_rows() if tokens is not None else ())]:
        name, number = row["sample_id"], row.get("token_index")
        if number is not None and hashes.get(name) != row["content_hash"]:
            continue  # of a sample that is not there yet, or not any more: nobody sees it
        assert (name, number) not in rows, "no row stands twice"
        further = fields[name] if number is None else {}
        rows[name, number] = (repr(sorted(row.items(), key=lambda pair: pair[0])), vector.tobytes(), further)
    return rows


def check(path) -> None:
    """All is as it was written."""
    report = rapidin_vdb.open(path).verify()
    assert report.findings == (), report.findings
