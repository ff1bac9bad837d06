"""Training that may be interrupted at any moment, what it leaves, and what the trained model says."""

import dataclasses
import json
import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, encoded, save_model, tiny_model, toy_records, write_jsonl
from safetensors.torch import load_file

from rapidin_vdb.errors import ModelError, SpecError
from rapidin_vdb.gradient import load_model, training, tuning
from rapidin_vdb.gradient.generation import generate_batch, generate_one
from rapidin_vdb.gradient.model import LoadedModel
from rapidin_vdb.gradient.training import linear_layers, save, with_lora
from rapidin_vdb.gradient.tuning import Tuning, tune
from rapidin_vdb.gradient.tuning_state import finished
from rapidin_vdb.records import Encoded, ModelSpec

SCRIPTS = Path(__file__).parent.parent / "scripts"


SAMPLES = [encoded(number) for number in range(8)]
FEW = Tuning(epochs=2.0, batch=4, learning_rate=1e-2, seed=5)


class Killed(BaseException):
    """As a kill, nothing is tidied up after it."""


def killer(stop: int | None):
    def progress(stage, step, total):
        if step == stop:
            raise Killed

    return progress


def forbidden(*arguments, **options):
    raise AssertionError("this was done already")


def values(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What a model says


def tokenizer_that(padding: bool = True, begins: bool = True, ends: bool = False, end: bool = True):
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    if ends:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if begins else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    if not padding:
        tokenizer.pad_token = None
    if not end:
        tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    "options",
    [{}, {"ends": True}, {"padding": False}, {"padding": False, "end": False}],
    ids=["usual", "ends every text", "no padding", "no padding and no end"],
)
def test_many_prompts_at_once_are_continued_like_one(options):
    """By hand: the most likely token behind the prompt, which begins once and is not ended, and so on."""
    model, tokenizer = tiny_model("llama", seed=3).eval(), tokenizer_that(**options)
    for tensor in model.parameters():
        tensor.data *= 8  # fresh weights are so small that it matters little what came before
    loaded = LoadedModel(
        spec=ModelSpec(model="toy"), model=model, tokenizer=tokenizer, theta={}, device="cpu", dtype="float32"
    )
    prompts = ["Say 5", "<s>Howdy, what is it?", "x", "<s>Tell me more of the sea and of what is in it"]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([[1, *(tokenizer(prompt.removeprefix("<s>"), add_special_tokens=False)["input_ids"])]])
        length = ids.shape[1]
        with torch.no_grad():
            for _ in range(12):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(2)], 1)
                if ids[0, -1] == 2 and tokenizer.eos_token:
                    break
        wanted.append(tokenizer.decode(ids[0, length:], skip_special_tokens=True))
    for penalty in (1.0, 1.3):
        model.generation_config.repetition_penalty = penalty
        assert generate_batch(model, tokenizer, prompts, max_tokens=12, batch=3) == wanted
        model.generation_config.repetition_penalty = penalty
        assert [
            generate_one(loaded, prompt, max_tokens=12, temperature=0.0, seed=0).text for prompt in prompts
        ] == wanted


def test_a_prompt_of_no_tokens_is_refused():
    tokenizer = tokenizer_that(ends=True, begins=False)
    assert tokenizer("")["input_ids"] == [2]
    with pytest.raises(SpecError, match="the prompt is empty"):
        generate_batch(tiny_model("llama"), tokenizer, ["x", ""], max_tokens=2)


# Training


@pytest.mark.parametrize("bfloat16", [False, True])
def test_an_interrupted_training_ends_as_an_undisturbed_one(models, tmp_path, bfloat16):
    settings = Tuning(epochs=3.0, batch=3, learning_rate=1e-2, micro_tokens=24, seed=5, bfloat16=bfloat16)

    def run(stop: int | None, **options) -> tuple[list[float], dict]:
        loaded = load_model(ModelSpec(model=str(models["llama"]), parameters="all"), device="cpu")
        losses = tune(loaded.model, SAMPLES, settings, progress=killer(stop), **options)
        return losses, values(loaded.model)

    losses, weights = run(None)
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    state = tmp_path / "state"
    with pytest.raises(Killed):
        run(5, state=state, save_seconds=0.0)
    again, other = run(None, state=state, save_seconds=0.0)
    assert again == losses and same(weights, other)
    finished(state)
    assert not state.exists()


