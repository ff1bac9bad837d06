"""What Lance raises, told as errors of ours; and readings that a purge interrupts, begun again."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa

from rapidin_vdb.errors import OvertakenError, PurgedError, TableError, UnfitError, out_of_handles
from rapidin_vdb.store.columns import check_out
from rapidin_vdb.store.fingerprint import read_identity
from rapidin_vdb.store.place import Place

P = ParamSpec("P")
T = TypeVar("T")

_TRIES = 5
# What Lance says where the version that was to be changed is not the newest any more.
_CAME_BETWEEN = ("incompatible with concurrent transaction Restore", "Too many concurrent writers")
# What object stores answer, and what that means to whoever asked; the first that is found.
_ANSWERS = (
    ("NoSuchBucket", "there is no such bucket: make it, or mend its name"),
    ("ContainerNotFound", "there is no such container: make it, or mend its name"),
    ("ExpiredToken", "the credentials have run out: get new ones"),
    ("InvalidAccessKeyId", "the store does not know this key: check the credentials, and the endpoint"),
    ("SignatureDoesNotMatch", "the secret does not fit the key: check the credentials"),
    ("status code: 401", "the store asks for credentials: check that there are some, and what they allow"),
    ("status code: 403", "the store refuses it: check the credentials, and what they allow"),
)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what Lance raises into an error of ours: a full disk, a missing file, a commit that lost a race."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, pa.ArrowException) as error:
        kind = OvertakenError if any(sign in str(error) for sign in _CAME_BETWEEN) else TableError
        raise kind(f"{what}: {_explained(error)}") from error
    except BaseException as error:
        if type(error).__module__.startswith("obstore"):
            raise TableError(f"{what}: {_explained(error)}") from error
        if not is_panic(error):
            raise
        why = first_line(error) if out_of_handles(error) else f"it is damaged: {first_line(error)}"
        raise TableError(f"{what}: {why}") from error


def may_pass(error: TableError) -> bool:
    """Say whether what went wrong may go right a little later: a store or a network that is away, another writer."""
    if isinstance(error, OvertakenError):
        return True
    cause = error.__cause__
    if cause is None or isinstance(error, UnfitError) or isinstance(cause, pa.ArrowException) or is_panic(cause):
        return False  # said by our own code, or of what was to be written
    # In all of what was said: what is told of it is shortened.
    return not any(sign in str(cause) for sign, _ in _ANSWERS if sign != "ExpiredToken")


def is_panic(error: BaseException) -> bool:
    """Say whether Lance's own code came to a stop, as over damaged files; such errors are of no ordinary kind."""
    return type(error).__name__ in ("RustPanic", "PanicException")


def _explained(error: BaseException) -> str:
    """Return the first line, after what it means where an object store said it, or where a fence came between."""
    text, line = str(error), first_line(error)
    if any(sign in text for sign in _CAME_BETWEEN):
        return f"another writer took over meanwhile. Nothing was lost; run the same command again to go on ({line})"
    meant = [meaning for answer, meaning in _ANSWERS if answer in text] if "status code: " in text else []
    return f"{meant[0]} ({line})" if meant else line


def is_refused(error: BaseException) -> bool:
    """Say whether an error came of a permission that is missing."""
    cause = error.__cause__
    return isinstance(cause, PermissionError) or type(cause).__name__ in (
        "PermissionDeniedError",
        "UnauthenticatedError",
    )


def undisturbed(read: Callable[P, T]) -> Callable[P, T]:
    """Return a function that reads the newest version, and begins again where a purge took that away meanwhile."""

    @wraps(read)
    def again(*arguments: P.args, **options: P.kwargs) -> T:
        for _ in range(_TRIES - 1):
            try:
                return read(*arguments, **options)
            except PurgedError:
                continue
        return read(*arguments, **options)

    return again


def undisturbed_each(read: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """Return the like for a function that yields; once something was handed out, it does not begin again."""

    @wraps(read)
    def again(*arguments: P.args, **options: P.kwargs) -> Iterator[T]:
        for attempt in range(_TRIES):
            begun = False
            try:
                for entry in read(*arguments, **options):
                    begun = True
                    yield entry
                return
            except PurgedError:
                if begun or attempt == _TRIES - 1:
                    raise

    return again


def same_database(table: Any, identity: str, place: Place) -> Any:
    """Return a table that was opened anew, if its database is the one that was opened first.

    Raises:
        TableError: it was removed meanwhile, and another made there, perhaps with another model.
    """
    if read_identity(table.schema.metadata, place=place.uri) != identity:
        raise TableError(f"another database was made at {place} meanwhile; nothing of this one is there: open it anew")
    return table


def pinned(place: Place, name: str) -> Any:
    """Return a table at its newest committed version that counts, which stays the one that is read."""
    for attempt in range(_TRIES):
        table = place.open_table(name)
        try:
            check_out(table, place.counting(name, int(table.version)))
            return table
        except (ValueError, RuntimeError, OSError):
            # A purge may take it away between the two.
            if attempt == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def first_line(error: BaseException) -> str:
    """Return what Lance says, without the place in its source where it says so, and without a store's whole answer."""
    text = " ".join(str(error).split())
    # Lance ends its messages with the place in its own source.
    for mark in (
        ": <?xml",
        ": <html",
        " Debug source:",
        ", /root/",
        ", /home/",
        ", rust/",
        " Rust backtrace",
        ", C:\\",
    ):
        text = text.split(mark)[0]
    # An address may end with a signature.
    return re.sub(r"\?[^\s)]*", "", text)[:300] if "://" in text else text[:300]
