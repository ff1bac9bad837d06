"""Index recipes: the shipped ones load, and a wrong one is refused with its name."""

import pytest

from rapidin_vdb.errors import SpecError
from rapidin_vdb.machine import cores
from rapidin_vdb.recipe import IndexRecipe, default_recipe, read_recipe, shipped_recipes


def test_every_shipped_recipe_loads():
    assert {name: read_recipe(path) for name, path in shipped_recipes().items()} == {
        "cpu": IndexRecipe(name="cpu", devices=("cpu",), shards_per_device=0, element_type="float16"),
        "gpu": IndexRecipe(name="gpu", devices=("cuda:0",), shards_per_device=1, element_type="float16"),
        "streamed": IndexRecipe(name="streamed", shards_per_device=1, residence="streamed"),
        "coarse_to_fine": IndexRecipe(name="coarse_to_fine", coarse_width=4096, refine=20),
        "two_gpus": IndexRecipe(name="two_gpus", devices=("cuda:0", "cuda:1"), shards_per_device=1),
    }
    assert read_recipe("cpu").shard_devices == ("cpu",) * cores()
    assert read_recipe("indexes/two_gpus.toml").shard_devices == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shrads = 2", "has unknown keys shrads; known are devices, shards_per_device, element_type, library"),
        ('devices = "cpu"', "devices is 'cpu'; wanted a list"),
        ('devices = ["tpu"]', "device 'tpu' is neither cpu nor cuda:N"),
        ("shards_per_device = -1", "shards_per_device is -1"),
        ("shards_per_device = true", "shards_per_device is True"),
        ('element_type = "int8"', "element_type is 'int8'; wanted float16 or float32"),
        ('library = "numpy"', "library is 'numpy'; wanted faiss or torch"),
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": ".."}, "has no name that an index may have, but '..'"),
        ({"name": "."}, "has no name"),
        ({"name": ""}, "has no name"),
        ({"name": ".fast"}, "has no name"),
        ({"name": "a/b"}, "has no name"),
        ({"name": "a\n"}, "has no name"),
        ({"devices": ("cuda:x",)}, "device 'cuda:x' is neither cpu nor cuda:N"),
        ({"devices": ("cuda:" + "9" * 30,)}, "is neither cpu nor cuda:N"),
        ({"devices": ()}, "devices is \\(\\); wanted some"),
        ({"devices": ["cpu"]}, "devices is \\['cpu'\\]"),
        ({"coarse_width": 3}, "coarse_width is 3; wanted 0 .exact. or a power of two"),
        ({"refine": True}, "refine is True"),
        ({"residence": "disk"}, "residence is 'disk'"),
        ({"shards_per_device": 257}, "it has 257 shards in all; wanted at most 256"),
        ({"devices": ("cpu",) * 2, "shards_per_device": 129}, "it has 258 shards"),
        ({"devices": ("cuda:0",) * 257}, "it has 257 shards"),
    ],
)
def test_a_recipe_made_here_is_checked_as_a_file_is(changed, message):
    recipe = IndexRecipe(name="mine")
    for name, value in changed.items():  # by this road, for the tests' own check of types is not there otherwise
        object.__setattr__(recipe, name, value)
    with pytest.raises(SpecError, match=message):
        recipe.__post_init__()


@pytest.mark.parametrize("name", ["...toml", "..toml", ".fast.toml"])
def test_a_recipe_whose_name_would_lead_elsewhere(tmp_path, name):
    """`...toml` has the stem `..`: the index would have been written over the tables."""
    (tmp_path / name).write_text("refine = 2\n")
    with pytest.raises(SpecError, match="has no name that an index may have"):
        read_recipe(tmp_path / name)


def test_a_file_that_happens_to_be_called_cpu_is_no_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu").write_text("Intel Xeon, 2 cores\n")
    (tmp_path / "indexes").mkdir()
    (tmp_path / "indexes" / "cpu.toml").write_text("coarse_width = 2\n")
    assert read_recipe("cpu") == default_recipe() == IndexRecipe(name="cpu")
    (tmp_path / "cpu").write_text("coarse_width = 2\n")
    assert read_recipe("cpu") == default_recipe() == IndexRecipe(name="cpu")
    # Whoever gives a folder, too, means the file.
    assert read_recipe(tmp_path / "cpu").coarse_width == 2
    assert read_recipe("indexes/cpu.toml").coarse_width == 2


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "refine = " + "1" * 5000])
def test_toml_that_python_cannot_read(tmp_path, text):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(SpecError, match="mine.toml is not TOML"):
        read_recipe(tmp_path / "mine.toml")


def test_a_recipe_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("")

    def refused(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refused)
    with pytest.raises(SpecError, match="mine.toml cannot be read: .*Permission denied"):
        read_recipe(tmp_path / "mine.toml")
    with pytest.raises(SpecError, match="no index recipe at "):
        read_recipe("a\0.toml")
    with pytest.raises(SpecError, match="no index recipe at "):
        read_recipe("a" * 5000 + ".toml")
