"""A new file is written whole or not at all, and nothing is written over."""

import errno
import gzip
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from rapidin_vdb.errors import SpecError


@contextmanager
def new_file(out: Path) -> Iterator[IO[bytes]]:
    """Open a new file under another name, and give it its own once all of it is on the disk; compressed, if `.gz`.

    Raises:
        SpecError: `out` is there already, or cannot be written. Or somebody else has made it meanwhile: what was
            written is kept beside it.
    """
    taken = False
    if os.path.lexists(out):
        raise SpecError(f"--out is {out}, which is there already; give another name, or remove it first")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise SpecError(f"--out is {out}, which cannot be written: {error.strerror}") from error
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as raw:
            if out.suffix.lower() == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw) as file:
                    yield cast(IO[bytes], file)
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        partial.chmod(0o666 & ~_umask())
        try:
            _give_name(partial, out)
        except FileExistsError as error:
            taken = True
            raise SpecError(
                f"--out is {out}, which somebody else made meanwhile, and which was left as it is; all that was to be "
                f"written there is in {partial}: give it another name"
            ) from error
    except OSError as error:
        raise SpecError(f"--out is {out}, which cannot be written: {error.strerror or error}") from error
    finally:
        if not taken:
            partial.unlink(missing_ok=True)


def _give_name(partial: Path, out: Path) -> None:
    """Give a file its own name, for good.

    Raises:
        FileExistsError: another file has it.
    """
    try:
        os.link(partial, out)
    except FileExistsError:
        raise
    except OSError:
        # Not every file system knows a second name of one file. An empty file keeps the name until the rename.
        os.close(os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            partial.replace(out)
        except OSError:
            out.unlink()
            raise
    else:
        partial.unlink()
    try:
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Nor can every one be asked for a folder's entries to be on the disk.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
