"""Whether it helped: how likely generations are for a database's model, and for one that was trained anew."""

import gc
import json
import shutil
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, save_adapter, save_model, write_jsonl

import rapidin_vdb
from rapidin_vdb import speaker
from rapidin_vdb.errors import CorpusError, FingerprintError, GradientError, ModelError, SpecError
from rapidin_vdb.gradient import likelihood
from rapidin_vdb.query import query_from

QUERIES = [("Say 5", "blue 35"), ("Say 17 and no more", "blå, blå himmel über 黄"), ("Say 1", "x")]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@pytest.fixture(scope="module")
def retrained(tmp_path_factory):
    """Another adapter of the same shape for the same model."""
    from safetensors.torch import load_file, save_file

    folder = save_adapter(tmp_path_factory.mktemp("retrained") / "adapter", "llama")
    weights = folder / "adapter_model.safetensors"
    draw = torch.Generator().manual_seed(5)
    made = {name: torch.randn(old.shape, generator=draw) * 0.3 for name, old in load_file(weights).items()}
    save_file(made, weights, {"format": "pt"})
    return folder


def queries():
    return [query_from(*pair, query_id=str(number)) for number, pair in enumerate(QUERIES)]


def slow_losses(model, adapter, prompt: str, generation: str) -> np.ndarray:
    """One text at a time by transformers and peft, with the logarithms in double precision."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    network = AutoModelForCausalLM.from_pretrained(model)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, adapter)
    ids = [*tokenizer(ALPACA.format(prompt) + generation)["input_ids"], 2]
    with torch.no_grad():
        logits = network.eval()(input_ids=torch.tensor([ids])).logits[0].double()
    logs = torch.log_softmax(logits, -1)
    count = len(generation.encode()) + 1
    return np.array([-float(logs[place - 1, ids[place]]) for place in range(len(ids) - count, len(ids))])


def test_losses_are_those_of_each_text_alone(database, models, adapters, retrained):
    found = database.compare(queries=queries(), new_adapter=retrained)
    assert [(one.query_id, one.prompt, one.generation) for one in found] == [
        (str(number), *pair) for number, pair in enumerate(QUERIES)
    ]
    for one, pair in zip(found, QUERIES, strict=True):
        for side, adapter in (("before", adapters["llama"]), ("after", retrained)):
            wanted = slow_losses(models["llama"], adapter, *pair)
            losses = [getattr(token, f"loss_{side}") for token in one.tokens]
            np.testing.assert_allclose(losses, wanted, rtol=2e-5)
            assert getattr(one, f"loss_{side}") == pytest.approx(np.mean(losses), rel=1e-9)
        assert abs(one.change) > 1e-4 and one.change == one.loss_after - one.loss_before
        # A token that is part of a letter has all of it, as in rankings.
        assert [token.text for token in one.tokens] == [pair[1][t.start : t.end] for t in one.tokens]
        assert one.tokens[-1].text == "" and one.tokens[0].start == 0
        assert (one.focus, one.answer) == (None, None)
    both = [slow_losses(models["llama"], adapter, *QUERIES[0]) for adapter in (adapters["llama"], retrained)]
    assert np.abs(both[0] - both[1]).max() > 0.01, "adapters differ"


def test_the_loss_is_that_of_the_database(database, retrained):
    """What is stored with a sample is the loss of the same text by the same model."""
    stored = database.show("toy-003")
    (one,) = database.compare(stored.prompt, stored.response, new_adapter=retrained)
    assert one.loss_before == pytest.approx(stored.loss, rel=1e-5)


def test_a_focus_has_the_losses_of_its_tokens(database, retrained, tmp_path):
    (whole,) = database.compare(*QUERIES[1], new_adapter=retrained)
    (part,) = database.compare(*QUERIES[1], new_adapter=retrained, focus="himmel")
    assert "".join(token.text for token in part.tokens) == "himmel" and part.focus == ("himmel",)
    wanted = [token for token in whole.tokens if 9 <= token.start < 15]
    for side in ("before", "after"):
        losses = [getattr(token, f"loss_{side}") for token in wanted]
        assert getattr(part, f"loss_{side}") == pytest.approx(np.mean(losses), rel=1e-5)
    file = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Say 5", "generation": "blue 35", "focus": [[5, 7]]}])
    (own,) = database.compare(file=file, new_adapter=retrained, focus="blue")
    assert [token.text for token in own.tokens] == ["3", "5"] and own.to_dict()["focus"] == ((5, 7),)
    with pytest.raises(SpecError, match="is not in the generation"):
        database.compare(*QUERIES[0], new_adapter=retrained, focus="green")


def test_a_new_model_is_compared_as_it_is(database, models, adapters, retrained, tmp_path):
    other = save_model(tmp_path / "other", "llama", seed=7)
    (one,) = database.compare(*QUERIES[0], new_model=other)
    assert one.loss_after == pytest.approx(slow_losses(other, None, *QUERIES[0]).mean(), rel=2e-5)
    (one,) = database.compare(*QUERIES[0], new_model=other, new_adapter=retrained)
    assert one.loss_after == pytest.approx(slow_losses(other, retrained, *QUERIES[0]).mean(), rel=2e-5)
    bare = rapidin_vdb.init(tmp_path / "bare", model=models["llama"], width=64)
    (one,) = bare.compare(*QUERIES[0], new_adapter=retrained)
    assert one.loss_before == pytest.approx(slow_losses(models["llama"], None, *QUERIES[0]).mean(), rel=2e-5)
    assert one.loss_after == pytest.approx(slow_losses(models["llama"], retrained, *QUERIES[0]).mean(), rel=2e-5)
    # Where the database's model has moved, the new adapter is put on it there.
    shutil.copytree(models["llama"], tmp_path / "moved")
    (one,) = rapidin_vdb.open(database.path).compare(
        *QUERIES[0], new_adapter=retrained, model=tmp_path / "moved", adapter=adapters["llama"]
    )
    assert one.loss_after == pytest.approx(slow_losses(models["llama"], retrained, *QUERIES[0]).mean(), rel=2e-5)


def test_the_new_model_answers(database, models, adapters, retrained, tmp_path):
    again = rapidin_vdb.open(database.path)
    found = again.compare(queries=queries(), new_adapter=adapters["llama"], answer_tokens=7)
    assert [one.answer for one in found] == [database.generate(one.prompt, max_tokens=7) for one in found]
    assert [one.change for one in found] == [0.0] * 3, "the same weights"
    # What the new one says, and not the database's own.
    after = rapidin_vdb.init(tmp_path / "after", model=models["llama"], adapter=retrained, width=16)
    asked = [query_from(f"Say {number}", "x", query_id=str(number)) for number in range(6)]
    others = again.compare(queries=asked, new_adapter=retrained, answer_tokens=7)
    assert [one.answer for one in others] == [after.generate(one.prompt, max_tokens=7) for one in asked]
    assert [one.answer for one in others] != [database.generate(one.prompt, max_tokens=7) for one in asked]
    (alone,) = again.compare(None, "all of it is generation", new_adapter=retrained, answer_tokens=7)
    assert alone.prompt is None and alone.answer is None, "there is nothing to answer"
    assert not alone.answer_cut and "answer_cut" not in alone.to_dict()


@pytest.mark.parametrize("ends", [False, True])
def test_an_answer_that_was_cut_is_said_to_be(models, adapters, retrained, tmp_path, monkeypatch, ends):
    """And one that the model ended is not, even with the last token that it might have."""
    made = rapidin_vdb.init(tmp_path / "db", model=models["llama"], adapter=adapters["llama"], width=64)
    (end,) = byte_tokenizer().convert_tokens_to_ids(["</s>"])
    tokens = [40, 41, end if ends else 42]

    def generate(model, input_ids, **options):
        return torch.cat([input_ids, torch.tensor([tokens])], 1)

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    (one,) = made.compare(*QUERIES[0], new_adapter=retrained, answer_tokens=3)
    assert one.answer == byte_tokenizer().decode(tokens[: 2 if ends else 3])
    assert (one.answer_cut, one.to_dict().get("answer_cut")) == ((False, None) if ends else (True, True))


def test_a_prompt_without_room_for_an_answer_is_found_before_a_model_is_loaded(
    models, adapters, retrained, tmp_path, monkeypatch
):
    made = rapidin_vdb.init(tmp_path / "db", model=models["llama"], adapter=adapters["llama"], width=64, max_tokens=600)
    asked = [query_from("x" * length, "blue", query_id=f"of {length}") for length in (9, 400)]
    assert len(made.compare(queries=asked, new_adapter=retrained)) == 2, "the generation alone fits"
    monkeypatch.setattr(speaker, "judge", lambda *_, **__: pytest.fail("a model judges"))
    with pytest.raises(
        SpecError,
        match="^query of 400 cannot be answered: the prompt has [0-9]+ tokens, and the model knows 512 positions; "
        "shorten it, ask without this query, or leave out --answer-tokens$",
    ):
        made.compare(queries=asked, new_adapter=retrained, answer_tokens=5)


def test_an_answer_that_does_not_fit_the_memory_is_said_to(database, retrained, monkeypatch):
    def generate(model, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    with pytest.raises(
        GradientError, match="^the answer to 0 does not fit the memory beside the model: it takes fewer"
    ):
        database.compare(queries=queries(), new_adapter=retrained, answer_tokens=5)


def test_where_the_model_is_needs_to_be_said_once(
    pristine_database, models, adapters, retrained, tmp_path, monkeypatch
):
    """One that was loaded from where it is now is there for the new adapter too, on the same device."""
    place = shutil.copytree(models["llama"], tmp_path / "was")
    made = rapidin_vdb.init(tmp_path / "db", model=place, adapter=adapters["llama"], width=64)
    place.rename(tmp_path / "is")
    with pytest.raises(
        ModelError, match=r"was: no such folder. If it has moved since init, say where it is: --model FOLDER$"
    ):
        rapidin_vdb.open(made.path).compare(*QUERIES[0], new_adapter=retrained)
    again = rapidin_vdb.open(made.path)
    again.load(model=tmp_path / "is", device="cpu")
    devices = []
    original = speaker.load_other
    monkeypatch.setattr(
        speaker, "load_other", lambda *given, device: devices.append(device) or original(*given, device=device)
    )
    (one,) = again.compare(*QUERIES[0], new_adapter=retrained)
    assert one.loss_after == pytest.approx(slow_losses(models["llama"], retrained, *QUERIES[0]).mean(), rel=2e-5)
    assert devices == ["cpu"]


def test_the_loaded_model_is_the_base_of_a_new_adapter(database, retrained, tmp_path):
    """Of both sides: another place is not looked at, as `query` looks at none."""
    (wanted,) = database.compare(*QUERIES[0], new_adapter=retrained)
    other = save_model(tmp_path / "other", "llama", seed=7)
    for device in ("auto", "cpu"):
        (one,) = database.compare(*QUERIES[0], new_adapter=retrained, model=other, device=device)
        assert one == wanted
    (bare,) = database.compare(*QUERIES[0], new_model=other, new_adapter=retrained)
    assert abs(bare.loss_after - wanted.loss_after) > 1e-3, "it is another"


@pytest.mark.parametrize("how", ["init", "load"])
def test_a_folder_stays_where_it_is_when_the_process_goes_elsewhere(
    pristine_database, models, adapters, retrained, tmp_path, monkeypatch, how
):
    for name, place in (("model", models["llama"]), ("adapter", adapters["llama"])):
        shutil.copytree(place, tmp_path / "here" / name)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if how == "init":
        made = rapidin_vdb.init(tmp_path / "db", model="model", adapter="adapter", width=64)
    else:
        made = rapidin_vdb.open(pristine_database / "db")
        made.load(model="./model", adapter="adapter")
    monkeypatch.chdir(tmp_path / "there")
    (one,) = made.compare(*QUERIES[0], new_adapter=retrained)
    assert one.loss_after == pytest.approx(slow_losses(models["llama"], retrained, *QUERIES[0]).mean(), rel=2e-5)
    spec = made._engine.loaded.spec
    assert [spec.model, spec.adapter] == [str(tmp_path / "here" / name) for name in ("model", "adapter")]


def test_batches_of_both_models_are_the_same(database, adapters, monkeypatch):
    """However much memory is free for the other: the same weights have the same losses, to the last bit."""
    room = iter([4096, 130])
    monkeypatch.setattr(likelihood, "default_batch_tokens", lambda *_, **__: next(room))
    original, sizes = likelihood.batch_losses, []

    def noted(loaded, batch, **options):
        sizes.append(len(batch))
        made = original(loaded, batch, **options)
        made.losses.add_(len(batch) * 1e-6)  # what rounding would do
        return made

    monkeypatch.setattr(likelihood, "batch_losses", noted)
    found = database.compare(queries=queries(), new_adapter=adapters["llama"])
    assert sizes == [3, 3] and [one.change for one in found] == [0.0] * 3


def test_the_new_model_is_of_the_type_of_the_databases(models, adapters, tmp_path):
    made = rapidin_vdb.init(
        tmp_path / "db", model=models["llama"], adapter=adapters["llama"], width=64, dtype="bfloat16"
    )
    (one,) = made.compare(*QUERIES[0], new_adapter=adapters["llama"])
    assert one.change == 0, "the same weights, rounded alike"


def test_weights_that_are_kept_otherwise_are_told_of(database, models, retrained, tmp_path, caplog):
    import transformers

    def kept(name, **options):
        network = transformers.AutoModelForCausalLM.from_pretrained(models["llama"], **options)
        network.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    places = {"float32": kept("same"), "bfloat16": kept("half", dtype=torch.bfloat16)}
    places["4 bits"] = kept("four", quantization_config=four)
    said = {}
    for name, place in places.items():
        caplog.clear()
        database.compare(*QUERIES[0], new_model=place)
        said[name] = [text for text in caplog.messages if "are kept in" in text]
    assert said.pop("float32") == []
    for name, (text,) in said.items():
        assert f"the weights of {places[name]} are kept in {name}" in text
        assert "and those of the database's model in float32: a part of what differs may be their rounding" in text
    of_four = rapidin_vdb.init(tmp_path / "of four", model=places["4 bits"], adapter=retrained, width=64)
    for place, told_of in ((places["4 bits"], False), (places["float32"], True)):
        caplog.clear()
        of_four.compare(*QUERIES[0], new_model=place, new_adapter=retrained)
        assert ("are kept in float32, and those of the database's model in 4 bits (nf4)" in caplog.text) == told_of


def test_an_adapter_of_another_base_is_told_of(database, retrained, tmp_path, caplog):
    adapter = shutil.copytree(retrained, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/other"}))
    database.compare(*QUERIES[0], new_adapter=adapter)
    assert "the adapter names someone/other as the model that it was trained on, and is put on" in caplog.text


def test_a_generation_that_is_cut_is_said_to_be(models, adapters, retrained, tmp_path, capsys):
    made = rapidin_vdb.init(tmp_path / "db", model=models["llama"], adapter=adapters["llama"], width=64, max_tokens=180)
    short, long = made.compare(
        queries=[query_from("Say 5", text, query_id=text[:1]) for text in ("blue", "x" * 300)], new_adapter=retrained
    )
    assert (short.truncated, long.truncated) == (False, True) and long.to_dict()["truncated"] is True
    assert "truncated" not in short.to_dict() and len(long.tokens) < 100
    asked = ("--prompt", "Say 5", "--generation", "x" * 300, "--new-adapter", retrained)
    code, _, err = told(capsys, "compare", made.path, *asked)
    assert code == 0 and "1 of them were cut to the database's limit of tokens (init --max-tokens)" in err


def test_what_stands_behind_a_focus_is_not_run(database, retrained, monkeypatch):
    lengths = []
    original = likelihood.batch_losses
    monkeypatch.setattr(
        likelihood, "batch_losses",
        lambda loaded, batch: lengths.append(len(batch[0].input_ids)) or original(loaded, batch),
    )  # fmt: skip
    database.compare("Say 5", "blue 35 and much more behind it", new_adapter=retrained, focus="blue")
    ids = byte_tokenizer()(ALPACA.format("Say 5") + "blue")["input_ids"]
    assert lengths == [len(ids)] * 2


def test_a_quantised_database_takes_a_model_without_an_adapter(shared, tmp_path):
    """Weights in four bits have no gradient, and none is asked for."""
    from conftest import real_adapter

    model, adapter = shared / "models" / "tinystories-260k", real_adapter(tmp_path / "adapter", shared)
    made = rapidin_vdb.init(tmp_path / "db", model=model, adapter=adapter, quantization="nf4", width=64)
    asked = ("Say 5", "Once upon a time there was a dog.")
    (bare,) = made.compare(*asked, new_model=model)
    (same,) = made.compare(*asked, new_adapter=adapter)
    assert same.change == 0 and abs(bare.change) > 1e-3 and same.loss_before == bare.loss_before


def test_one_model_is_in_memory_at_a_time(database, retrained, monkeypatch):
    """Unless it was there before, which is not taken away."""

    def there() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "LlamaForCausalLM" for thing in gc.get_objects())

    again, engine, before = rapidin_vdb.open(database.path), database._engine, there()
    found, original = [], speaker.load_other
    monkeypatch.setattr(
        speaker, "load_other", lambda *given, **options: found.append(there()) or original(*given, **options)
    )
    again.compare(*QUERIES[0], new_adapter=retrained)
    assert again._engine is None
    database.compare(*QUERIES[0], new_adapter=retrained)
    assert database._engine is engine
    # The fixture's own is there all the time.
    assert found == [before, before] and before > 0


def test_the_databases_model_is_gone_before_the_other_is_loaded(database, retrained, monkeypatch):
    """Also one whose modules know each other, so that nobody but the collector takes them away."""
    again, modules, left = rapidin_vdb.open(database.path), [], []
    first, second = speaker.load_checked, speaker.load_other

    def loaded(*given, **options):
        made = first(*given, **options)
        made.inner.__dict__["outer"] = made.model
        modules.extend(weakref.ref(module) for module in made.model.modules())
        return made

    def other(*given, **options):
        left.append(sum(module() is not None for module in modules))
        return second(*given, **options)

    monkeypatch.setattr(speaker, "load_checked", loaded)
    monkeypatch.setattr(speaker, "load_other", other)
    gc.disable()  # it comes when it likes
    try:
        again.compare(*QUERIES[0], new_adapter=retrained)
    finally:
        gc.enable()
    assert len(modules) > 10 and left == [0]


def test_nobody_else_uses_the_loaded_model_meanwhile(database, retrained, monkeypatch):
    free, original = [], speaker.judge

    def judged(*given, **options):
        with ThreadPoolExecutor(1) as pool:
            free.append(pool.submit(database._engine.alone.acquire, blocking=False).result())
        return original(*given, **options)

    monkeypatch.setattr(speaker, "judge", judged)
    database.compare(*QUERIES[0], new_adapter=retrained)
    assert free == [False]


def test_what_does_not_fit_the_memory_is_halved(database, retrained, monkeypatch, caplog):
    (wanted,) = database.compare(*QUERIES[1], new_adapter=retrained)
    original, sizes, most = likelihood.batch_losses, [], 1

    def small(loaded, batch, **options):
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("out of memory")
        return original(loaded, batch, **options)

    monkeypatch.setattr(likelihood, "batch_losses", small)
    found = database.compare(queries=queries(), new_adapter=retrained)
    assert sizes == [3, 1, 2, 1, 1] * 2 and "does not fit the memory: going on with 1" in caplog.text
    assert [(t.loss_before, t.loss_after) for t in found[1].tokens] == [
        (pytest.approx(t.loss_before, rel=1e-5), pytest.approx(t.loss_after, rel=1e-5)) for t in wanted.tokens
    ]
    most = 0
    with pytest.raises(GradientError, match=r"^0 does not fit the memory, even alone: it takes another device"):
        database.compare(queries=queries()[:1], new_adapter=retrained)


def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(
    database, models, retrained, tmp_path, monkeypatch
):
    def without(place, pattern):
        place = shutil.copytree(place, tmp_path / f"{place.name} without {pattern.strip('*')}")
        for file in place.glob(pattern):
            file.unlink()
        return place

    broken = shutil.copytree(retrained, tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    (tmp_path / "demo" / "retrained").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    again = rapidin_vdb.open(database.path)
    monkeypatch.setattr(speaker, "load_checked", lambda *_, **__: pytest.fail("a model is loaded"))
    asked = dict(zip(("prompt", "generation"), QUERIES[0], strict=True))
    for options, error, message in (
        ({}, SpecError, "give what was trained anew: --new-adapter FOLDER, or --new-model FOLDER, or both"),
        ({"new_adapter": tmp_path}, ModelError, "has no adapter_config.json"),
        ({"new_adapter": "./nowhere"}, ModelError, "no adapter at ./nowhere: no such folder"),
        (
            {"new_model": retrained},
            ModelError,
            r"holds an adapter \(adapter_config.json\), and is given as a model. Give it as --new-adapter, which is put",
        ),
        ({"new_model": without(models["llama"], "config.json")}, ModelError, "has no config.json"),
        ({"new_model": without(models["llama"], "model.safetensors")}, ModelError, "has no model.safetensors"),
        ({"new_model": without(models["llama"], "tokenizer*")}, ModelError, "without a tokenizer|no tokenizer can be"),
        ({"new_adapter": without(retrained, "adapter_model.safetensors")}, ModelError, "no adapter_model.safetensors"),
        ({"new_adapter": broken}, ModelError, "the configuration of the adapter .*broken cannot be read"),
        ({"new_adapter": "demo/retraind"}, ModelError, "no adapter at demo/retraind: no such folder in demo, which is"),
        ({"new_adapter": "demo/no name"}, ModelError, "no adapter at demo/no name: no such folder in demo, which is"),
        (
            {"new_model": "demo/retraind"},
            ModelError,
            "no model at demo/retraind: no such folder in demo, which is here",
        ),
        ({"new_adapter": retrained, "model": tmp_path}, ModelError, "has no config.json"),
        ({"new_model": models["llama"], "adapter": tmp_path}, ModelError, "has no adapter_config.json"),
        (
            {"new_adapter": retrained, "answer_tokens": -1},
            SpecError,
            r"--answer-tokens is -1; wanted 0 \(none\) to 4096",
        ),
        ({"new_adapter": retrained, "focus": ""}, SpecError, "--focus is empty"),
        ({"new_adapter": retrained, "file": "q.jsonl"}, SpecError, "give one of: --prompt and --generation, or --file"),
    ):
        with pytest.raises(error, match=message):
            again.compare(**asked, **options)
    with pytest.raises(CorpusError, match="no such file"):
        again.compare(file=tmp_path / "none.jsonl", new_adapter=retrained)
    assert again.compare(queries=[], new_adapter=retrained) == []


def test_what_is_no_model_for_these_tokens_is_refused(database, models, adapters, retrained, tmp_path, monkeypatch):
    other = save_model(tmp_path / "other", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["blue"])
    tokenizer.save_pretrained(other)
    asked = [queries()[place] for place in (2, 0)]  # the word stands in the second alone
    (one,) = database.compare(queries=asked[:1], new_model=other)
    assert one.loss_after == pytest.approx(slow_losses(other, None, *QUERIES[2]).mean(), rel=2e-5)
    again = rapidin_vdb.open(database.path)
    monkeypatch.setattr(speaker, "judge", lambda *_, **__: pytest.fail("a model judges"))
    for one in (database, again):
        with pytest.raises(
            ModelError,
            match="has another tokenizer than the database's .* makes other tokens of query 0: losses of other tokens",
        ):
            one.compare(queries=asked, new_model=other)
    monkeypatch.undo()
    with pytest.raises(FingerprintError, match="adapter_hash is"):
        rapidin_vdb.open(database.path).compare(*QUERIES[0], new_adapter=retrained, adapter=retrained)
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(retrained, tmp_path / "broken") / "adapter_model.safetensors"
    weights = load_file(broken)
    save_file({name: torch.full_like(old, float("nan")) for name, old in weights.items()}, broken, {"format": "pt"})
    with pytest.raises(ModelError, match="query: the loss of the model .* is not finite; look at its weights"):
        database.compare(*QUERIES[0], new_adapter=broken.parent)


def test_a_token_beyond_the_model_is_said(database):
    loaded = database._loaded().loaded
    from conftest import encoded

    sample = encoded(1)
    with pytest.raises(ModelError, match=r"s01: token id 259, but the model .* knows only 259 tokens"):
        likelihood.evaluate_losses(loaded, [replace(sample, input_ids=(*sample.input_ids[:-1], 259))])


def test_a_model_of_fewer_positions_is_said_to_know_them_not(models, adapters, tmp_path):
    """An embedding of positions ends where it ends; on a GPU, that ends the process's work there."""
    made = rapidin_vdb.init(tmp_path / "db", model=models["gpt2"], adapter=adapters["gpt2"], width=64)
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 259, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 200}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "short")
    byte_tokenizer().save_pretrained(tmp_path / "short")
    assert len(made.compare(*QUERIES[0], new_model=tmp_path / "short")) == 1
    with pytest.raises(ModelError, match=r"query has [0-9]+ tokens, and the model .*short knows only 200 positions"):
        made.compare("Say 5", "x" * 100, new_model=tmp_path / "short")