def test_training_shows_every_sample_once_an_epoch():
    settings = Tuning(epochs=2.0, batch=3)
    seen = [number for step in range(16) for number in tuning._batch(step, 8, settings)]
    epochs = [seen[place : place + 8] for place in range(0, 48, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and epochs[0] != epochs[1]


def uneven() -> list[Encoded]:
    """Samples of 4 to 13 response tokens: the mean over a batch's tokens is no mean over its samples."""
    made = [encoded(number, length=20) for number in range(8)]
    return [
        dataclasses.replace(sample, offsets=tuple((place, place + 1) for place in range(4 + 9 * (number % 2))))
        for number, sample in enumerate(made)
    ]


def mean_token_loss(model, batch: list[Encoded]) -> torch.Tensor:
    """Each sample alone, without padding: the surprise of each token of its response, over all tokens of the batch."""
    losses = []
    for sample in batch:
        said = torch.log_softmax(model(input_ids=torch.tensor([sample.input_ids])).logits[0].float(), -1)
        first = len(sample.input_ids) - sample.response_tokens
        losses += [-said[place - 1, sample.input_ids[place]] for place in range(first, len(sample.input_ids))]
    return torch.stack(losses).mean()


def test_a_training_is_the_plain_loop():
    """Whole batches, torch's own clipping and AdamW, and the learning rates written out."""
    settings = Tuning(
        epochs=2.0, batch=4, learning_rate=3e-3, warm_up=0.5, weight_decay=0.5, clip=1.0, micro_tokens=60, seed=9
    )
    # In double precision: Adam makes as much of a gradient that is rounding alone as of any other.
    samples, model, plain = uneven(), tiny_model("llama").double(), tiny_model("llama").double()
    losses = tune(model, samples, settings)
    # A rise in two steps, and half a cosine over the other two: its top, and its middle.
    rates = [3e-3 * share for share in (0.5, 1.0, 1.0, 0.5)]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    wanted, norms, tokens = [], [], set()
    for step, rate in enumerate(rates):
        batch = [samples[number] for number in tuning._batch(step, len(samples), settings)]
        assert sum(len(sample.input_ids) for sample in batch) > 60, "it goes through the model in parts"
        tokens.add(sum(sample.response_tokens for sample in batch))
        loss = mean_token_loss(plain, batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        wanted.append(float(loss.detach()))
    # Else AdamW, to which a scale is nothing, would forgive a wrong one of all gradients.
    assert len(tokens) > 1 and min(norms) < 0.95 < 1.05 < max(norms), (tokens, norms)
    assert losses == pytest.approx(wanted, abs=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_parts_of_a_batch_train_as_the_whole():
    """One sample at a time as all at once."""
    found, passes = [], []
    for micro_tokens in (1, 100_000):
        model = tiny_model("llama").double()
        calls: list[int] = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        settings = Tuning(
            epochs=1.5, batch=4, learning_rate=3e-3, warm_up=0.0, clip=1.0, micro_tokens=micro_tokens, seed=9
        )
        losses = tune(model, uneven(), settings)
        found.append((losses, values(model)))
        passes.append(len(calls))
    (one, ours), (other, theirs) = found
    assert passes == [12, 3] and one == pytest.approx(other, abs=1e-5)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "total", "warm_up", "share"),
    [
        (0, 20, 0.2, 0.25),  # it begins above zero
        (2, 20, 0.2, 0.75),
        (3, 20, 0.2, 1.0),  # the last of the four in which it rises
        (4, 20, 0.2, 1.0),  # the top of the cosine
        (8, 20, 0.2, 0.85355339),  # (1 + cos 45 degrees) / 2
        (12, 20, 0.2, 0.5),
        (16, 20, 0.2, 0.14644661),
        (19, 20, 0.2, 0.00960736),  # (1 + cos 168.75 degrees) / 2: not yet zero
        (0, 10, 0.0, 1.0),  # one step at least
        (9, 10, 0.0, 0.03015369),  # 8 of 9 parts of the cosine
        (9, 10, 1.0, 1.0),  # all of them rise
        (0, 1, 0.15, 1.0),
        (304, 2031, 0.15, 1.0),  # the paper's: 305 of 2,031
        (303, 2031, 0.15, 0.99672131),
    ],
)
def test_the_learning_rate_rises_and_falls(step, total, warm_up, share):
    assert tuning._schedule(step, total, warm_up) == pytest.approx(share, abs=1e-6)


def test_what_is_trained_stays_until_it_is_saved(tmp_path, monkeypatch):
    state, model = tmp_path / "state", tiny_model("llama")
    losses = tune(model, SAMPLES, FEW, state=state)
    monkeypatch.setattr(tuning, "_step", forbidden)
    again = tiny_model("llama")
    assert tune(again, SAMPLES, FEW, state=state) == losses and len(losses) == 4
    assert same(values(again), values(model)) and not same(values(again), values(tiny_model("llama")))
    (state / "notes.txt").write_text("not ours")
    finished(state)
    assert [path.name for path in state.iterdir()] == ["notes.txt"]
    finished(state)
    finished(tmp_path / "nothing")


def test_a_state_without_its_weights_is_none(tmp_path, monkeypatch):
    """Also where the end came while the state was removed, at whatever moment."""
    state = tmp_path / "state"
    losses = tune(tiny_model("llama"), SAMPLES, FEW, state=state)
    (state / "step-4.safetensors").unlink()

    def half(tensors, path):
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("safetensors.torch.save_file", half)
        tune(tiny_model("llama"), SAMPLES, FEW, state=state)
    assert tune(tiny_model("llama"), SAMPLES, FEW, state=state) == losses
    unlink = Path.unlink

    def dies(path, **options):
        if path.name.startswith("step"):
            raise Killed
        unlink(path, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", dies)
        finished(state)
    assert not (state / "state.json").exists() and (state / "step-4.safetensors").exists()
    assert tune(tiny_model("llama"), SAMPLES, FEW, state=state) == losses


def lora(base: int = 0, rank: int = 2, alpha: int = 4, seed: int = 7):
    return with_lora(tiny_model("llama", seed=base), rank=rank, alpha=alpha, modules=["q_proj"], seed=seed)


def changed(number: int, **fields) -> list[Encoded]:
    return [dataclasses.replace(s, **fields) if n == number else s for n, s in enumerate(SAMPLES)]


@pytest.mark.parametrize(
    ("differing", "model", "samples", "settings"),
    [
        ("tokens", {}, changed(3, input_ids=(1, 60, *SAMPLES[3].input_ids[2:])), FEW),
        ("tokens", {}, changed(3, offsets=SAMPLES[3].offsets[1:]), FEW),
        ("tokens", {}, SAMPLES[::-1], FEW),
        ("parameters, beginning", {"rank": 3}, SAMPLES, FEW),
        ("beginning", {"base": 1}, SAMPLES, FEW),
        ("beginning", {"alpha": 5}, SAMPLES, FEW),
        ("beginning", {"seed": 8}, SAMPLES, FEW),
        ("tuning", {}, SAMPLES, dataclasses.replace(FEW, learning_rate=2e-2)),
    ],
)
def test_the_state_of_another_training_is_refused(tmp_path, differing, model, samples, settings):
    state = tmp_path / "state"
    with pytest.raises(Killed):
        tune(lora(), SAMPLES, FEW, state=state, save_seconds=0.0, progress=killer(3))
    with pytest.raises(ModelError, match=rf"holds the state of another training \(differing: {differing}\); remove it"):
        tune(lora(**model), samples, settings, state=state)
    assert len(tune(lora(), SAMPLES, FEW, state=state)) == 4


def test_a_state_that_cannot_be_read_says_so(tmp_path):
    state = tmp_path / "state"
    tune(lora(), SAMPLES, FEW, state=state)
    whole = (state / "step-4.safetensors").read_bytes()
    (state / "step-4.safetensors").write_bytes(whole[:-7])
    with pytest.raises(ModelError, match="state cannot be read: .*; remove it, and the training begins anew"):
        tune(lora(), SAMPLES, FEW, state=state)


class Routed(torch.nn.Module):
    """A model with a part for one token only, and one for none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(90, 8)
        self.head = torch.nn.Linear(8, 90)
        self.late = torch.nn.Linear(8, 8)
        self.never = torch.nn.Linear(8, 8)
        self.device = torch.device("cpu")

    def forward(self, input_ids, **options):
        hidden = self.embedding(input_ids)
        if (input_ids == 85).any():
            hidden = hidden + self.late(hidden)
        return SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_parts_that_had_no_gradient_yet_go_on_as_they_were(tmp_path, stop):
    """Each with its own count of steps, on which AdamW's correction for its beginning depends."""
    settings = Tuning(epochs=3.0, batch=4, learning_rate=1e-2, weight_decay=0.1, seed=1)
    plain = [encoded(number, length=9) for number in range(7)]
    order = list(tuning._batch(0, 8, settings))
    # In no micro-batch of the first step.
    place = next(number for number in range(8) if number not in order)
    rare = dataclasses.replace(encoded(9), input_ids=(1, 85, *encoded(9).input_ids[2:]))
    samples = [*plain[:place], rare, *plain[place:]]
    undisturbed, model = Routed(), Routed()
    losses = tune(undisturbed, samples, settings)
    state = tmp_path / "state"
    with pytest.raises(Killed):
        tune(Routed(), samples, settings, state=state, save_seconds=0.0, progress=killer(stop + 1))
    assert tune(model, samples, settings, state=state) == losses
    assert same(values(model), values(undisturbed))
    assert not torch.equal(model.late.weight, Routed().late.weight)
    assert torch.equal(model.never.weight, Routed().never.weight)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0.0, "epochs is 0.0; wanted more than 0"),
        ("epochs", -1.0, "epochs is -1.0; wanted more than 0"),
        ("epochs", float("nan"), "epochs is nan; wanted more than 0"),
        ("batch", 0, "batch is 0; wanted 1 or more"),
        ("learning_rate", float("inf"), "learning_rate is inf; wanted more than 0"),
        ("warm_up", 1.5, "warm_up is 1.5; wanted 0 to 1"),
        ("weight_decay", -0.1, "weight_decay is -0.1; wanted 0 or more"),
        ("clip", 0.0, "clip is 0.0; wanted more than 0"),
        ("micro_tokens", 0, "micro_tokens is 0; wanted 1 or more"),
        ("seed", 1 << 60, "wanted 0 or more, less than 2^40"),
    ],
)
def test_numbers_that_make_no_training_are_refused(field, value, message):
    with pytest.raises(SpecError, match=message.replace("^", r"\^")):
        Tuning(**{field: value})


