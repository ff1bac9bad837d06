"""What a model is, as hashes of its content, and whether two fingerprints are of vectors that may meet.

A moved or renamed folder with the same weights is the same model.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch

from rapidin_vdb.errors import FingerprintError, ModelError
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.records import LOSSES, Fingerprint, ModelSpec, Normalize, SketchSpec, Turns

# Of a configuration file: what says where it came from, and nothing about what it computes.
_PROVENANCE = frozenset(
    "_name_or_path transformers_version peft_version base_model_name_or_path inference_mode revision dtype torch_dtype "
    "auto_mapping use_cache task_type".split()
)
# The files of a model and of an adapter: the configuration, and how the names of those with weights begin.
_MODEL = ("config.json", "model")
_ADAPTER = ("adapter_config.json", "adapter_model")
_NOT_COMPARED = frozenset({"model", "adapter", "versions", "epochs", "learning_rate", "parameters"})
_LIBRARIES = ("rapidin-vdb", "torch", "transformers", "peft", "bitsandbytes", "lancedb", "pyarrow", "numpy")


def fingerprint_of(
    loaded: LoadedModel,
    *,
    template: str,
    template_text: str,
    max_tokens: int,
    normalize: Normalize,
    sketch: SketchSpec,
    epochs: float,
    learning_rate: float,
    turns: Turns = "last",
    tokenizer_hash: str | None = None,
    hashes: "WeightHashes | None" = None,
) -> Fingerprint:
    """Return the fingerprint of vectors made with this model and these choices.

    A known `tokenizer_hash` may be one of before, which took in what a training had left of truncation and padding.
    `hashes` may have been made while the model was loaded.

    Raises:
        ModelError: the weights' files cannot be found or read.
    """
    spec = loaded.spec

    def hashed(name: str, files: tuple[str, str]) -> str:
        folder = _folder(name, files[0])
        return hashes.of(folder, files) if hashes is not None else _hash_folder(folder, files)

    return Fingerprint(
        model=_absolute(spec.model),
        model_hash=hashed(spec.model, _MODEL),
        adapter=None if spec.adapter is None else _absolute(spec.adapter),
        adapter_hash=None if spec.adapter is None else hashed(spec.adapter, _ADAPTER),
        quantization=spec.quantization,
        dtype=loaded.dtype,
        tokenizer_hash=hash_of_tokenizer(loaded.tokenizer, known=tokenizer_hash),
        template=template,
        template_text=template_text,
        max_tokens=max_tokens,
        loss=LOSSES[turns],
        normalize=normalize,
        parameters=spec.parameters,
        theta=loaded.shapes,
        sketch=sketch,
        epochs=epochs,
        learning_rate=learning_rate,
        versions=_versions(_LIBRARIES),
    )


class WeightHashes:
    """Hashes of a model's and an adapter's files, made by a thread of its own while these are loaded.

    One counts only if no file has been changed since: size, times, and which files there are.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Find the files; those that are yet to be downloaded are left to whoever asks for their hash."""
        self._folders: list[tuple[Path, tuple[str, str]]] = []
        for name, files in ((spec.model, _MODEL), (spec.adapter, _ADAPTER)):
            with suppress(OSError, ValueError, ModelError):
                if name is not None:
                    self._folders.append((_folder(name, files[0], download=False), files))
        self._made: dict[tuple[object, ...], str] = {}
        self._stop = Event()
        self._thread = Thread(target=self._make, daemon=True)

    def __enter__(self) -> "WeightHashes":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _make(self) -> None:
        for folder, files in self._folders:
            # What is wrong, whoever loads it or asks for the hash is told.
            with suppress(Exception):
                before = _state(folder, files)
                self._made[before] = _hash_folder(folder, files, stop=self._stop)

    def of(self, folder: Path, files: tuple[str, str]) -> str:
        """Return the hash of a folder's files as they are now.

        Raises:
            ModelError: they cannot be found or read.
        """
        self._thread.join()
        made = self._made.get(_state(folder, files))
        return _hash_folder(folder, files) if made is None else made


def _state(folder: Path, files: tuple[str, str]) -> tuple[object, ...]:
    """Return what is another if a file of a folder is written, in place or anew, though not one byte is looked at."""
    config, weights = files
    found: list[object] = []
    for file in (folder / config, *sorted(folder.glob(f"{weights}*.safetensors"))):
        there = file.stat()
        found += [str(file), there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns]
    return tuple(found)


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _folder(name: str, file: str, *, download: bool = True) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    found = cached_file(name, file, local_files_only=not download)
    if found is None:
        raise ModelError(f"{name}: {file} cannot be found")
    return Path(found).parent


def _hash_folder(folder: Path, files: tuple[str, str], *, stop: Event | None = None) -> str:
    """Hash what the weights are, whatever files they are cut into, and the configuration but for its provenance.

    Raises:
        InterruptedError: `stop` was set.
        ModelError: there are no weights, or they cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    config, weights = files
    digest = hashlib.sha256()
    settings = json.loads((folder / config).read_text("utf-8"))
    settings = {name: value for name, value in settings.items() if name not in _PROVENANCE}
    digest.update(json.dumps(_sorted(settings), sort_keys=True).encode("utf-8"))
    parts = sorted(folder.glob(f"{weights}*.safetensors"))
    if not parts:
        raise ModelError(f"{folder} has no {weights}.safetensors; convert the weights to safetensors first")
    places: dict[str, Path] = {}
    for file in parts:
        try:
            with safe_open(file, framework="pt") as tensors:
                places |= {name: file for name in tensors.keys()}
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read: {error}; save the weights again, or copy them anew") from error
    for name in sorted(places):
        if stop is not None and stop.is_set():
            raise InterruptedError(f"{folder} is no longer to be hashed")
        with safe_open(places[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name).contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sorted(value: object) -> object:
    """PEFT writes its sets as lists in any order."""
    if isinstance(value, dict):
        return {name: _sorted(part) for name, part in value.items()}
    if isinstance(value, list):
        return sorted((_sorted(part) for part in value), key=lambda part: json.dumps(part, sort_keys=True))
    return value


def hash_of_tokenizer(tokenizer: Any, *, known: str | None) -> str:
    """Return the hash of a tokenizer; `known` is one that it may have had before, as `fingerprint_of` says."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer

    def digest(state: str) -> str:
        text = json.dumps([state, tokenizer.eos_token_id, tokenizer.bos_token_id])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    found = digest(backend.to_str())
    if found == known or (backend.truncation is None and backend.padding is None):
        return found
    bare = Tokenizer.from_str(backend.to_str())
    bare.no_truncation()
    bare.no_padding()
    return digest(bare.to_str())


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