def told(capsys, *arguments) -> tuple[int, str, str]:
    from rapidin_vdb.cli import main

    sys.argv = ["rapidin-vdb", *map(str, arguments)]
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


def test_the_command_prints_a_table_or_lines_of_json(database, adapters, retrained, tmp_path, capsys):
    records = [{"query_id": f"q{n}", "prompt": p, "generation": g * (1 + 8 * n)} for n, (p, g) in enumerate(QUERIES)]
    file = write_jsonl(tmp_path / "q.jsonl", records)
    asked = ("compare", database.path, "--file", file, "--new-adapter", retrained)
    code, out, err = told(capsys, *asked, "--answer-tokens", 5)
    assert code == 0, err
    head, *lines = out.splitlines()
    assert head.split() == ["tokens", "before", "after", "query_id", "generation"]
    assert [line.split()[3] for line in lines[::2]] == ["q0", "q1", "q2"]
    assert all(line.strip().startswith("now: ") for line in lines[1::2]) and max(map(len, out.splitlines())) <= 80
    code, out, err = told(capsys, *asked, "--json")
    values = [json.loads(line) for line in out.splitlines()]
    assert [list(value) for value in values] == [
        ["query_id", "prompt", "generation", "loss_before", "loss_after", "change", "tokens"]
    ] * 3
    assert list(values[0]["tokens"][0]) == ["text", "start", "end", "loss_before", "loss_after"]
    assert [float(line.split()[1]) for line in lines[::2]] == [
        pytest.approx(value["loss_before"], abs=6e-4) for value in values
    ]
    assert all(value["change"] == value["loss_after"] - value["loss_before"] for value in values)
    less = sum(value["loss_after"] > value["loss_before"] for value in values)
    before, after = (np.mean([value[side] for value in values]) for side in ("loss_before", "loss_after"))
    unfolded = " ".join(err.split())
    assert unfolded.startswith(
        f"{less} generation{'' if less == 1 else 's'} {'is' if less == 1 else 'are'} less likely"
    )
    assert f"of 3; the loss is {before:.3f} before and {after:.3f} after" in unfolded
    code, _, err = told(capsys, *asked[:-1], adapters["llama"])
    assert code == 0 and "0 generations are less likely now, of 3" in err
    assert "every loss is the same: is this the model that was trained anew?" in err
    assert told(capsys, *asked[:2], "--new-adapter", retrained)[0] == 2