def test_no_samples_are_refused():
    with pytest.raises(SpecError, match="there are no samples to train on"):
        tune(tiny_model("llama"), [], FEW)


# What is saved


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "over another"])
def test_a_model_that_is_there_is_whole(tmp_path, monkeypatch, kind, before):
    """Killed before each write, one after the other; and then done again."""
    mark = "config.json" if kind == "model" else "adapter_config.json"
    made = tiny_model("llama", seed=2) if kind == "model" else lora(base=2)
    save(made, byte_tokenizer(), tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert mark in whole and "tokenizer.json" in whole and ".saving" not in whole
    killed, number = True, 0
    while killed:
        killed, number = False, number + 1
        folder, calls = tmp_path / f"killed-{number}", 0

        def counted(work, number=number):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == number:
                    raise Killed
                return work(*arguments, **options)

            return call

        if before:
            other = tiny_model("llama", seed=1) if kind == "model" else lora(base=1, seed=1)
            other.save_pretrained(folder, **({"max_shard_size": "10KB"} if kind == "model" else {}))
            byte_tokenizer().save_pretrained(folder)
        old = {path.name: path.read_bytes() for path in folder.glob("*")}
        tokenizer = byte_tokenizer()
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "rmdir", "mkdir"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            for who in (made, tokenizer):
                patch.setattr(who, "save_pretrained", counted(who.save_pretrained))
            try:
                save(made, tokenizer, folder)
            except Killed:
                killed = True

        def files(folder=folder) -> dict[str, bytes]:
            return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}

        if (folder / mark).exists():
            assert files() in (whole, old), number
        save(made, byte_tokenizer(), folder)
        assert files() == whole and not (folder / ".saving").exists()
    assert number > 5


