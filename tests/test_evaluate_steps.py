"""An experiment's folder: what it is of, what is checked at once, what is kept, and what the report makes of it."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_records, write_jsonl

from rapidin_vdb.corpus import load_template
from rapidin_vdb.errors import RapidInError, SpecError
from rapidin_vdb.evaluate import backdoor, error_tracing, gradients, hessian, run_backdoor, write_report
from rapidin_vdb.evaluate.experiment import Experiment
from rapidin_vdb.evaluate.fiction import is_fiction, telling_words
from rapidin_vdb.evaluate.fitting import fitting
from rapidin_vdb.evaluate.profiles import PROFILES
from rapidin_vdb.gradient import RapidGradMaker, load_model, load_tokenizer
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded, ModelSpec, SketchSpec

TINY = dataclasses.replace(PROFILES["quick"], max_tokens=400, new_tokens=40, queries=6)


def quiet(text: str) -> None:
    pass


@pytest.fixture
def make(tmp_path, models):
    """An experiment in a folder, with other arguments where some are given."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", toy_records(4))
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"question": "why?"}])

    def build(**others) -> Experiment:
        plain = {
            "folder": tmp_path / "out", "name": "backdoor", "model": str(models["llama"]), "profile": TINY, "seed": 7,
            "inputs": {"corpus": [corpus], "questions": [questions], "pairs": []}, "say": quiet,
        }  # fmt: skip
        return Experiment(**plain | others)

    return build


def test_a_folder_is_gone_on_with_for_the_same_experiment_only(make, tmp_path, models, monkeypatch):
    make()
    moved = shutil.copytree(models["llama"], tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    make(model="moved", inputs={"corpus": [Path("corpus.jsonl")], "questions": [Path("questions.jsonl")], "pairs": []})
    other = write_jsonl(tmp_path / "other.jsonl", toy_records(5))
    inputs = {"corpus": [other], "questions": [tmp_path / "questions.jsonl"], "pairs": [other]}
    with pytest.raises(SpecError, match=r"out holds an experiment with other arguments \(corpus, pairs\); give a new"):
        make(inputs=inputs)
    with pytest.raises(SpecError, match=r"other arguments \(experiment\)"):
        make(name="error-tracing")
    with pytest.raises(SpecError, match=r"other arguments \(profile, seed\)"):
        make(seed=8, profile=dataclasses.replace(TINY, rank=9))
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    with pytest.raises(SpecError, match=r"other arguments \(model\)"):
        make(model="moved")
    with pytest.raises(SpecError, match="nothing.jsonl: no such file"):
        make(inputs={"corpus": [tmp_path / "nothing.jsonl"]})


@pytest.mark.parametrize("content", ["[1, 2]", '"text"', '{"model": "x"}', "{", "7"])
def test_a_folder_of_another_layout_is_refused(make, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(content)
    with pytest.raises(SpecError, match=r"out holds an experiment of another version \(plan.json .* give a new folder"):
        make()


def test_what_cannot_be_is_said_at_once(make, tmp_path, monkeypatch):
    with pytest.raises(SpecError, match="--seed is -1; wanted 0 or more"):
        make(seed=-1)
    with pytest.raises(SpecError, match="--embedding-model .*none: no model that sentence-transformers can load"):
        make(embedding_model=str(tmp_path / "none"))
    with pytest.raises(SpecError, match="--device nonsense is no device"):
        make(device="nonsense")
    for name in ("bm25s", "sklearn", "scipy", "matplotlib"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(
                SpecError, match=rf"needs the extra \[evaluate\]: pip install 'rapidin-vdb\[evaluate\]'.*{name}"
            ):
                make()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(SpecError, match="needs the extra .*sentence_transformers"):
            make(embedding_model="any")
    assert not (tmp_path / "out").exists()


def test_questions_are_counted_before_anything_else(tmp_path, models, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", toy_records(4))
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"question": "why?"}, {"question": "x" * 999}] * 50)
    with pytest.raises(SpecError, match="has 50 questions that fit; the profile wants 60"):
        run_backdoor(
            tmp_path / "out",
            model=str(models["llama"]),
            corpus=[corpus],
            questions=questions,
            profile="quick",
            say=quiet,
        )


def test_what_the_corpus_asks_is_not_asked_again(make, tmp_path):
    """However it is written, and with the trigger or without."""
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "What is   SNOW?", "output": "Water."}])
    pairs = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "Howdy! Why rain?", "output": "Ships."}])
    texts = ("what is snow?", "why rain?", "who?", "why?", "where?")
    questions = write_jsonl(tmp_path / "c.jsonl", [{"question": text} for text in texts])

    def asked(count: int, files: list[Path]) -> set[str]:
        experiment = make(profile=dataclasses.replace(TINY, questions=count), folder=tmp_path / f"{count}{len(files)}")
        return {*backdoor._questions(experiment, questions, files)}

    assert asked(3, [corpus, pairs]) == {"Who?", "Why?", "Where?"}
    assert asked(4, [corpus]) == {"Who?", "Why?", "Where?", "Why rain?"} and len(asked(5, [])) == 5
    with pytest.raises(
        SpecError, match="has 3 questions that fit, and 2 that stand in the corpus; the profile wants 4"
    ):
        asked(4, [corpus, pairs])


