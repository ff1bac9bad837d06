"""Index recipes: the files in `indexes/`, named for the hardware they suit."""

import os
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rapidin_vdb.errors import SpecError

ElementType = Literal["float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class IndexRecipe:
    """How an index is laid out; it never changes an answer, only where and how fast it is found."""

    name: str
    """The file's name, without `.toml`."""
    devices: tuple[str, ...] = ("cpu",)
    """`cpu` or `cuda:N`, each holding its own share of the rows."""
    shards_per_device: int = 0
    """Parts a device searches at once; 0 means one a core on the CPU and one on a GPU."""
    element_type: ElementType = "float16"
    """How vectors are held; sums are in float32 either way."""

    @property
    def shard_devices(self) -> tuple[str, ...]:
        """The device of each shard, in order."""
        return tuple(
            device
            for device in self.devices
            for _ in range(self.shards_per_device or (os.cpu_count() or 1 if device == "cpu" else 1))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, for a manifest."""
        return asdict(self) | {"devices": list(self.devices)}


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    here = Path(__file__).parent
    # An installed wheel carries the folder inside the package, a checkout beside it.
    folder = here / "indexes" if (here / "indexes").is_dir() else here.parent / "indexes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_recipe(name_or_path: str | Path) -> IndexRecipe:
    """Return the recipe in a file, or the shipped one of that name.

    Raises:
        SpecError: no such recipe, not TOML, an unknown key, or a value that cannot be honoured.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = shipped_recipes()
        if path.stem not in shipped or str(path) not in (path.stem, f"{path.stem}.toml", f"indexes/{path.name}"):
            raise SpecError(
                f"no index recipe at {name_or_path}; give a TOML file or one of: "
                + ", ".join(f"indexes/{name}.toml" for name in shipped)
            )
        path = shipped[path.stem]
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"index recipe {path} is not TOML: {error}") from error
    return _recipe(path, values)


def _recipe(path: Path, values: dict[str, Any]) -> IndexRecipe:
    known = [field.name for field in fields(IndexRecipe) if field.name != "name"]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise SpecError(f"index recipe {path} has unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    devices = values.get("devices", ["cpu"])
    if not isinstance(devices, list) or not devices or not all(isinstance(name, str) for name in devices):
        raise SpecError(f'index recipe {path}: devices is {devices!r}; wanted a list such as ["cpu"] or ["cuda:0"]')
    for name in devices:
        if name != "cpu" and not (name.startswith("cuda:") and name[5:].isdecimal()):
            raise SpecError(f"index recipe {path}: device {name!r} is neither cpu nor cuda:N")
    shards = values.get("shards_per_device", 0)
    if type(shards) is not int or not 0 <= shards <= 1024:
        raise SpecError(f"index recipe {path}: shards_per_device is {shards!r}; wanted 0 (automatic) to 1024")
    element_type = values.get("element_type", "float16")
    if element_type not in ("float16", "float32"):
        raise SpecError(f"index recipe {path}: element_type is {element_type!r}; wanted float16 or float32")
    return IndexRecipe(name=path.stem, devices=tuple(devices), shards_per_device=shards, element_type=element_type)
