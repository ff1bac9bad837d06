"""The whole way on a GPU: ingest, index, query, words; beside the same on the CPU."""

import numpy as np
import pytest
import torch
from conftest import toy_records, write_jsonl
from test_whole import content, make

import rapidin_vdb

pytestmark = pytest.mark.gpu


def answers(database):
    return [
        database.query("Say 5", "blue 35", top_k=24, tokens=True)[0],
        database.query("Say 5", "blue 35", top_k=24, focus="35")[0],
        database.query("Say 5", "blue 35", top_k=24, where="source = 'odd' AND stars > 1", harmful=True)[0],
    ]


def rows_of(database) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(row, np.float16).astype(np.float64) for name, (_, row) in content(database).items()}


@pytest.mark.parametrize("recipe", ["gpu", "two_gpus"])
@pytest.mark.parametrize(
    ("options", "workers", "tolerance"),
    [
        ({}, 1, 2e-3),
        ({}, 2, 2e-3),
        ({"quantization": "nf4", "dtype": "float32"}, 1, 2e-2),
        ({"dtype": "bfloat16"}, 1, 0.1),
    ],
)
def test_a_gpu_answers_as_the_cpu_does(tmp_path, models, adapters, options, workers, tolerance, recipe, monkeypatch):
    lines = write_jsonl(tmp_path / "toy.jsonl", toy_records(24))
    with monkeypatch.context() as without:
        without.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu = make(tmp_path / "cpu", models, adapters, **options)
        on_cpu.ingest(lines)
        expected = answers(on_cpu)
        assert on_cpu._loaded().loaded.device == "cpu"
    made = make(tmp_path / "gpu", models, adapters, **options)
    assert made.ingest(lines, device="cuda:0", workers_per_device=workers).added == 24
    made.index(recipe)
    on_gpu = rapidin_vdb.open(tmp_path / "gpu")
    found = answers(on_gpu)
    assert on_gpu._loaded().loaded.device.startswith("cuda")
    here, there = rows_of(on_cpu), rows_of(on_gpu)
    for name, vector in here.items():
        assert np.linalg.norm(there[name] - vector) <= tolerance * np.linalg.norm(vector)
    for one, other in zip(expected, found, strict=True):
        scores, same = ({r.sample_id: r.score for r in ranking.results} for ranking in (one, other))
        largest = max(map(abs, scores.values()))
        assert same == pytest.approx(scores, abs=2 * tolerance * largest)
    for result in found[0].results:
        assert sum(token.score for token in result.tokens) == pytest.approx(
            result.exact_score if result.exact_score is not None else result.score,
            rel=max(1e-3, tolerance / 10),
            abs=1e-3,
        )