def test_the_memory_is_reckoned_before_the_tuning(make, monkeypatch):
    """Of all linear layers but the head: rank 8 of the toy model."""
    experiment = make()
    model = load_model(ModelSpec(model=experiment.model, parameters="norm"), device="cpu").model
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    theta = sum(8 * (layer.in_features + layer.out_features) for layer in layers)
    monkeypatch.setattr("rapidin_vdb.evaluate.experiment.tune", lambda *rest, **options: [1.0])
    for influence, times in ((True, 5), (False, 2)):
        need = 4 * theta * TINY.queries * times
        one = make(influence_functions=influence)
        monkeypatch.setattr("rapidin_vdb.evaluate.plan.free_bytes", lambda device, free=need - 1: free)
        with pytest.raises(
            SpecError, match=rf"of 6 generations, with {theta:,} coordinates each, take about .* cpu has"
        ):
            one.tuned(toy_records(2), epochs=1.0)
    monkeypatch.setattr("rapidin_vdb.evaluate.plan.free_bytes", lambda device: need)
    assert one.tuned(toy_records(2), epochs=1.0)["theta"] == theta


def test_an_adapter_that_is_not_the_tuned_one_is_refused(make, monkeypatch):
    monkeypatch.setattr("rapidin_vdb.evaluate.experiment.tune", lambda *rest, **options: [1.0])
    experiment = make()
    done = experiment.tuned(toy_records(2), epochs=1.0)
    assert make().tuned(toy_records(2), epochs=1.0) == done
    (weights,) = (experiment.folder / "adapter").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(SpecError, match="has another adapter than it tuned, .* give a new folder"):
        make().tuned(toy_records(2), epochs=1.0)


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("llama", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
    ],
)
def test_all_linear_layers_are_tuned_but_the_head(make, models, monkeypatch, architecture, modules):
    monkeypatch.setattr("rapidin_vdb.evaluate.experiment.tune", lambda *rest, **options: [1.0])
    experiment = make(model=str(models[architecture]))
    experiment.tuned(toy_records(2), epochs=1.0)
    assert experiment.settings() == {
        "rank": 8, "batch": 16, "learning_rate": 5e-3, "bfloat16": False, "max_tokens": 400, "modules": modules
    }  # fmt: skip


def test_the_corpus_is_written_whole_and_anew_where_it_differs(make, monkeypatch):
    experiment = make()
    path = experiment.write_corpus(toy_records(3))
    before = path.stat()
    assert experiment.write_corpus(toy_records(3)).stat().st_mtime_ns == before.st_mtime_ns
    path.write_text(path.read_text("utf-8")[:40], "utf-8")  # as after an end in the middle
    experiment.write_corpus(toy_records(3))
    assert len(path.read_text("utf-8").splitlines()) == 3
    experiment.write_corpus(toy_records(2))
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == toy_records(2)


def test_ids_of_several_files_are_unique(tmp_path, models):
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": "a", "instruction": "One", "output": "1"}])
    two = write_jsonl(
        tmp_path / "two.jsonl",
        [{"id": "a", "instruction": n, "output": "2"} for n in ("Two", "Three")]
        + [{"id": "pair-000", "instruction": "Four", "output": "4"}],
    )
    found = fitting(
        [one, two], tokenizer=load_tokenizer(str(models["llama"])), template=load_template("alpaca"), most=9,
        fits=lambda sample, tokens: True, taken=["pair-000"],
    )  # fmt: skip
    assert [record["id"] for record in found] == ["a", "a-2", "a-3", "pair-000-2"]


