"""Vectors that were not made alike never meet: ingest and query name what differs, and write nothing."""

import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, toy_records, write_jsonl
from safetensors.torch import load_file, save_file
from test_store import FINGERPRINT

import rapidin_vdb
from rapidin_vdb.errors import FingerprintError, ModelError, RapidInError, SpecError
from rapidin_vdb.gradient import check_fingerprint
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.store import SampleTable


def change_weights(model: Path, adapter: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][5, 3] += 0.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change_dtype(model: Path, adapter: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


def change_configuration(model: Path, adapter: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def change_adapter(model: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[min(weights)] += 0.01
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def change_alpha(model: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))


def change_tokenizer(model: Path, adapter: Path) -> None:
    file = model / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(values))


def change_chat_template(model: Path, adapter: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_weights, "model_hash"),
        (change_dtype, "model_hash"),
        (change_configuration, "model_hash"),
        (change_adapter, "adapter_hash"),
        (change_alpha, "adapter_hash"),
        (change_tokenizer, "tokenizer_hash"),
        (change_chat_template, "template_text"),
    ],
)
def test_what_was_made_otherwise_is_refused(tmp_path, models, adapters, change, field):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}:"
    shutil.copytree(models["llama"], tmp_path / "model")
    shutil.copytree(adapters["llama"], tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "model")
    database = rapidin_vdb.init(
        tmp_path / "db", model=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), width=64, template="chat"
    )
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(3))
    database.ingest(corpus)
    # Where it was, and moved, and the same: accepted.
    for name in ("model", "adapter"):
        shutil.copytree(tmp_path / name, tmp_path / f"moved-{name}")
    moved = {"model": str(tmp_path / "moved-model"), "adapter": str(tmp_path / "moved-adapter")}
    wanted = database.query("Say 1", "blue")[0].results
    assert rapidin_vdb.open(database.path).query("Say 1", "blue", **moved)[0].results == wanted
    change(tmp_path / "moved-model", tmp_path / "moved-adapter")
    more = write_jsonl(tmp_path / "more.jsonl", toy_records(3, first=10))
    for attempt in (lambda one: one.query("Say 1", "blue", **moved), lambda one: one.ingest(more, **moved)):
        with pytest.raises(
            FingerprintError, match=f"was made with another fingerprint: .*{field} is .* in the database, "
        ):
            attempt(rapidin_vdb.open(database.path))
    assert rapidin_vdb.open(database.path).info().samples == 3


@pytest.mark.parametrize("scheme", [0, 2])
def test_a_scheme_that_is_not_known_can_be_read_and_not_misread(tmp_path, database, scheme):
    """A database of another version of the sketch: its samples are shown, its vectors compared with nothing."""
    stored = dataclasses.replace(
        database.fingerprint, sketch=dataclasses.replace(database.fingerprint.sketch, scheme=scheme)
    )
    table = SampleTable.create(str(tmp_path / "other"), stored)
    rows = database._table.snapshot()
    table.ensure_columns({"stars": "int"})
    (batch,) = rows._table.search().to_arrow().to_batches()
    table._table.add(batch)
    other = rapidin_vdb.open(tmp_path / "other")
    assert (other.info().samples, other.show("toy-003"), other.verify().findings) == (24, database.show("toy-003"), ())
    wanted = f"sketch scheme {scheme} is not known to this version, which writes scheme 1"
    more = write_jsonl(tmp_path / "more.jsonl", toy_records(3, first=50))
    for attempt in (lambda: other.query("Say 1", "blue"), lambda: other.ingest(more)):
        with pytest.raises(SpecError, match=wanted):
            attempt()
    assert other.info().samples == 24 and other.delete(ids=["toy-003"]) == ["toy-003"]


@pytest.mark.parametrize("content", [b"nonsense", None], ids=["nonsense", "cut off"])
@pytest.mark.parametrize("damaged", ["model", "adapter"])
def test_weights_that_are_damaged_are_told(tmp_path, models, adapters, damaged, content):
    model, adapter = (shutil.copytree(one["llama"], tmp_path / name) for name, one in (("m", models), ("a", adapters)))
    file = model / "model.safetensors" if damaged == "model" else adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ModelError, match=f"the {damaged} .* cannot be (loaded|read): "):
        rapidin_vdb.init(tmp_path / "db", model=str(model), adapter=str(adapter), width=64)
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize(
    "place",
    ["s3://key:secret@bucket/db?token=secret", "az://bucket/db?sig=secret", "https://secret@host/db"],
)
def test_secrets_in_addresses_are_not_printed(place, capsys, tmp_path, models):
    from test_cli import call

    for command in (
        ["info", place],
        ["init", place, "--model", place],
        ["ingest", place, "x.jsonl"],
        ["verify", place],
    ):
        code, out, err = call(capsys, *command)
        assert code == 1 and err.startswith("error: ") and "secret" not in out + err, err
    for name in ("--model", "--adapter"):
        with pytest.raises(RapidInError) as caught:
            rapidin_vdb.init(tmp_path / "new", **{"model": str(models["llama"])} | {name[2:]: place})
        assert "secret" not in str(caught.value)
    with pytest.raises(RapidInError) as caught:
        rapidin_vdb.open(place)
    assert "secret" not in str(caught.value) and "://" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_hash": "9"}, "model_hash is '1' in the database, '9' here"),
        ({"adapter_hash": "9"}, "adapter_hash is None in the database"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' in the database, 'bfloat16' here"),
        ({"tokenizer_hash": "x"}, "tokenizer_hash"),
        ({"template_text": "x"}, "template_text"),
        ({"normalize": "none"}, "normalize"),
        ({"sketch": SketchSpec(width=16)}, "sketch"),
        ({"theta": ()}, "theta differs in names or shapes"),
        ({"model_hash": "9", "max_tokens": 5}, "model_hash.*max_tokens"),
    ],
)
def test_fingerprints_that_differ_must_not_meet(change, message):
    with pytest.raises(FingerprintError, match=message):
        check_fingerprint(FINGERPRINT, dataclasses.replace(FINGERPRINT, **change), place="db")