def test_the_linear_layers_are_named_where_a_module_is_none():
    assert linear_layers(tiny_model("gpt2")) == ["c_attn", "c_proj", "c_fc", "lm_head"]
    for name in ("q_proj", "ln_1"):
        with pytest.raises(ModelError, match=f"fits the modules {name}: .* linear layers are c_attn, c_proj, c_fc, lm"):
            with_lora(tiny_model("gpt2"), rank=2, modules=[name], seed=1)


# The scripts


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script as the command line does, and return the last line that it prints."""

    def run(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()[-1]

    return run


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", toy_records(6))


SMALL = ("--vocabulary", 300, "--hidden", 16, "--layers", 1, "--heads", 2, "--window", 16, "--tokens", 1600)
QUICK = ("--batch", 3, "--epochs", 1, "--rank", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 0), "^epochs is 0.0; wanted more than 0$"),
        (("--epochs", -2), "^epochs is -2.0; wanted more than 0$"),
        (("--batch", 0), "^batch is 0; wanted 1 or more$"),
        (("--learning-rate", 0), "^learning_rate is 0.0; wanted more than 0$"),
        (("--rank", 0), "^--rank is 0; wanted 1 or more$"),
        (("--alpha", 0), "^--alpha is 0; wanted 1 or more$"),
        (("--max-tokens", 0), "^--max-tokens is 0; wanted 1 or more$"),
        (("--max-tokens", 5), "^all 6 records are left out, the first for this: .*no response token is left"),
        (("--device", "abacus"), "^--device abacus is no device"),
        (("--template", "nothing"), "nothing"),
        (("--modules", "q_proj,c_attn"), "^--modules names c_attn, which the model does not have; its linear layers are: q_proj,k_proj,v_proj,o_proj,gate_proj"),
        (("--modules", ","), "^--modules names nothing; its linear layers are: q_proj,"),
        (("--modules", "input_layernorm"), "fits the modules input_layernorm: .* linear layers are q_proj, k_proj"),
        (("--model", "/nowhere"), "^no model at /nowhere: no such folder$"),
    ],
)  # fmt: skip
def test_finetune_says_in_one_line_what_is_wrong(script, models, corpus, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as exit_of:
        script("finetune", corpus, "--model", models["llama"], "--dir", tmp_path / "out", *QUICK, *arguments)
    assert "\n" not in str(exit_of.value.code)
    assert not (tmp_path / "out").exists()


def test_finetune_says_which_record_is_bad(script, models, tmp_path):
    files = {"bad": '{"id": "x", "instruction": "Say", "output": ""}\n', "no json": "{\n", "empty": ""}
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(toy_line() + text if text else "")
    options = ("--model", models["llama"], "--dir", tmp_path / "out", *QUICK)
    with pytest.raises(SystemExit, match=r"bad.jsonl.*2: the response is empty.*; mend the record, or leave it out$"):
        script("finetune", tmp_path / "bad.jsonl", *options)
    with pytest.raises(SystemExit, match=r"no json.jsonl"):
        script("finetune", tmp_path / "no json.jsonl", *options)
    with pytest.raises(SystemExit, match=r"empty.jsonl"):
        script("finetune", tmp_path / "empty.jsonl", *options)
    with pytest.raises(SystemExit, match=r"missing.jsonl"):
        script("finetune", tmp_path / "missing.jsonl", *options)


def toy_line() -> str:
    return json.dumps(toy_records(1)[0]) + "\n"


def test_finetune_does_not_train_in_16_bits_unasked(script, corpus, tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for name, options, dtype in (("auto", (), torch.float32), ("asked", ("--dtype", "bfloat16"), torch.bfloat16)):
        script("finetune", corpus, "--model", tmp_path / "model", "--dir", tmp_path / name, "--full", *QUICK, *options)
        weights = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {dtype}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_finetune_takes_gpt2(script, corpus, tmp_path, quantization):
    save_model(tmp_path / "model", "gpt2", hidden=64)
    options = ("--model", tmp_path / "model", "--quantization", quantization, *QUICK)
    made = json.loads(script("finetune", corpus, *options, "--dir", tmp_path / "out", "--modules", "c_attn,c_proj"))
    assert (made["samples"], made["steps"]) == (6, 2)
    load_model(ModelSpec(model=str(tmp_path / "model"), adapter=str(tmp_path / "out"), quantization=quantization))
    with pytest.raises(SystemExit, match="^--modules names q_proj, .* its linear layers are: c_attn,c_proj,c_fc,lm"):
        script("finetune", corpus, *options, "--dir", tmp_path / "other")


@pytest.mark.parametrize("full", [(), ("--full",)], ids=["adapter", "full"])
def test_finetune_goes_on_where_it_was_killed(script, models, corpus, tmp_path, monkeypatch, full):
    """After the training, while the model is saved, and before the state is removed."""
    from transformers import PreTrainedTokenizerFast

    def run(name: str) -> dict:
        return json.loads(
            script("finetune", corpus, "--model", models["llama"], "--dir", tmp_path / name, *QUICK, *full)
        )

    wanted, out = run("undisturbed"), tmp_path / "out"
    mark, weights = ("config.json", "model") if full else ("adapter_config.json", "adapter_model")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", dies)
        run("out")
    assert not (out / mark).exists() and (out / "state" / "state.json").exists()
    monkeypatch.setattr(tuning, "_step", forbidden)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("rapidin_vdb.gradient.tuning_state.finished", dies)
        assert run("out") == wanted
    assert (out / mark).exists() and (out / "state" / "state.json").exists()
    with pytest.raises(SystemExit, match="out is there already; give another --dir, or remove it"):
        run("out")
    assert not (out / "state").exists()
    found, undisturbed = (load_file(tmp_path / name / f"{weights}.safetensors") for name in ("out", "undisturbed"))
    assert same(found, undisturbed)


def dies(*arguments, **options):
    raise Killed


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        (0, (), "^0 records were found; wanted more than 200"),
        (200, (), "^200 records were found; wanted more than 200"),
        (201, ("--window", 256), "^the texts to train on are shorter than one window of 256 tokens; give more records"),
        (230, ("--tokens", 0), "^--tokens is 0; wanted 1 or more$"),
        (230, ("--window", 1), "^--window is 1; wanted 2 or more$"),
        (230, ("--window", 513), "^--window is 513; wanted no more than 512, "),
        (230, ("--heads", 3), "^--hidden is 16; wanted a multiple of twice --heads, 6$"),
        (230, ("--batch", 0), "^batch is 0; wanted 1 or more$"),
        (230, ("--learning-rate", -1), "^learning_rate is -1.0; wanted more than 0$"),
        (230, ("--vocabulary", 20), "^--vocabulary is 20; wanted 259 or more$"),
    ],
)
def test_pretrain_says_in_one_line_what_is_wrong(script, tmp_path, records, arguments, message):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", toy_records(records))
    with pytest.raises(SystemExit, match=message) as exit_of:
        script("pretrain", corpus, "--dir", tmp_path / "out", *SMALL, *arguments)
    assert "\n" not in str(exit_of.value.code) and not (tmp_path / "out").exists()


def test_pretrain_looks_at_what_is_held_out_before_it_trains(script, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_step", forbidden)
    monkeypatch.setattr(training, "POSITIONS", 1024)  # 200 texts fill a window of 512, however short they are
    monkeypatch.setattr(random.Random, "shuffle", lambda *arguments: None)
    records = [{"text": "x"}] * 200 + [{"text": "red, blue " * 200}] * 20
    corpus = write_jsonl(tmp_path / "corpus.jsonl", records)
    with pytest.raises(SystemExit, match="^the texts held out are shorter than one window of 1000 tokens"):
        script("pretrain", corpus, "--dir", tmp_path / "out", *SMALL, "--window", 1000, "--vocabulary", 259)


def test_pretrain_goes_on_where_it_was_killed(script, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    corpus = write_jsonl(tmp_path / "corpus.jsonl", toy_records(230))

    def run(name: str) -> dict:
        made = json.loads(script("pretrain", corpus, "--dir", tmp_path / name, *SMALL))
        return {key: value for key, value in made.items() if key != "seconds"}

    wanted = run("undisturbed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", dies)
        run("out")
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(tuning, "_step", forbidden)
    assert run("out") == wanted and not (tmp_path / "out" / "state").exists()
    found, undisturbed = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "undisturbed"))
    assert same(found, undisturbed)


def test_windows_take_all_that_fills_one():
    windows = runpy.run_path(str(SCRIPTS / "pretrain.py"))["windows"]
    for letters, wanted in ((5, 0), (6, 1), (7, 1), (13, 1), (14, 2), (15, 2)):
        found = windows(["x" * letters], byte_tokenizer(), length=8)
        assert [len(window.input_ids) for window in found] == [8] * wanted, letters


def test_an_experiment_keeps_what_it_trained(models, tmp_path, monkeypatch):
    from rapidin_vdb.evaluate import experiment
    from rapidin_vdb.evaluate.profiles import PROFILES

    profile = dataclasses.replace(PROFILES["quick"], batch=3, rank=2, max_tokens=512)

    def tuned(name: str) -> dict:
        made = experiment.Experiment(
            tmp_path / name,
            name="any",
            model=str(models["llama"]),
            profile=profile,
            seed=1,
            inputs={},
            say=lambda text: None,
        )
        made = made.tuned(toy_records(6), epochs=1.0)
        return {key: value for key, value in made.items() if "seconds" not in key and key != "timed_steps"}

    wanted = tuned("undisturbed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(experiment, "save", dies)
        tuned("out")
    monkeypatch.setattr(tuning, "_step", forbidden)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(experiment, "finished", dies)
        tuned("out")
    assert tuned("out") == wanted and not (tmp_path / "out" / "state").exists()


def test_labels_stand_where_the_loss_is_also_between_other_turns():
    plain = Encoded(sample_id="a", input_ids=(1, 5, 6, 2), offsets=((0, 1), (1, 1)), truncated=False)
    turns = dataclasses.replace(plain, input_ids=(1, 7, 8, 9, 3, 2), places=(1, 5))
    _, mask, labels = training.padded([plain, turns])
    assert labels.tolist() == [[-100, -100, 6, 2, -100, -100], [-100, 7, -100, -100, -100, 2]]
    assert mask.sum(1).tolist() == [4, 6]
