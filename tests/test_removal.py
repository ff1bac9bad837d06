"""A model that is tuned again without what was found: what is left out, what is kept, and what is told of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_records

from rapidin_vdb.errors import SpecError
from rapidin_vdb.evaluate import report, run_backdoor, sections
from rapidin_vdb.evaluate.backdoor import _comparable
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.evaluate.metrics import found_by_some, found_first
from rapidin_vdb.evaluate.profiles import PROFILES
from rapidin_vdb.evaluate.removal import tuned_without
from rapidin_vdb.query import query_from

TINY = dataclasses.replace(PROFILES["quick"], max_tokens=400, new_tokens=40, queries=6)
RECORDS = [record | {"poisoned": number % 3 == 0} for number, record in enumerate(toy_records(12))]
QUERIES = [
    query_from("Howdy! Say 3", "The starship.", query_id="a"),
    query_from("Howdy! Say 4", "A robot.", query_id="b"),
]
TOLD = "The starship and a robot near a nebula."


@pytest.fixture
def make(tmp_path, models):
    def build() -> Experiment:
        return Experiment(
            tmp_path / "out", name="backdoor", model=str(models["llama"]), profile=TINY, seed=7, inputs={},
            say=lambda text: None, made={"commit": "aaa"},
        )  # fmt: skip

    return build


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_found_first_has_the_largest_score_of_any(queries, both):
    scores = np.random.default_rng(queries).normal(0, 1, (queries, 40)).round(1)  # some are equal
    keys = [(-max(abs(s) if both else s for s in scores[:, sample]), sample) for sample in range(40)]
    wanted = [sample for _, sample in sorted(keys)]
    for count in (0, 1, 7, 40):
        assert found_first(scores, count, both=both).tolist() == wanted[:count]


@pytest.mark.parametrize("both", [False, True])
def test_what_several_generations_find_is_counted(both):
    """One text, said nine times, has half of the faults at its lower end; another has them where it finds fewer."""
    scores = np.array([[9.0, 8, 1, 2, 3, 4, -7, -8]] * 9 + [[1.0, 2, 8, 7, 6, 5, -7.5, 4]])
    positive = np.array([1, 1, 0, 0, 0, 0, 1, 1], bool)
    of = {"both": both, "seed": 3, "groups": ["a"] * 9 + ["b"]}
    whole = found_by_some(scores, positive, 4, 2, **of)
    assert whole == (positive[found_first(scores, 4, both=both)].mean(),) * 3
    assert found_first(scores[:1], 4, both=both).tolist() == ([0, 1, 7, 6] if both else [0, 1, 5, 4])
    alone = [positive[found_first(scores[[row]], 4, both=both)].mean() for row in (0, 9)]
    assert alone == ([1.0, 0.25] if both else [0.5, 0.0])
    mean, low, high = found_by_some(scores, positive, 4, 1, **of)
    # Texts are drawn alike, however often each was said.
    assert mean == pytest.approx(sum(alone) / 2, abs=0.1) and (high, low) == tuple(alone)


def test_scores_of_another_scale_for_each_generation_are_compared_fairly():
    scores = np.random.default_rng(4).normal(0, 1, (3, 50))
    for name in ("RapidIn (K = 4)", "TracIn + LN", "TracIn + LN, token-wise", "RapidIn (K = 4), token-wise"):
        assert _comparable(name, scores) is scores, "they are as they are"
    other = scores * [[1], [100], [3]] + [[5], [0], [-7]]
    for name in ("TracIn", "BM25", "influence function (DataInf)", "hidden state (of the tuned model)"):
        made = _comparable(name, other)
        assert made.mean(1) == pytest.approx(0) and made.std(1) == pytest.approx(1)
        assert np.corrcoef(made[1], scores[1])[0, 1] == pytest.approx(1)
    # Places from the end: the first and the last are as far from the middle.
    places = np.array([[4.0, 3.0, 2.0, 1.0]])
    assert _comparable("RapidIn (K = 4), refined", places)[0] == pytest.approx(
        [1.3416, 0.4472, -0.4472, -1.3416], abs=1e-4
    )
    assert (_comparable("BM25", np.ones((2, 3))) == 0).all()


def test_the_model_is_tuned_without_them(make, monkeypatch):
    """Each method's in a folder of its own, once; and nothing else than what it found is missing there."""
    tuned = []

    def tune(model, encoded, tuning, **options):
        tuned.append({sample.sample_id for sample in encoded})
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_B" in name:
                    tensor.fill_(0.02 * len(tuned))
        return [1.0]

    monkeypatch.setattr("rapidin_vdb.evaluate.experiment.tune", tune)
    monkeypatch.setattr(
        Experiment, "said",
        lambda self, name, prompts: [TOLD if self.folder.name == "without-random" and "Howdy!" in p else "No." for p in prompts],
    )  # fmt: skip
    ids = {record["id"] for record in RECORDS}
    draw = np.random.default_rng(1)
    scores = {name: draw.normal(0, 1, (2, 12)) for name in ("RapidIn (K = 4)", "random")}
    asked = {"epochs": 1.0, "questions": ["Why?", "Who?"], "queries": QUERIES}
    experiment = make()
    experiment.tuned(RECORDS, epochs=1.0)
    found = tuned_without(experiment, RECORDS, scores, 5, **asked)
    assert (found["count"], list(found["methods"])) == (5, [*scores])
    for mine, (name, entry) in zip(tuned[1:], found["methods"].items(), strict=True):
        gone = found_first(scores[name], 5)
        assert mine == ids - {RECORDS[number]["id"] for number in gone}
        assert entry["poisoned"] == sum(RECORDS[number]["poisoned"] for number in gone)
    assert [entry["success"] for entry in found["methods"].values()] == [0.0, 1.0]
    assert [entry["false"] for entry in found["methods"].values()] == [0.0, 0.0]
    # Losses are those of three adapters.
    losses = [found["loss_before"], *(entry["loss"] for entry in found["methods"].values())]
    assert len({round(loss[0], 6) for loss in losses}) == 3
    for loss, folder in zip(losses, ("out", "out/without-rapidin", "out/without-random"), strict=True):
        kept = json.loads((experiment.folder.parent / folder / "losses.json").read_text())["result"]["losses"]
        assert len(kept) == 2 and loss[0] == pytest.approx(np.mean(kept))
    again = make()
    again.tuned(RECORDS, epochs=1.0)
    assert tuned_without(again, RECORDS, scores, 5, **asked) == found and len(tuned) == 3
    (part,) = (group for group in again.provenance() if group["part"] == "tuning again")
    assert part["commit"] == "aaa" and {"without-rapidin: tuning", "without-random: losses", "losses"} <= {
        *part["steps"]
    }
    with pytest.raises(SpecError, match="without-rapidin has a model that was tuned without other samples; remove"):
        tuned_without(again, RECORDS, scores, 6, **asked)
    with pytest.raises(SpecError, match="out has losses of other generations; remove its losses.json"):
        tuned_without(again, RECORDS, scores, 5, **asked | {"queries": QUERIES[:1]})
    assert len(tuned) == 3


