"""What a process may use is what it is bound to, or its container's share: not all that the machine has."""

import os

import pytest
import torch

from rapidin_vdb.machine import cores, free_bytes
from rapidin_vdb.recipe import IndexRecipe


@pytest.mark.parametrize(
    ("bound", "quota", "count"),
    [({0, 1, 5}, None, 3), (set(range(8)), "max 100000", 8), (set(range(8)), "250000 100000", 2), ({3}, "400000 100000", 1),
     ({0, 1}, "50000 100000", 1), ({0, 1}, "nonsense", 2)],
)  # fmt: skip
def test_cores_are_those_that_the_process_may_use(monkeypatch, tmp_path, bound, quota, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: bound, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores(tmp_path) == count
    monkeypatch.setattr("rapidin_vdb.recipe.cores", lambda: cores(tmp_path))
    assert IndexRecipe(name="a", devices=("cpu", "cuda:0")).shard_devices == (*["cpu"] * count, "cuda:0")
    assert IndexRecipe(name="a", shards_per_device=3).shard_devices == ("cpu",) * 3


def test_free_memory_is_no_more_than_what_a_container_has_left(tmp_path):
    plenty = free_bytes("cpu", tmp_path)
    assert plenty > 1 << 20, "no limit"
    for name, value in {"max": "90000", "current": "80000", "stat": "anon 7\ninactive_file 500\nactive_file 9"}.items():
        (tmp_path / f"memory.{name}").write_text(value + "\n")
    assert free_bytes("cpu", tmp_path) == 10500
    (tmp_path / "memory.current").write_text("99000\n")
    assert free_bytes("cpu", tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes("cpu", tmp_path) > 1 << 20


def test_free_memory_of_a_gpu_counts_what_torch_holds_in_reserve(monkeypatch):
    for name, value in {"mem_get_info": (1000, 9000), "memory_reserved": 700, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes("cuda:0") == 1400
