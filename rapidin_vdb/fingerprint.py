"""The check that vectors may meet: whether two fingerprints are of what is made alike."""

import dataclasses

from rapidin_vdb.errors import FingerprintError
from rapidin_vdb.records import Fingerprint

_NOT_COMPARED = frozenset({"model", "adapter", "versions", "epochs", "learning_rate", "parameters"})


def check_fingerprint(stored: Fingerprint, here: Fingerprint, *, place: str) -> None:
    """Refuse to let vectors meet that were not made alike.

    Raises:
        FingerprintError: names every field that differs.
    """
    differing = [
        _difference(field.name, getattr(stored, field.name), getattr(here, field.name))
        for field in dataclasses.fields(Fingerprint)
        if field.name not in _NOT_COMPARED and getattr(stored, field.name) != getattr(here, field.name)
    ]
    if differing:
        raise FingerprintError(
            f"{place} was made with another fingerprint: {'; '.join(differing)}. Use the model it was made with "
            f"({stored.model}{' + ' + stored.adapter if stored.adapter else ''}), or make a new database with: "
            "rapidin-vdb init"
        )


def _difference(name: str, stored: object, here: object) -> str:
    if name == "theta":
        return "theta differs in names or shapes of its parameters"
    pairs = enumerate(zip(repr(stored), repr(here), strict=False))
    alike = next((place for place, (one, other) in pairs if one != other), 0)
    return f"{name} is {_short(stored, alike)} in the database, {_short(here, alike)} here"


def _short(value: object, alike: int) -> str:
    """Return a value in few characters, from a little before the place at which it differs from another."""
    text = repr(value)
    start = max(alike - 20, 0) if len(text) > 60 else 0
    end = start + 57
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
