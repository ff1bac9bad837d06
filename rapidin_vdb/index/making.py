"""Which kind of shard a device gets."""

import torch

from rapidin_vdb.index.faiss_shard import FaissShard
from rapidin_vdb.index.library import gpu_count
from rapidin_vdb.index.shard import ScanShard, Shard
from rapidin_vdb.index.source import RowSource
from rapidin_vdb.index.torch_shard import TorchShard
from rapidin_vdb.recipe import IndexRecipe


def gpu_of(device: str, recipe: IndexRecipe) -> int | None:
    """Return the number of the GPU that a device of a recipe means here; None for the CPU, also where it is missing."""
    if not device.startswith("cuda:"):
        return None
    number = int(device.removeprefix("cuda:"))
    return number if number < (torch.cuda.device_count() if by_torch(recipe) else gpu_count()) else None


def by_torch(recipe: IndexRecipe) -> bool:
    """Say whether rows on GPUs are torch's to search."""
    return recipe.library == "torch" and recipe.element_type == "float16"


def empty_shard(device: str, recipe: IndexRecipe, *, width: int, room: int) -> Shard | None:
    """Return an empty shard with room for so many rows on a GPU, or for FAISS; None for a scan on the CPU."""
    gpu = gpu_of(device, recipe)
    if gpu is not None and by_torch(recipe):
        return TorchShard(torch.device("cuda", gpu), width=width, room=room)
    if gpu is None and recipe.element_type == "float16":
        return None
    return FaissShard(gpu, width=width, recipe=recipe)


def make_shard(device: str, source: RowSource, recipe: IndexRecipe, *, width: int) -> Shard:
    """Return a shard of some rows: half precision is ours to search, single precision FAISS's, as the recipe says."""
    shard = empty_shard(device, recipe, width=width, room=source.count)
    if shard is None:
        return ScanShard(source, width=width)
    for chunk in source.chunks(None):
        shard = shard.added(chunk.rows)
    return shard