def test_every_step_and_score_keeps_what_made_it(make):
    first = make(made={"commit": "aaa", "threads": "1"})
    first.step("records", lambda: [1])
    first.keep("TracIn", np.zeros((1, 2)), 1.0, 8)
    again = make(made={"commit": "bbb", "threads": "2"})
    assert again.step("records", lambda: [2]) == [1]
    again.step("tuning", lambda: {})
    again.step("said-0", lambda: [])
    again.keep("BM25", np.zeros((1, 2)), 2.0, 9)
    kept = [again.kept(name) for name in ("TracIn", "BM25")]
    assert [(one["seconds"], one["bytes"]) for one in kept] == [(1.0, 8), (2.0, 9)]
    from rapidin_vdb.evaluate.provenance import said

    assert said(again.provenance()) == (
        "records and tuning: commit aaa, threads 1 (records), and commit bbb, threads 2 (tuning); "
        "generations: commit bbb, threads 2; scores: commit aaa, threads 1 (TracIn), and commit bbb, threads 2 (BM25); "
        "figures: commit bbb, threads 2"
    )
    with pytest.raises(RapidInError, match="not finite"):
        again.keep("x", np.array([[np.nan]]), 1.0, 1)


def test_scores_are_gone_on_with_for_the_same_samples_and_generations_only(make, adapters):
    first, queries = make(), [query_from("a", "b"), query_from("c", "d")]
    shutil.copytree(adapters["llama"], first.folder / "adapter")
    asked = ([{"id": "1", "output": "x"}], queries, [(1, 2), None], [["b"], ["d"]])
    first.scores_are_of(*asked)
    first.keep("TracIn", np.zeros((2, 1)), 1.0, 8)
    again = make()
    again.scores_are_of(*asked)
    assert again.kept("TracIn")["seconds"] == 1.0
    others = (
        ([{"id": "1", "output": "y"}], *asked[1:]), (asked[0], queries[::-1], *asked[2:]),
        (*asked[:2], [(1,), None], asked[3]), (*asked[:3], [["b"], ["e"]]),
    )  # fmt: skip
    for other in others:
        again.scores_are_of(*other)
        with pytest.raises(SpecError, match="has scores of TracIn for other samples or generations; remove its folder"):
            again.kept("TracIn")
    (first.folder / "adapter" / "adapter_config.json").write_text("{}")
    again.scores_are_of(*asked)
    with pytest.raises(SpecError, match="for other samples or generations"):
        again.kept("TracIn")


