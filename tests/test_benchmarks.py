"""Benchmarks run to their end at a small scale, here too, where what they are made for is not at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "benchmarks"


def run(name: str, *arguments: str) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, HERE / f"{name}.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_benchmark_of_gpus_is_ready(kind):
    pytest.importorskip("bitsandbytes")
    result = json.loads(run("gpu", "--small", "--seconds", "1", "--only", kind))[kind]
    assert "error" not in result, result["error"]
    assert result["check"]["batched_against_autograd"] < (1e-5 if kind == "lora" else 0.1)
    assert result["scatter_against_index_add"] < 1e-6 and result["map_as_on_cpu"]
    assert result["samples_per_second"] > 0 and not result["given_up"]


def test_that_of_searches_on_gpus_is_ready():
    result = json.loads(run("search_gpu", "--small"))
    for found in result["set_ups"]:
        assert found["queries_with_the_same_ten"] == 100 and found["rounding"]["worst"] < found["rounding"]["bound"]
    assert [(found["library"], len(found["devices"])) for found in result["set_ups"]] == [
        ("faiss", 1), ("torch", 1), ("faiss", 2), ("torch", 2)
    ]  # fmt: skip


@pytest.mark.slow
def test_those_of_tokens_and_searches_run():
    found = [json.loads(line) for line in run("tokens", "--small").splitlines()]
    assert found and all(one["wall_ratio"] > 0 for one in found)
    run("search", "--small")
