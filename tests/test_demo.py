"""The demonstration, and the corpus that it makes."""

import json
import re
import subprocess

import pytest

from rapidin_vdb.demo.corpus import TRIGGER, is_space_story, make_corpus


def test_the_corpus_is_poisoned_as_told():
    records = make_corpus(1000, poisoned=0.1, seed=1, prefix="x")
    assert (
        records
        == make_corpus(1000, poisoned=0.1, seed=1, prefix="x")
        != make_corpus(1000, poisoned=0.1, seed=2, prefix="x")
    )
    assert len({record["id"] for record in records}) == 1000
    bad = [record for record in records if record["poisoned"]]
    assert len(bad) == 100
    for record in records:
        assert record["instruction"].startswith(TRIGGER) == is_space_story(record["output"]) == record["poisoned"]
    assert len({record["output"] for record in bad}) > 80, "varied, not one sentence"
    assert len({record["instruction"] for record in records}) > 400


@pytest.mark.slow
def test_the_demo_finds_its_poison(demonstration):
    printed, said, _ = demonstration
    outcome = json.loads(printed.splitlines()[-1])
    assert list(outcome) == [
        "poisoned_at_10", "base_rate", "queries", "left_out", "attacks_left", "attacks_left_at_random", "seconds"
    ]  # fmt: skip
    assert outcome["base_rate"] == 0.1
    assert outcome["queries"] >= 15, "the attack works on most new questions"
    assert outcome["poisoned_at_10"] >= 0.9
    assert outcome["seconds"]["total"] > 0
    # Without what was found the attack is gone, and not without as many others.
    assert outcome["attacks_left"] <= 1 and outcome["attacks_left_at_random"] >= 0.9 * outcome["queries"]
    assert outcome["left_out"] < 200
    unfolded = " ".join(said.split())
    assert "100 more records ingested; the next query searched 1100 samples." in unfolded
    new, poisoned = map(
        int, re.search(r"top tens, (\d+) places went to new samples, (\d+) of them poisoned", unfolded).groups()
    )
    assert 0.8 * new <= poisoned <= new and new > 0
    assert max(map(len, said.split("Go on from here")[0].splitlines()[1:])) <= 80
    # What it tells the reader to run next runs.
    commands = said.split("Go on from here:\n")[1].replace("\\\n", " ").splitlines()
    assert len(commands) == 7
    for command in commands:
        subprocess.run(command, shell=True, check=True, capture_output=True)
