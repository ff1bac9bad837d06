"""Index recipes: the files in `indexes/`, named for the hardware they suit."""

import os
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from rapidin_vdb.errors import SpecError

ElementType = Literal["float16", "float32"]
Residence = Literal["resident", "mapped", "streamed"]


@dataclass(frozen=True, kw_only=True)
class IndexRecipe:
    """How an index is laid out; unless it is coarse, only where and how fast an answer is found, never which."""

    name: str
    """The file's name, without `.toml`."""
    devices: tuple[str, ...] = ("cpu",)
    """`cpu` or `cuda:N`, each holding its own share of the rows."""
    shards_per_device: int = 0
    """Parts a device searches at once; 0 means one a core on the CPU and one on a GPU."""
    element_type: ElementType = "float16"
    """How vectors are held; sums are in float32 either way."""
    residence: Residence = "resident"
    """Whether rows are read into memory, mapped from their file, or streamed from it once for a batch of queries."""
    coarse_width: int = 0
    """Width of folded vectors, held in memory, that a search looks at first; 0 for an exact search."""
    refine: int = 10
    """How many times `top_k` candidates of a coarse search are scored again at full width."""

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
    shards = _whole(path, values, "shards_per_device", 0, "0 (automatic) to 1024", lambda n: 0 <= n <= 1024)
    coarse = _whole(
        path, values, "coarse_width", 0, "0 (exact) or a power of two", lambda n: n >= 0 and n & (n - 1) == 0
    )
    refine = _whole(path, values, "refine", 10, "1 or more", lambda n: n >= 1)
    element_type = _one_of(path, values, "element_type", get_args(ElementType))
    residence = _one_of(path, values, "residence", get_args(Residence))
    recipe = IndexRecipe(
        name=path.stem,
        devices=tuple(devices),
        shards_per_device=shards,
        element_type=element_type,
        residence=residence,
        coarse_width=coarse,
        refine=refine,
    )
    if residence != "resident" and (set(devices) != {"cpu"} or element_type != "float16"):
        raise SpecError(
            f'index recipe {path}: residence is {residence!r}, which goes with devices = ["cpu"] and element_type = '
            '"float16" only'
        )
    return recipe


def _whole(path: Path, values: dict[str, Any], key: str, default: int, wanted: str, fits: Callable[[int], bool]) -> int:
    value = values.get(key, default)
    if type(value) is not int or not fits(value):
        raise SpecError(f"index recipe {path}: {key} is {value!r}; wanted {wanted}")
    return value


def _one_of(path: Path, values: dict[str, Any], key: str, known: tuple[str, ...]) -> Any:
    value = values.get(key, known[0])
    if value not in known:
        raise SpecError(f"index recipe {path}: {key} is {value!r}; wanted {' or '.join(known)}")
    return value
