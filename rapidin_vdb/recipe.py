"""Index recipes: the files in `indexes/`, named for the hardware they suit."""

import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from rapidin_vdb.errors import SpecError
from rapidin_vdb.machine import cores

ElementType = Literal["float16", "float32"]
Library = Literal["faiss", "torch"]
Residence = Literal["resident", "mapped", "streamed"]

# An index's folder has its recipe's name.
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}")
_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,4}")
_MOST_SHARDS = 256
_WHOLE: tuple[tuple[str, str, Callable[[int], bool]], ...] = (
    ("shards_per_device", "0 (automatic) to 1024", lambda n: 0 <= n <= 1024),
    ("coarse_width", "0 (exact) or a power of two", lambda n: 0 <= n < 1 << 31 and n & (n - 1) == 0),
    ("refine", "1 or more", lambda n: 1 <= n < 1 << 31),
)


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
    library: Library = "faiss"
    """What searches a GPU's rows in half precision. In single precision it is FAISS, on the CPU too."""
    residence: Residence = "resident"
    """Whether rows are read into memory, mapped from their file, or streamed from it once for a batch of queries."""
    coarse_width: int = 0
    """Width of folded vectors, held in memory, that a search looks at first; 0 for an exact search."""
    refine: int = 10
    """How many times `top_k`, or times 10 if that is more, candidates of a coarse search are scored at full width."""

    def __post_init__(self) -> None:
        """Refuse what cannot be honoured, however the recipe was made.

        Raises:
            SpecError: a name that is none of a file, or a value out of range.
        """
        _check({field.name: getattr(self, field.name) for field in fields(self)}, f"index recipe {self.name}")

    @property
    def shard_devices(self) -> tuple[str, ...]:
        """The device of each shard, in order."""
        return tuple(
            device
            for device in self.devices
            for _ in range(self.shards_per_device or (cores() if device == "cpu" else 1))
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


def default_recipe() -> IndexRecipe:
    """Return the shipped recipe of an exact search on the CPU, which serves where nobody named one."""
    return _from_file(shipped_recipes()["cpu"])


def read_recipe(name_or_path: str | Path) -> IndexRecipe:
    """Return the recipe in a file, or the shipped one of that name; a name alone, as `cpu`, is never a file's.

    Raises:
        SpecError: no such recipe, not TOML, an unknown key, or a value that cannot be honoured.
    """
    path, shipped = Path(name_or_path), shipped_recipes()
    named = str(name_or_path)
    # A file that happens to be called `cpu`, in whatever folder one is, is no recipe.
    means_file = path.suffix == ".toml" or any(sign in named for sign in (os.sep, os.altsep) if sign)
    if not (means_file and _is_file(path)):
        if path.stem not in shipped or str(path) not in (path.stem, f"{path.stem}.toml", f"indexes/{path.name}"):
            raise SpecError(
                f"no index recipe at {name_or_path}; give a TOML file or one of: "
                + ", ".join(f"indexes/{name}.toml" for name in shipped)
            )
        path = shipped[path.stem]
    return _from_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # a name too long, or one that no file can have


def _from_file(path: Path) -> IndexRecipe:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SpecError(f"index recipe {path} cannot be read: {error}") from error
    # Not TOML errors alone: numbers of thousands of digits, and lists of thousands of lists, raise others.
    except (ValueError, RecursionError) as error:
        raise SpecError(f"index recipe {path} is not TOML: {error}") from error
    known = [field.name for field in fields(IndexRecipe) if field.name != "name"]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise SpecError(f"index recipe {path} has unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    devices = values.get("devices", ["cpu"])
    if not isinstance(devices, list):
        raise SpecError(f'index recipe {path}: devices is {devices!r}; wanted a list such as ["cpu"] or ["cuda:0"]')
    values |= {"name": path.stem, "devices": tuple(devices)}
    defaults = {field.name: field.default for field in fields(IndexRecipe)}
    _check(defaults | values, f"index recipe {path}")
    return IndexRecipe(**values)


def _check(values: dict[str, Any], what: str) -> None:
    """Refuse values of a recipe's fields that cannot be honoured."""
    name, devices = values["name"], values["devices"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SpecError(
            f"{what} has no name that an index may have, but {name!r}; wanted letters, digits, _, - and ., beginning "
            "with a letter, a digit or _"
        )
    if not isinstance(devices, tuple) or not devices or not all(isinstance(device, str) for device in devices):
        raise SpecError(f'{what}: devices is {devices!r}; wanted some, such as "cpu" or "cuda:0"')
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise SpecError(f"{what}: device {device!r} is neither cpu nor cuda:N")
    for key, wanted, fits in _WHOLE:
        if type(values[key]) is not int or not fits(values[key]):
            raise SpecError(f"{what}: {key} is {values[key]!r}; wanted {wanted}")
    for key, known in (
        ("element_type", get_args(ElementType)),
        ("library", get_args(Library)),
        ("residence", get_args(Residence)),
    ):
        if values[key] not in known:
            raise SpecError(f"{what}: {key} is {values[key]!r}; wanted {' or '.join(known)}")
    if values["residence"] != "resident" and (set(devices) != {"cpu"} or values["element_type"] != "float16"):
        raise SpecError(
            f'{what}: residence is {values["residence"]!r}, which goes with devices = ["cpu"] and element_type = '
            '"float16" only'
        )
    # Automatic ones are one a core, however many this machine has.
    shards = len(devices) * max(values["shards_per_device"], 1)
    if shards > _MOST_SHARDS:
        raise SpecError(f"{what}: it has {shards:,} shards in all; wanted at most {_MOST_SHARDS}")