def test_a_moved_model_may_meet():
    check_fingerprint(
        FINGERPRINT, dataclasses.replace(FINGERPRINT, model="elsewhere", versions={"torch": "3"}), place="db"
    )


def test_where_two_long_values_differ_is_shown():
    stored, here = (dataclasses.replace(FINGERPRINT, template_text="x" * 200 + end) for end in ("one", "other"))
    with pytest.raises(FingerprintError) as found:
        check_fingerprint(stored, here, place="db")
    assert f"template_text is ...{'x' * 19}one' in the database, ...{'x' * 19}other' here" in str(found.value)


@pytest.fixture
def hashed(monkeypatch):
    """Which folders were hashed, each with the thread that did it; and an event, set once the adapter was."""
    from rapidin_vdb.gradient import fingerprint

    found, done, original = [], threading.Event(), fingerprint._hash_folder

    def noting(folder, files, **options):
        digest = original(folder, files, **options)
        found.append((folder.name, threading.current_thread() is threading.main_thread()))
        if files == fingerprint._ADAPTER:
            done.set()
        return digest

    monkeypatch.setattr(fingerprint, "_hash_folder", noting)
    return found, done


def own_copies(tmp_path, models, adapters):
    """A database, and the folders of its model and its adapter, which may be changed."""
    folders = [shutil.copytree(one["llama"], tmp_path / name) for one, name in ((models, "m"), (adapters, "a"))]
    made = rapidin_vdb.init(tmp_path / "db", model=str(folders[0]), adapter=str(folders[1]), width=64)
    return made.path, *folders


def test_weights_are_hashed_once_and_while_they_are_loaded(tmp_path, models, adapters, hashed):
    path, *_ = own_copies(tmp_path, models, adapters)
    found, _ = hashed
    assert found == [("m", True), ("a", True)], "by init"
    found.clear()
    rapidin_vdb.open(path).load()
    assert found == [("m", False), ("a", False)]


def change_a_byte(model: Path, adapter: Path) -> None:
    """In the file as it is, which grows no longer."""
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        byte = file.read(1)
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("change", [change_weights, change_adapter, change_alpha, change_configuration, change_a_byte])
def test_what_is_changed_after_it_was_hashed_is_refused(tmp_path, models, adapters, hashed, monkeypatch, change):
    """While the rest is loaded; files have the times that they had."""
    from rapidin_vdb import engine

    path, model, adapter = own_copies(tmp_path, models, adapters)
    found, done = hashed
    done.clear()
    original = engine.load_model

    def load(*arguments, **options):
        loaded = original(*arguments, **options)
        assert done.wait(60)
        times = {file: file.stat() for folder in (model, adapter) for file in folder.iterdir()}
        change(model, adapter)
        for file, before in times.items():
            if file.stat().st_mtime_ns != before.st_mtime_ns:
                os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return loaded

    found.clear()
    monkeypatch.setattr(engine, "load_model", load)
    with pytest.raises(FingerprintError, match="(model|adapter)_hash is"):
        rapidin_vdb.open(path).load()
    assert len(found) == 3, "one of both once more"


def test_a_hash_that_nobody_waits_for_is_given_up(tmp_path, models):
    from rapidin_vdb.gradient.fingerprint import _MODEL, WeightHashes, _hash_folder
    from rapidin_vdb.records import ModelSpec

    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        _hash_folder(models["llama"], _MODEL, stop=stop)
    with pytest.raises(ModelError, match="no model at"), WeightHashes(ModelSpec(model=str(models["llama"]))) as hashes:
        raise ModelError("no model at x")
    assert not hashes._thread.is_alive()


def test_what_is_yet_to_be_downloaded_is_not_by_who_hashes(monkeypatch):
    import transformers.utils

    from rapidin_vdb.gradient.fingerprint import WeightHashes
    from rapidin_vdb.records import ModelSpec

    asked = []

    def cached_file(name, file, *, local_files_only):
        asked.append((name, file, local_files_only))
        raise OSError("not here")

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    with WeightHashes(ModelSpec(model="some/model", adapter="some/adapter")) as hashes:
        pass
    assert asked == [("some/model", "config.json", True), ("some/adapter", "adapter_config.json", True)]
    assert hashes._made == {}


def test_hashes_of_weights_never_change(tmp_path):
    """Every database would refuse its own model."""
    from safetensors.torch import save_file

    from rapidin_vdb.gradient.fingerprint import _MODEL, _hash_folder

    settings = {"b": [2, 1], "a": {"x": None}, "transformers_version": "1", "_name_or_path": "p"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    weights = {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "v": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    }  # fmt: skip
    save_file(weights, tmp_path / "model.safetensors")
    assert _hash_folder(tmp_path, _MODEL) == "25085433637d08f66b56641ab958f65e835a2efc465f47b5434c181b77667332"
