"""What an experiment is of, so that its folder is gone on with for the same one only, and what is checked at once."""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidin_vdb.errors import SpecError
from rapidin_vdb.evaluate.profiles import Profile
from rapidin_vdb.machine import free_bytes

Plan = dict[str, Any]
_EXTRA = ("bm25s", "matplotlib", "scipy", "sklearn")


def plan_of(
    name: str, *, model: str, profile: Profile, seed: int, inputs: Mapping[str, Sequence[Path]],
    embedding_model: str | None,
) -> Plan:  # fmt: skip
    """Return what decides the figures of an experiment, by content and not by place; `inputs` are its files.

    Raises:
        SpecError: a file is missing.
    """
    plan = {
        "experiment": name,
        "profile": dataclasses.asdict(profile),
        "seed": seed,
        "model": _digest_or_name(model),
        "embedding model": None if embedding_model is None else _digest_or_name(embedding_model),
    } | {what: [digest(path) for path in paths] for what, paths in inputs.items()}
    return dict(json.loads(json.dumps(plan)))  # as it is read again


def differing(old: Plan, new: Plan) -> list[str]:
    """Return the names of what differs.

    >>> differing({"seed": 1, "model": "a"}, {"seed": 2, "model": "a"})
    ['seed']
    """
    return [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def digest(place: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's files but hidden ones.

    Raises:
        SpecError: there is nothing.
    """
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not place.is_dir():
        raise SpecError(f"{place}: no such file; give one that is there")
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    names = [(path.relative_to(place).as_posix(), path) for path in files]
    # What a hub keeps beside a model, and what is half written, is hidden.
    kept = [[name, digest(path)] for name, path in names if not any(part.startswith(".") for part in name.split("/"))]
    return hashlib.sha256(json.dumps(kept).encode("utf-8")).hexdigest()


def _digest_or_name(model: str) -> str:
    return digest(Path(model)) if Path(model).is_dir() else model


def check_extras(*, embedding: bool) -> None:
    """See that the libraries of the extra [evaluate] are here: some are needed only after hours.

    Raises:
        SpecError: one is not.
    """
    for name in (*_EXTRA, *(["sentence_transformers"] if embedding else [])):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SpecError(
                f"evaluate needs the extra [evaluate]: pip install 'rapidin-vdb[evaluate]' ({error})"
            ) from error


def check_room(profile: Profile, theta: int, *, device: str, influence_functions: bool) -> None:
    """See that the gradients of all queries fit the memory, before hours are spent on the tuning.

    Those of whole generations and of their telling words are kept at once, [queries, theta] in single precision;
    influence functions keep some five of one kind.

    Raises:
        SpecError: they do not.
    """
    need = 4 * theta * profile.queries * (5 if influence_functions else 2)
    free = free_bytes(device)
    if need > free:
        raise SpecError(
            f"the gradients of {profile.queries} generations, with {theta:,} coordinates each, take about "
            f"{need / 2**30:,.1f} GiB, and {device} has {free / 2**30:,.1f} GiB left; use a smaller model, "
            "--profile quick or --no-influence-functions"
        )
