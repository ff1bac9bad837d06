"""The errors a user can meet; anything else that escapes is a bug and keeps its traceback.

RapidInError
  CorpusError            a training record cannot be read or encoded
  ModelError             a model, adapter or tokenizer cannot be loaded
  GradientError          a sample gave no gradient, or one that is not finite
  TableError             a database cannot be read or written
    TableNotFoundError     no database at this place
    SampleNotFoundError    no sample of that id
    TableExistsError       a database is already at this place
    FingerprintError       the vectors were made with another model, template or sketch
    FilterError            a --where filter cannot be understood
  SpecError              a sketch spec, an index recipe or an argument cannot be honoured
"""


class RapidInError(Exception):
    """Any error of ours: says what was found, what was wanted and what to type next."""


class CorpusError(RapidInError):
    """A training record cannot be read or encoded."""


class ModelError(RapidInError):
    """A model, adapter or tokenizer cannot be loaded."""


class GradientError(RapidInError):
    """A sample gave no gradient, or one that is not finite."""


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


class SpecError(RapidInError):
    """A sketch spec, an index recipe or an argument cannot be honoured."""


def without_secrets(uri: str) -> str:
    """Return an address without what may be a password, a key or a token.

    >>> without_secrets("s3://key:secret@bucket/db?token=secret#x")
    's3://***@bucket/db?***'
    """
    scheme, separator, rest = uri.partition("://")
    before, question, _ = rest.partition("?")
    host, slash, path = before.partition("/")
    name = "***@" + host.rpartition("@")[2] if "@" in host else host
    return scheme + separator + name + slash + path + ("?***" if question else "")
