"""Toys made from a seed: a byte tokenizer, models of three architectures, adapters; no download, no network."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

collect_ignore = ["warm.py"]  # for processes that others are forked from
# Begun first, so that no process has one of them left when the others are done.
LONGEST = (
    "evaluate", "web_controls", "object_store", "tokens", "web_messages", "cluster", "freshness", "web_page", "web_steps",
    "cli", "compute", "whole", "faults", "page", "verify", "web_turns", "web_reads", "together", "factor",
)  # fmt: skip
ARCHITECTURES = ("llama", "qwen2", "gpt2")
SECRET = "not-to-be-printed-0123456789"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that need minutes")
    parser.addoption("--experiments", action="store_true", help="of these, run the quick experiments only")


def pytest_configure(config):
    # The same cases every time; other ones with RAPIDIN_CASES=N of each kind, drawn anew at each run.
    cases = int(os.environ.get("RAPIDIN_CASES", "0"))
    settings.register_profile(
        "rapidin",
        max_examples=cases or (2000 if config.getoption("--slow") else 60),
        derandomize=not cases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("rapidin")


def pytest_collection_modifyitems(config, items):
    everything, experiments = config.getoption("--slow"), config.getoption("--experiments")
    for item in items:
        if "slow" in item.keywords and not everything:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if "experiment" in item.keywords and not everything and not experiments:
            item.add_marker(pytest.mark.skip(reason="slow; run with --experiments or --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    places = {Path(__file__).with_name(f"test_{name}.py"): place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(request, monkeypatch):
    """No power is lost within a test; thousands of commits would wait for some 20 ms each."""
    if request.module is not None and request.module.__name__ != "test_durable":
        monkeypatch.setattr("rapidin_vdb.store.durable._sync", lambda *_: None)


def byte_tokenizer():
    """One token a byte, after the beginning-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + place for place, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_model(architecture: str, *, seed: int = 0, hidden: int = 16):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shared = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=hidden, n_layer=2, n_head=2, n_positions=512, **shared))
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config, model = classes[architecture]
    return model(
        config(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=architecture == "qwen2",
            **shared,
        )
    )


def save_model(folder: Path, architecture: str, **options) -> Path:
    tiny_model(architecture, **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_chat_model(folder: Path, *, begin: str = "<|im_start|>") -> tuple[Path, Any]:
    """Save a model whose tokenizer has a chat template with markers of its vocabulary; return it and the tokenizer."""
    save_model(folder, "llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{begin}{{{{ m.role }}}}\n{{{{ m.content }}}}<pad>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{begin}assistant\n{{% endif %}}"
    )
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def save_adapter(folder: Path, architecture: str, **options) -> Path:
    from peft import LoraConfig, get_peft_model

    modules = ["c_attn", "c_proj"] if architecture == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    model = tiny_model(architecture, **options)
    torch.manual_seed(1)
    # Not the usual zeros in B: a trained adapter has none.
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False, fan_in_fan_out=architecture == "gpt2")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name, name) for name in ARCHITECTURES}


def real_adapter(folder: Path, shared: Path) -> Path:
    """A LoRA adapter with random weights for the real model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "tinystories-260k")
    torch.manual_seed(2)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    get_peft_model(model, LoraConfig(r=8, target_modules=modules, init_lora_weights=False)).save_pretrained(folder)
    return folder


def toy_records(count: int, *, first: int = 0) -> list[dict]:
    colours = ("red", "blue", "grün", "黄")
    return [
        {
            "id": f"toy-{number:03d}",
            "instruction": f"Say {number}",
            "output": f"{colours[number % 4]} {number * 7}",
            "source": "even" if number % 2 == 0 else "odd",
            "stars": number % 5,
        }
        for number in range(first, first + count)
    ]


def encoded(number: int, length: int = 9):
    """A sample of a few tokens, by its number."""
    from rapidin_vdb.records import Encoded

    draw = random.Random(number)
    return Encoded(
        sample_id=f"s{number:02d}",
        input_ids=(1, *(draw.randrange(40, 80) for _ in range(length + number % 4)), 2),
        offsets=tuple((place, place + 1) for place in range(4 + number % 3)),
        truncated=False,
    )


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture(scope="session")
def pristine_database(tmp_path_factory, models, adapters) -> Path:
    """A folder with a toy database of 24 samples at width 64, and their lines; to be copied, never to be written."""
    import rapidin_vdb

    folder = tmp_path_factory.mktemp("pristine")
    made = rapidin_vdb.init(folder / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    made.ingest(write_jsonl(folder / "toy.jsonl", toy_records(24)))
    return folder


@pytest.fixture
def database(tmp_path, pristine_database):
    """A toy database of 24 samples at width 64, ready to be asked."""
    import rapidin_vdb

    shutil.copytree(pristine_database, tmp_path, dirs_exist_ok=True)
    made = rapidin_vdb.open(tmp_path / "db")
    made.load()
    return made


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory):
    """What `rapidin-vdb demo` said, and a copy of the folder that it left; run once, whoever asks first."""
    from filelock import FileLock

    worker = os.environ.get("PYTEST_XDIST_WORKER")
    shared = tmp_path_factory.getbasetemp() if worker is None else tmp_path_factory.getbasetemp().parent
    place, said, pristine = shared / "demonstration", shared / "demonstration.json", shared / "pristine"
    with FileLock(shared / "demonstration.lock"):
        if not said.exists():
            done = subprocess.run(
                [sys.executable, "-m", "rapidin_vdb", "demo", "--dir", str(place), "--json"],
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            shutil.copytree(place, pristine)
            said.write_text(json.dumps([done.stdout, done.stderr]))
    return *json.loads(said.read_text()), pristine


@pytest.fixture(scope="session")
def tally():
    """Write down a fault, how it was made, how often it was tried, and what happened, for docs/faults.md."""

    def note(fault: str, how: str, tried: int, outcome: str) -> None:
        assert tried > 0
        if "RAPIDIN_TALLY" in os.environ:
            with Path(os.environ["RAPIDIN_TALLY"]).open("a") as file:
                file.write(json.dumps({"fault": fault, "how": how, "tried": tried, "outcome": outcome}) + "\n")

    return note


@pytest.fixture(scope="session")
def context():
    """What processes are made from."""
    from children import make_context

    return make_context()


@pytest.fixture
def forked_workers(context, monkeypatch):
    """Workers come from a process that has loaded the heavy libraries: where a test is not about how a worker begins."""
    from rapidin_vdb.workers import sharing

    own = SimpleNamespace(get_context=lambda kind: context, current_process=multiprocessing.current_process)
    monkeypatch.setattr(sharing, "multiprocessing", own)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models, where there is one."""
    folder = os.environ.get("RAPIDIN_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RAPIDIN_SHARED names no folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def server():
    """An S3 server on the loopback address, in a process of its own."""
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'rapidin-vdb[dev]'")
    code = (
        "from moto.server import ThreadedMotoServer\nimport sys, time\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\nserver.start()\n"
        "print(*server.get_host_and_port(), flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        _, port = process.stdout.readline().split()
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A place in it, with credentials in the environment."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("RAPIDIN_VDB_CACHE", str(tmp_path / "cache"))
    name = f"bucket-{os.urandom(6).hex()}"
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).read()
    return f"s3://{name}/db"
