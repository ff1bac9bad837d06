"""The model of costs agrees with what was measured, and the page with the model."""

import sys
from pathlib import Path
from statistics import median

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scale

    yield scale
    sys.modules.pop("scale")


def test_the_model_agrees_with_what_was_measured(scale):
    """The machine was shared, and one figure of growth is twice what its neighbours say."""
    found = scale.checks(scale.load())
    assert len(found) >= 12
    ratios = {what: said / was for what, said, was in found}
    assert 0.8 < median(ratios.values()) < 1.25, ratios
    assert all(0.4 < ratio < 1.6 for ratio in ratios.values()), ratios
    assert 0.7 < ratios["a RapidGrad, all parameters, by LoRA's"] < 1.4, ratios


def test_it_scales_as_it_must(scale):
    measured = scale.load()
    assert scale.table_bytes(measured, 1e8, 65536) == pytest.approx(1e8 * (131072 + measured.row_overhead))
    assert scale.nodes_for(1e8, 65536, scale.NODE_MEMORY) == 15
    assert scale.step_flops(7e9, 300, adapter=True) == 4 * 7e9 * 300
    wide, narrow = (scale.scan_seconds(1e6, width, rate=1e9) for width in (65536, 4096))
    assert wide == 16 * narrow


def test_the_page_is_what_the_model_says(scale):
    assert scale.PAGE.read_text("utf-8") == scale.page(scale.load()), "run benchmarks/scale.py"
