"""Index recipes: the shipped ones load, and a wrong one is refused with its name."""

import os

import pytest

from rapidin_vdb.errors import SpecError
from rapidin_vdb.recipe import IndexRecipe, read_recipe, shipped_recipes


def test_every_shipped_recipe_loads():
    cores = os.cpu_count() or 1
    assert {name: read_recipe(path) for name, path in shipped_recipes().items()} == {
        "cpu": IndexRecipe(name="cpu", devices=("cpu",), shards_per_device=0, element_type="float16"),
        "gpu": IndexRecipe(name="gpu", devices=("cuda:0",), shards_per_device=1, element_type="float16"),
        "streamed": IndexRecipe(name="streamed", shards_per_device=1, residence="streamed"),
        "coarse_to_fine": IndexRecipe(name="coarse_to_fine", coarse_width=4096, refine=20),
        "two_gpus": IndexRecipe(name="two_gpus", devices=("cuda:0", "cuda:1"), shards_per_device=1),
    }
    assert read_recipe("cpu").shard_devices == ("cpu",) * cores
    assert read_recipe("indexes/two_gpus.toml").shard_devices == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shrads = 2", "has unknown keys shrads; known are devices, shards_per_device, element_type, residence"),
        ('devices = "cpu"', "devices is 'cpu'; wanted a list"),
        ('devices = ["tpu"]', "device 'tpu' is neither cpu nor cuda:N"),
        ("shards_per_device = -1", "shards_per_device is -1"),
        ("shards_per_device = true", "shards_per_device is True"),
        ('element_type = "int8"', "element_type is 'int8'; wanted float16 or float32"),
        ('residence = "disk"', "residence is 'disk'; wanted resident or mapped or streamed"),
        ('residence = "mapped"\ndevices = ["cuda:0"]', "residence is 'mapped', which goes with devices"),
        ('residence = "streamed"\nelement_type = "float32"', "residence is 'streamed', which goes with devices"),
        ("coarse_width = 1000", "coarse_width is 1000; wanted 0 .exact. or a power of two"),
        ("refine = 0", "refine is 0; wanted 1 or more"),
        ("devices = [", "is not TOML"),
    ],
)
def test_recipes_that_cannot_be_honoured(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(SpecError, match=message):
        read_recipe(tmp_path / "mine.toml")


def test_a_recipe_that_is_not_there():
    with pytest.raises(
        SpecError,
        match="no index recipe at indexes/tpu.toml; give a TOML file or one of: indexes/coarse_to_fine.toml, indexes/cpu.toml",
    ):
        read_recipe("indexes/tpu.toml")
    with pytest.raises(SpecError, match="no index recipe at /elsewhere/cpu.toml"):
        read_recipe("/elsewhere/cpu.toml")
