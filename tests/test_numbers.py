"""What is no number is named, never stored, never ranked; and the same command gives the same answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_model, toy_records, write_jsonl
from safetensors.torch import load_file, save_file

import rapidin_vdb
from rapidin_vdb.errors import GradientError, ModelError


def damaged(folder: Path, file: str, end: str, value: float, *, times: bool = False) -> Path:
    """A copy of a model or adapter, one number (or, times, every one) of a tensor being another."""
    copy = folder.parent / f"damaged-{folder.name}"
    shutil.copytree(folder, copy)
    weights = load_file(copy / file)
    (name,) = [name for name in weights if name.endswith(end)][:1]
    if times:
        weights[name] *= value
    else:
        weights[name].view(-1)[0] = value
    save_file(weights, copy / file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("what", "end", "value", "times", "message"),
    [
        ("model", "model.norm.weight", float("nan"), False, "the loss is nan"),
        ("model", "model.norm.weight", float("inf"), False, "the loss is nan"),
        ("model", "lm_head.weight", -float("inf"), False, "the loss is nan"),
        # Each finite, their products not: the logits overflow.
        ("model", "lm_head.weight", 1e38, True, "the (loss is (nan|inf)|gradient is not finite)"),
        ("adapter", "q_proj.lora_A.weight", float("nan"), False, "the loss is nan"),
        ("adapter", "v_proj.lora_B.weight", float("inf"), False, "the loss is nan"),
    ],
)
def test_weights_that_are_no_numbers(tmp_path, models, adapters, what, end, value, times, message, tally):
    shutil.copytree(models["llama"], tmp_path / "model")
    shutil.copytree(adapters["llama"], tmp_path / "adapter")
    places = {"model": tmp_path / "model", "adapter": tmp_path / "adapter"}
    file = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}[what]
    places[what] = damaged(places[what], file, end, value, times=times)
    database = rapidin_vdb.init(tmp_path / "db", model=str(places["model"]), adapter=str(places["adapter"]), width=64)
    with pytest.raises(
        GradientError, match=f"toy.jsonl, line [0-9]+: sample toy-[0-9]+: {message}.*--on-bad-record skip"
    ):
        database.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(4)))
    assert database.info().samples == 0
    report = database.ingest(tmp_path / "toy.jsonl", on_bad_record="skip")
    assert (report.added, len(report.bad), database.info().samples) == (0, 4, 0)
    sound = rapidin_vdb.init(tmp_path / "sound", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    sound.ingest(tmp_path / "toy.jsonl")
    sound._engine = database._engine
    with pytest.raises(GradientError, match=f"sample query: {message}"):
        sound.query("Say 1", "blue")
    made = f"times {value}" if times else f"one number is {value}"
    tally(
        f"weights that are no numbers: `{end}`",
        made,
        3,
        "`ingest` and `query` name the sample; nothing is stored or ranked",
    )


def test_without_normalisation_what_half_precision_cannot_hold_is_named(tmp_path):
    """The largest half is 65,504: a gradient beyond it would be stored as infinite, and rank first for ever."""
    folder = save_model(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 1e4
    weights["model.norm.weight"] *= 1e3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(3))
    database = rapidin_vdb.init(tmp_path / "db", model=str(folder), parameters="all", width=64, normalize="none")
    with pytest.raises(GradientError, match="beyond half precision .65504.; make the database with --normalize layer"):
        database.ingest(corpus)
    assert database.info().samples == 0
    scaled = rapidin_vdb.init(tmp_path / "scaled", model=str(folder), parameters="all", width=64)
    scaled.ingest(corpus)
    assert all(np.isfinite(result.score) for result in scaled.query("Say 1", "blue")[0].results)


ASK = """
import json, sys, rapidin_vdb, torch
torch.set_num_threads(int(sys.argv[2]))
found = rapidin_vdb.open(sys.argv[1]).query("Say 5", "blue 35", top_k=24, tokens=True)[0]
print(json.dumps([result.to_dict() for result in found.results]))
"""


@pytest.mark.slow
def test_the_same_command_gives_the_same_answer(tmp_path, models, adapters):
    """To the last bit with as many threads; with other batches or threads, to half precision."""
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(40))
    vectors: dict[str, dict[str, np.ndarray]] = {}
    for name, tokens in (("one", 300), ("same", 300), ("other", 1000)):
        database = rapidin_vdb.init(
            tmp_path / name, model=str(models["llama"]), adapter=str(adapters["llama"]), width=64
        )
        database.ingest(corpus, batch_tokens=tokens)
        vectors[name] = {
            key: vector
            for batch in database._table.snapshot().vectors()
            for key, vector in zip(batch.keys, batch.vectors, strict=True)
        }
    assert {key: v.tobytes() for key, v in vectors["one"].items()} == {
        key: v.tobytes() for key, v in vectors["same"].items()
    }
    for key, vector in vectors["one"].items():
        np.testing.assert_allclose(vectors["other"][key], vector, rtol=2e-3, atol=2e-3 * np.abs(vector).max())
    said = {
        threads: [
            subprocess.run([sys.executable, "-c", ASK, str(tmp_path / "one"), str(threads)], check=True, capture_output=True).stdout
            for _ in range(2)
        ]
        for threads in (1, 2)
    }  # fmt: skip
    assert said[1][0] == said[1][1] and said[2][0] == said[2][1]
    one, two = (json.loads(said[threads][0]) for threads in (1, 2))
    scores = {result["sample_id"]: result["score"] for result in two}
    for result in one:
        assert scores[result["sample_id"]] == pytest.approx(result["score"], rel=1e-4, abs=1e-4)


class Trap:
    """What runs if it is ever unpickled."""

    def __reduce__(self):
        return (os.mkdir, (self.place,))


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_pickled_weights_are_refused_and_not_opened(tmp_path, models, adapters, what):
    trap = Trap()
    trap.place = str(tmp_path / "sprung")
    places = {"model": tmp_path / "model", "adapter": tmp_path / "adapter"}
    for name, source in (("model", models["llama"]), ("adapter", adapters["llama"])):
        shutil.copytree(source, places[name])
    old, new = {
        "model": ("model.safetensors", "pytorch_model.bin"), "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
    }[what]  # fmt: skip
    (places[what] / old).unlink()
    torch.save({"weight": trap}, places[what] / new)
    with pytest.raises(ModelError, match="safetensors"):
        rapidin_vdb.init(tmp_path / "db", model=str(places["model"]), adapter=str(places["adapter"]), width=64)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "db").exists()
    torch.load(places[what] / new, weights_only=False)
    assert (tmp_path / "sprung").exists(), "else it was no trap"