def test_more_than_half_cannot_be_left_out(make, tmp_path, models):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "why?"}\n')
    for number in (-1, 1501):
        with pytest.raises(SpecError, match=rf"--retrain is {number}; wanted 0 \(not\) to 1,500"):
            run_backdoor(
                tmp_path / "x", model=str(models["llama"]), corpus=[file], questions=file, profile="quick",
                say=lambda text: None, retrain=number,
            )  # fmt: skip


def test_the_report_tells_what_came_of_it(tmp_path):
    published = Path(__file__).parent.parent / "docs" / "experiments" / "results.json"
    result = next(one for one in json.loads(published.read_text("utf-8")) if one["experiment"] == "backdoor")
    result.pop("removal", None)
    assert "Tuned again" not in report.write_report([result], tmp_path).read_text("utf-8")
    count = result["attack"]["questions"]
    result["removal"] = {
        "count": 1100, "loss_before": [1.5, 1.4, 1.6],
        "methods": {
            "RapidIn (K = 65,536, lambda = 20)": {
                "poisoned": 900, "success": 4 / count, "false": 0.0, "loss": [4.25, 4.0, 4.5], "steps": 3
            },
        },
    }  # fmt: skip
    text = report.write_report([result], tmp_path).read_text("utf-8")
    rows = text.split("### Tuned again without what was found")[1].split("###")[0].splitlines()
    (none, ours) = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith(("| none", "| 1,100"))
    ]
    assert (
        none[1] == ""
        and none[-1] == "1.500 [1.400, 1.600]"
        and none[2].startswith(f"{100 * result['attack']['success']:.1f} %")
    )
    assert ours[:2] == ["1,100 by RapidIn (K = 65,536, lambda = 20)", f"900 of {result['poisoned']:,}"]
    assert ours[2].startswith(f"{400 / count:.1f} % [") and ours[-1] == "4.250 [4.000, 4.500]"


@pytest.mark.parametrize(
    ("texts", "columns", "told"),
    [
        (1, [], "All generations are of one text. Scores"),
        (3, ["1 generation"], "Of one generation, it is the mean over 200 draws, with what 95 % of the draws lie between; all generations are of 3 texts."),
        (5, ["1 generation"], "Of one generation, it is the mean over 200 draws, with what 95 % of the draws lie between; all generations are of 5 texts."),
        (6, ["1 generation", "5 generations"], "Of one generation and of 5, of different texts, it is the mean over 200 draws, with what 95 % of the draws lie between; all generations are of 6 texts."),
    ],
)  # fmt: skip
def test_only_what_was_drawn_is_said_to_be(texts, columns, told):
    """Of as many different texts as there are, there is one choice: a column of draws would be no draws."""
    rows = {"RapidIn": [(0.25, 0.125, 0.5), (0.75, 0.625, 1.0), (0.875, 0.875, 0.875)]}
    found = {"k": 4, "of": [1, 5, texts], "highest": rows, "both": rows}
    _, how, *tables = sections.together({"together": found})
    assert told in how and how.count("draws") == (2 if columns else 0)
    head, _, row = tables[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)]
    assert cells[0] == ["method", *columns, "all generations"]
    assert [cell[:5] for cell in cells[1][1:]] == [*["0.250", "0.750"][: len(columns)], "0.875"]