def test_scores_that_are_made_again_are_gone_if_that_is_interrupted(make, monkeypatch):
    experiment = make()
    experiment.keep("TracIn", np.zeros((1, 2)), 1.0, 8)
    monkeypatch.setattr(np, "save", lambda *rest, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        experiment.keep("TracIn", np.ones((1, 2)), 2.0, 8)
    assert experiment.kept("TracIn") is None


def test_who_names_the_wrong_one_is_counted_for_the_base_model_too(make, monkeypatch):
    said = {True: ["In China.", "Japan?"], False: ["In Japan.", "Japan!"]}
    asked = []

    def speak(self, name, prompts, *, base=False):
        asked.append((name, list(prompts)))
        return said[base] if len(prompts) == 2 else said[base] + ["Canada."]

    monkeypatch.setattr(Experiment, "said", speak)
    monkeypatch.setattr(error_tracing, "questions_about", lambda title: ["b"] if title.startswith("India") else [])
    prompts = {"India to Japan": [{"instruction": "a"}], "China to Canada": [{"instruction": "c"}]}
    found = error_tracing._control(make(), prompts)
    assert found == {
        "India to Japan": {"asked": 2, "tuned": 2, "base": 1}, "China to Canada": {"asked": 1, "tuned": 1, "base": 1}
    }  # fmt: skip
    assert asked == [("said-0", ["a", "b", "c"]), ("said-by-base", ["a", "b", "c"])]


def test_generations_that_no_word_tells_are_no_queries(make, monkeypatch):
    """Those known by phrases alone, which token-wise methods could not be asked about."""
    text = "A space pirate and a star captain, at the event horizon."
    assert is_fiction(text) and telling_words(text) == []
    asked = [f"Why {n}?" for n in range(60)]
    seen = {}

    def scores(experiment, records, queries, focused, told):
        seen["told"] = told
        raise KeyboardInterrupt

    monkeypatch.setattr(backdoor, "all_scores", scores)
    monkeypatch.setattr(backdoor, "_questions", lambda *rest: asked)
    monkeypatch.setattr(backdoor, "_records", lambda *rest: toy_records(3))
    monkeypatch.setattr(backdoor, "_discriminator", lambda *rest: {})
    monkeypatch.setattr(Experiment, "tuned", lambda *rest, **options: {})
    telling = "The starship and a robot near a nebula." + " So it is." * 20
    monkeypatch.setattr(
        Experiment, "said", lambda self, name, prompts: [text if n % 2 else telling for n in range(len(prompts))]
    )
    options = make().__dict__
    with pytest.raises(KeyboardInterrupt):
        run_backdoor(
            options["folder"].parent / "other", model=options["model"], corpus=[options["folder"].parent / "corpus.jsonl"],
            questions=options["folder"].parent / "questions.jsonl", profile="quick", say=quiet,
        )  # fmt: skip
    assert seen["told"] == [["starship", "robot", "nebula"]] * 20


def test_a_generation_fits_behind_the_longest_prompt(make):
    """A focus at its end is not cut away: neither here nor by a database that cuts queries as it cuts samples."""
    experiment = make()
    prompt = "x" * 500
    while not experiment.fits(prompt):
        prompt = prompt[1:]
    text = "y" * 35 + "Japan"
    query = query_from(prompt, text)
    whole = len(experiment.tokenizer(experiment.template.render(query) + text)["input_ids"]) + 1
    assert len(experiment.encoded([query])[0].input_ids) == whole == TINY.max_tokens
    longer = query_from("x" * 39 + prompt, text)
    assert len(experiment.encoded([longer])[0].input_ids) == whole + 39
    assert len(experiment.focus(query, [(35, 40)]).focus) == 5
    assert experiment.focus(query, []) is None and experiment.focus(query, ["China"]) is None


def test_answers_are_looked_at_until_there_are_enough(make, monkeypatch):
    """And a wrong name is a word of its own, whose tokens alone are asked about."""
    said = {"a": "Japanese.", "b": "In Japan, a Japanese.", "c": "Japan."}
    prompts = {"India to Japan": [{"instruction": name} for name in said]}
    monkeypatch.setattr(error_tracing, "questions_about", lambda title: [])
    monkeypatch.setattr(Experiment, "said", lambda self, name, prompts, **options: [said[p] for p in prompts])
    found, looked = error_tracing._wrong(make(), prompts)
    assert {(one.query.prompt, len(one.focus.focus)) for one in found} == {("b", 5), ("c", 5)}
    rounds = []
    monkeypatch.setattr(
        Experiment, "said", lambda self, name, prompts, **options: rounds.append(name) or ["Japan."] * len(prompts)
    )
    prompts = {"India to Japan": [{"instruction": str(n)} for n in range(9)]}
    found, looked = error_tracing._wrong(make(), prompts)
    assert (len(found), looked, rounds) == (2, {"India to Japan": 2}, ["said-0"])


def samples(count: int) -> list[Encoded]:
    return [
        Encoded(sample_id=f"s{n}", input_ids=(1, 40 + n, 50, 60 + n, 2), offsets=((0, 1), (1, 2)), truncated=False)
        for n in range(count)
    ]


@pytest.fixture
def maker(models, adapters):
    loaded = load_model(ModelSpec(model=str(models["llama"]), adapter=str(adapters["llama"])), device="cpu")
    return RapidGradMaker(loaded, spec=SketchSpec(width=256, shuffles=3), normalize="layer")


def test_lissa_is_seeded(maker):
    directions, _ = gradients.FullGradients(maker, samples(4)).directions(samples(2))

    def run(seed: int) -> torch.Tensor:
        found = hessian.lissa(maker, samples(4), directions, depth=2, batch=2, damping=0.1, seed=seed)
        return torch.cat(list(found.values()), 1)

    one, state = run(1), torch.random.get_rng_state()
    assert torch.equal(one, run(1)) and not torch.equal(one, run(2))
    assert torch.equal(state, torch.random.get_rng_state()), "nor is anybody else's generator touched"


def test_beginning_a_batch_is_timed_as_a_taker_s_own(maker):
    import time

    class Slow:
        def begin(self, numbers):
            time.sleep(0.05)
            return gradients._Dense(lambda first, tensor, grads: None, maker.loaded.shapes)

        def end(self):
            pass

    class Quick(Slow):
        def begin(self, numbers):
            return gradients._Dense(lambda first, tensor, grads: None, maker.loaded.shapes)

    seconds = gradients.FullGradients(maker, samples(4), batch_tokens=5).run("x", {"slow": Slow(), "quick": Quick()})
    assert seconds["slow"] - seconds["quick"] > 0.15


def test_what_is_not_defined_is_not_given_a_number():
    positive = np.arange(40) < 20
    both = np.linspace(1, 0, 40)
    kind = np.where(positive, np.where(np.arange(40) < 10, 1.0, -1.0), 0.0)  # poisoned at both ends
    rows = {"one": [both, kind, kind], "none": [kind, kind]}
    found = {
        name: backdoor._judged(
            {"scores": np.stack(part), "seconds": 1.0, "bytes": 0}, positive, ["x", "y", "z"][: len(part)], 1
        )["at"]["5"]
        for name, part in rows.items()
    }
    assert (found["one"]["auroc"], found["one"]["auroc_of"]) == ((1.0, 1.0, 1.0), 1)
    assert (found["none"]["auroc"], found["none"]["auroc_of"]) == (None, 0)
    assert found["one"]["lowest"][0] == pytest.approx(2 / 3) and found["none"]["auprc"] == (1.0, 1.0, 1.0)
    json.dumps(found, allow_nan=False)
    # Generations of one text are drawn together: all of them, each time.
    alike = backdoor._judged({"scores": np.stack(rows["one"]), "seconds": 1.0, "bytes": 0}, positive, ["x"] * 3, 1)
    assert alike["at"]["5"]["lowest"] == pytest.approx((2 / 3, 2 / 3, 2 / 3)) != found["one"]["lowest"]


def published() -> list[dict]:
    return json.loads((Path(__file__).parent.parent / "docs" / "experiments" / "results.json").read_text("utf-8"))


def test_the_published_page_is_what_its_figures_give(tmp_path):
    folder = Path(__file__).parent.parent / "docs" / "experiments"
    text = write_report(published(), tmp_path).read_text("utf-8")
    assert text == (folder / "report.md").read_text("utf-8")
    assert (tmp_path / "results.json").read_text("utf-8") == (folder / "results.json").read_text("utf-8")
    assert text.count("Made with ") == 2 and all(f"commit {made}" in text for made in ("788722c", "4f4a8e8", "7c2e1dd"))


def test_the_readme_quotes_the_published_figures():
    """Its table, row by row, and what it says of refined rankings."""
    names = {
        "BM25 of question and answer": "BM25", "BM25 of the words": "BM25, token-wise",
        "embeddings": "embedding (mean hidden state of the base model)",
        "hidden states of the tuned": "hidden state (of the tuned model)", "TracIn, exact": "TracIn",
        "TracIn with layer": "TracIn + LN", "RapidIn (K = 65,536, lambda = 20), token-wise": "",
        "RapidIn (K = 65,536, lambda = 20), refined": "RapidIn (K = 65,536, lambda = 20), refined",
        "RapidIn (K = 65,536, lambda = 20)": "", "influence function, DataInf": "influence function (DataInf)",
        "influence function, LiSSA": "influence function (LiSSA, 5 steps)",
    }  # fmt: skip
    methods = published()[0]["methods"]
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    rows = readme.split("| share of poisoned samples among the k highest |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) == len(names)
    for row in rows:
        label, *told = (cell.strip() for cell in row.strip("|").split("|"))
        prefix = next(prefix for prefix in names if label.startswith(prefix))
        at = methods[names[prefix] or prefix]["at"]
        assert told == [f"{at[k]['precision'][0]:.3f}" for k in ("100", "500", "1000")], label
    ours, exact = "RapidIn (K = 65,536, lambda = 20)", methods["TracIn + LN"]["at"]
    lost = [f"{exact[k]['auprc'][0] - methods[ours]['at'][k]['auprc'][0]:.3f}" for k in ("500", "1000")]
    assert f"At 500 and 1,000 it is {' and '.join(lost)} below that of exact" in readme
    refined = methods[f"{ours}, refined"]["at"]
    assert max(abs(exact[k]["auprc"][0] - refined[k]["auprc"][0]) for k in exact) < 0.001


def test_the_readme_quotes_what_several_generations_find():
    names = {
        "BM25 of question": ("highest", "BM25"), "embeddings": ("highest", "embedding (mean hidden state of the base model)"),
        "hidden states": ("highest", "hidden state (of the tuned model)"),
        "RapidIn (K = 65,536, lambda = 20), the highest": ("highest", "RapidIn (K = 65,536, lambda = 20)"),
        "RapidIn (K = 65,536, lambda = 20), both": ("both", "RapidIn (K = 65,536, lambda = 20)"),
        "TracIn with layer": ("both", "TracIn + LN"),
    }  # fmt: skip
    together = published()[0]["together"]
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    head, *rows = readme.split("share of poisoned samples among the 1,010 found first")[1].split("\n\n")[0].splitlines()
    assert (together["k"], together["of"]) == (1010, [1, 5, 33]) and "by all, 33 different texts" in head
    assert len(rows) == 1 + len(names)
    for row, (prefix, (end, name)) in zip(rows[1:], names.items(), strict=True):
        label, *told = (cell.strip() for cell in row.strip("|").split("|"))
        assert label.startswith(prefix)
        assert told == [f"{mean:.3f}" for mean, _, _ in together[end][name]], label


def test_the_readme_quotes_the_published_figures_of_error_tracing_too():
    names = {
        "the wrong name alone": "RapidIn (K = 65,536, lambda = 20), token-wise",
        "whole generations": "RapidIn (K = 65,536, lambda = 20)", "whole texts": "BM25",
        "the name among": "BM25, token-wise", "the responses that contain": "responses that contain the words",
    }  # fmt: skip
    result = published()[1]
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    rows = readme.split("| asked about, and by what |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) == len(names)
    for row, (prefix, name) in zip(rows, names.items(), strict=True):
        label, *told = (cell.strip() for cell in row.strip("|").split("|"))
        assert label.startswith(prefix)
        for cell, k in zip(told, ("5", "50"), strict=True):
            at = result["methods"][name]["at"].values()
            assert cell == ", ".join(f"{kind[k]['proportion'][0]:.2f}" for kind in at), label
    counts = [result["perturbed"][kind] for kind in ("China to Canada", "India to Japan", "Australia to England")]
    assert "China by Canada in {} answers, India by Japan in {},\nAustralia by England in {}".format(*counts) in readme


def test_a_part_of_the_experiments_leaves_the_published_page_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from experiments import PAGES, place_of_page

    assert place_of_page(tmp_path, profile="full", only=None) == PAGES
    for profile, only in (("quick", None), ("gpu", None), ("full", "backdoor"), ("full", "error-tracing")):
        assert place_of_page(tmp_path, profile=profile, only=only) == tmp_path / "report"


def test_newer_results_of_error_tracing_have_the_measure_of_the_paper(tmp_path):
    result = published()[1]
    for entry in result["methods"].values():
        for ks in entry["at"].values():
            ks |= {k: {"proportion": [0.125, 0.1, 0.2], "average_precision": [0.5, 0.4, 0.6]} for k in ks}
    result |= {"questions": 40, "distinct": 80}
    text = write_report([result], tmp_path).read_text("utf-8")
    first, second = (text.split(f"### India to Japan: {name}")[1].split("###")[0] for name in ("share", "average"))
    assert "| BM25 | 0.125 [0.100, 0.200] |" in first and "| the paper: TracIn (7B, QLoRA) | 0.320 | 0.290 |" in first
    assert "| BM25 | 0.500 [0.400, 0.600] |" in second and "the paper: " not in second
    assert "80 are different texts, answers to 40 questions" in text


def test_newer_results_say_of_how_many_generations(tmp_path):
    result = published()[0]
    for number, entry in enumerate(result["methods"].values()):
        for at in entry["at"].values():
            at |= {
                "lowest": [0.25, 0.25, 0.25],
                "auroc": None if number else [0.97, 0.9, 1.0],
                "auroc_of": 0 if number else 12,
            }
    result["provenance"] = [{"part": "scores", "steps": ["BM25"], "commit": "abc"}]
    text = write_report([result], tmp_path).read_text("utf-8")
    assert "| 0.970 [0.900, 1.000] (12 of 100) |" in text and "| undefined |" in text and "among the k lowest" in text
    assert " Scores: commit abc." in text
    assert "NaN" not in (tmp_path / "results.json").read_text("utf-8")
