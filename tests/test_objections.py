"""What is said of a RapidGrad that cannot be stored: what is wrong, and what to do about it."""

import math

import pytest
import torch
from conftest import save_model, write_jsonl

import rapidin_vdb
from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient.objections import judged


@pytest.mark.parametrize(
    ("loss", "entry", "begins", "mends"),
    [
        (math.nan, 1.0, "the loss is nan; ", ["look at the weights", "--dtype float32"]),
        (1.5, math.inf, "the gradient is not finite (loss 1.5); ", ["look at the weights", "--dtype float32"]),
        (1.5, 0.0, "the gradient is zero (loss 1.5); ", ["other --parameters", "--dtype float32"]),
        (1.5, 70000.0, "the RapidGrad reaches 7e+04, beyond half precision (65504); ", ["--normalize layer"]),
        (1.5, 4e-8, "the RapidGrad reaches only 4e-08, and half precision takes 49% of it; ", ["--normalize layer"]),
        (1.5, 1e-9, "the RapidGrad reaches only 1e-09 and vanishes in half precision; ", ["--normalize layer"]),
    ],
)
def test_every_objection_says_what_to_do(loss, entry, begins, mends):
    (found,) = judged(torch.tensor([[entry, 0.0]]), torch.tensor([loss]), ["s"], half=True)
    assert isinstance(found, GradientError) and str(found).startswith(f"sample s: {begins}")
    assert all(mend in str(found) for mend in mends)


def test_what_half_precision_takes_is_measured_against_the_whole():
    """Small entries may vanish beside large ones, and few digits may do."""
    rows = torch.full((2, 64), 1e-8)
    rows[:, 0] = torch.tensor([1e-5, 1e-7])
    kept, lost = judged(rows, torch.ones(2), ["a", "b"], half=True)
    assert not isinstance(kept, GradientError) and "takes 6" in str(lost)
    assert all(not isinstance(one, GradientError) for one in judged(rows, torch.ones(2), ["a", "b"], half=False))


def test_an_ingest_says_besides_how_to_pass_over_such_samples(tmp_path):
    """Keys and queries of a single token to attend to have no gradient."""
    folder = save_model(tmp_path / "model", "llama")
    made = rapidin_vdb.init(
        tmp_path / "db", model=str(folder), width=64, template="text", max_tokens=2, parameters="q_proj"
    )
    lines = write_jsonl(tmp_path / "toy.jsonl", [{"id": "a", "text": "x"}])
    with pytest.raises(GradientError, match="the gradient is zero .*other --parameters.*: --on-bad-record skip$"):
        made.ingest(lines)
    (said,) = made.ingest(lines, on_bad_record="skip").bad
    assert "other --parameters" in said and "skip" not in said, "that was done"
