"""The errors a user can meet; anything else that escapes is a bug and keeps its traceback.

RapidInError
  CorpusError            a training record cannot be read or encoded
  ModelError             a model, adapter or tokenizer cannot be loaded
    ModelNotFoundError     it is not where it was looked for, or not all of it
  GradientError          a sample gave no gradient, or one that is not finite
    MemoryTakenError       the memory that there was before is taken by something else
  TableError             a database cannot be read or written
    TableNotFoundError     no database at this place
    SampleNotFoundError    no sample of that id
    TableExistsError       a database is already at this place
    FingerprintError       the vectors were made with another model, template or sketch
    FilterError            a --where filter cannot be understood
    PurgedError            the version that was being read is gone
    OvertakenError         another writer took over; nothing was lost, and the same command goes on
    UnfitError             what was asked, or is to be added, does not fit what a database holds
  ScratchError           what a command keeps among temporary files cannot be kept
  SpecError              a sketch spec, an index recipe or an argument cannot be honoured
    UnreadableIndexError   a built index cannot be read now; its files need not be damaged
"""

import errno
import re
import tempfile

# With one slash it is an address that was taken for a path.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/\S*[^\s:;,.]")


class RapidInError(Exception):
    """Any error of ours: says what was found, what was wanted and what to type next. Each argument is a line of it."""

    def __str__(self) -> str:
        """Return all of its lines.

        >>> print(CorpusError("a.jsonl, line 2: no response", "a.jsonl, line 5: no response"))
        a.jsonl, line 2: no response
        a.jsonl, line 5: no response
        """
        return "\n".join(map(str, self.args))


class CorpusError(RapidInError):
    """A training record cannot be read or encoded."""


class ModelError(RapidInError):
    """A model, adapter or tokenizer cannot be loaded."""


class ModelNotFoundError(ModelError):
    """A model, an adapter or a tokenizer is not where it was looked for, or not all of it is."""


class GradientError(RapidInError):
    """A sample gave no gradient, or one that is not finite."""


class MemoryTakenError(GradientError):
    """The memory that there was for others like it is taken, by something else; it may be free again."""


class TableError(RapidInError):
    """A database cannot be read or written."""


class TableNotFoundError(TableError):
    """No database at this place."""


class SampleNotFoundError(TableError):
    """No sample of that id."""


class TableExistsError(TableError):
    """A database is already at this place."""


class FingerprintError(TableError):
    """The vectors were made with another model, template or sketch."""


class FilterError(TableError):
    """A --where filter cannot be understood."""


class PurgedError(TableError):
    """The version that was being read is gone: a purge removed it."""


class OvertakenError(TableError):
    """Another writer took over meanwhile: nothing was lost, and the same command again goes on."""


class UnfitError(TableError):
    """What was asked, or is to be added, does not fit what a database holds: no such version, another type, nothing."""


class ScratchError(RapidInError):
    """What a command keeps among temporary files cannot be kept: their folder is full, or cannot be written."""


class SpecError(RapidInError):
    """A sketch spec, an index recipe or an argument cannot be honoured."""


class UnreadableIndexError(SpecError):
    """A built index cannot be read now; its files need not be damaged."""


def check_unicode(text: str | None, what: str) -> None:
    """Refuse a text that is none, as of bytes on the command line that are no UTF-8.

    Raises:
        SpecError: it is none.
    """
    if text is not None and not is_unicode(text):
        raise SpecError(f"{what} is {text!r}, which is no valid Unicode; give it in UTF-8")


def is_unicode(text: str) -> bool:
    """Say whether a text has no half of a surrogate pair.

    >>> is_unicode("\\u9ec4"), is_unicode("\\udc80")
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def no_scratch(what: str, error: Exception, *, folder: str | None = None, variable: str = "TMPDIR") -> ScratchError:
    """Return the error that something cannot be kept among temporary files: where they are, and what can be done.

    `folder` is where they are, if not where Python puts them; `variable` is that of the environment which names it.
    """
    try:
        folder = folder or tempfile.gettempdir()
    except FileNotFoundError:
        folder = "the folder for them"  # none that Python knows of can be written
    why = (isinstance(error, OSError) and error.strerror) or error  # without the name of a file that has none for long
    return ScratchError(
        f"{what} cannot be kept: {why}. Make room in {folder}, or name a folder that has some, and can be written, "
        f"with {variable}=FOLDER"
    )


def out_of_handles(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came of, is that no more files can be opened."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def out_of_room(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came of, is that a disk is full, or a share of it that was allowed."""
    while error is not None:
        # Lance's has no number; and texts of ours may quote what was asked.
        said = not isinstance(error, RapidInError) and "No space left on device" in str(error)
        if said or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def out_of_reach(error: OSError) -> bool:
    """Return whether an error is of the system that reads a file, and says nothing of what is in it."""
    known = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EIO)
    return error.errno in known


def without_secrets(uri: str) -> str:
    """Return an address without what may be a password, a key or a token.

    >>> without_secrets("s3://key:sec/ret@bucket/db?token=secret#x")
    's3://***@bucket/db?***'
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        # As a path it has lost a slash.
        scheme, separator, rest = uri.partition(":/")
    # Keys may hold any sign, so that whatever stands before an @ is taken for one.
    _, at, rest = rest.rpartition("@")
    name, question, _ = rest.partition("?")
    return scheme + separator + ("***@" if at else "") + name + ("?***" if question else "")


def shown(text: str, *, lines: bool = False) -> str:
    """Return a message as a terminal may have it: control characters spelt out, no secrets in addresses.

    It is one line, unless it may have several.

    >>> shown("s3://key:secret@host/x: red \\x1b[31m")
    's3://***@host/x: red \\\\x1b[31m'
    """
    safe = _ADDRESS.sub(lambda found: without_secrets(found[0]), text)
    return "".join(
        character if character.isprintable() or (lines and character == "\n") else repr(character)[1:-1]
        for character in safe
    )
