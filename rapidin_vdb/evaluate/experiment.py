"""What both experiments share, step by step: records that fit, a tuned adapter, its generations, everybody's scores.

Every step leaves its result in the experiment's folder and is not done again: an experiment that was interrupted goes
on when it is run again.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rapidin_vdb
from rapidin_vdb.corpus import encode, load_template, sample_from
from rapidin_vdb.corpus.files import Record as FileRecord
from rapidin_vdb.errors import CorpusError, RapidInError, SpecError
from rapidin_vdb.evaluate.corpora import Record
from rapidin_vdb.evaluate.profiles import Profile
from rapidin_vdb.gradient import LoadedModel, load_model, load_tokenizer
from rapidin_vdb.gradient.generation import generate_batch
from rapidin_vdb.gradient.training import save, with_lora
from rapidin_vdb.gradient.tuning import Tuning, mean_loss, tune
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded, ModelSpec, Sample

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Experiment:
    """One experiment in one folder."""

    def __init__(
        self, folder: Path, *, model: str, profile: Profile, seed: int, say: Callable[[str], None],
        progress: Progress = silent, embedding_model: str | None = None, influence_functions: bool = True,
    ) -> None:  # fmt: skip
        """Begin, or go on with, an experiment.

        Raises:
            SpecError: the folder holds one with other arguments.
        """
        self.folder = folder
        self.model = model
        self.profile = profile
        self.seed = seed
        self.say = say
        self.progress = progress
        self.embedding_model = embedding_model
        self.influence_functions = influence_functions
        self.tokenizer = load_tokenizer(model)
        self.template = load_template("alpaca")
        folder.mkdir(parents=True, exist_ok=True)
        plan = {"model": str(Path(model).resolve()), "profile": repr(profile), "seed": seed}
        if embedding_model is not None:
            plan["embedding_model"] = embedding_model
        if self.step("plan", lambda: plan) != plan:
            raise SpecError(f"--dir {folder} holds an experiment with other arguments; give a new folder")

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the result of a step as plain values, from its file where it was done before."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            result = work()
            new = path.with_suffix(".new")
            new.write_text(json.dumps(result), "utf-8")
            new.replace(path)
            self.say(f"{name}: {time.monotonic() - started:.0f} s")
        return json.loads(path.read_text("utf-8"))

    def write_corpus(self, records: Sequence[Record]) -> Path:
        """Write the corpus, if it is not there."""
        path = self.folder / "corpus.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return path

    def samples(self, records: Sequence[Record]) -> list[Encoded]:
        """Return the tokens of records, all of which fit.

        Raises:
            CorpusError: one of them does not.
        """
        samples = [sample_from(FileRecord(location=str(r.get("id")), fields=r)) for r in records]
        return self.encoded(samples)

    def encoded(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Return the tokens of samples or queries."""
        encoded = []
        for result in encode(
            samples, tokenizer=self.tokenizer, template=self.template, max_tokens=self.profile.max_tokens
        ):
            if isinstance(result, CorpusError):
                raise result
            encoded.append(result)
        return encoded

    def tuned(self, records: Sequence[Record], *, epochs: float) -> dict[str, Any]:
        """Fine-tune a LoRA adapter on the records, and return how that went."""
        profile, adapter = self.profile, self.folder / "adapter"

        def work() -> dict[str, Any]:
            started, timed_steps = time.monotonic(), 0

            def progress(stage: str, done: int, total: int) -> None:
                nonlocal timed_steps
                timed_steps += 1
                self.progress(stage, done, total)

            encoded = self.samples(records)
            base = load_model(ModelSpec(model=self.model)).model
            before = mean_loss(base, encoded[:256])
            model = with_lora(base, rank=profile.rank, modules=MODULES, seed=self.seed)
            tuning = Tuning(
                epochs=epochs, batch=profile.batch, learning_rate=profile.learning_rate, seed=self.seed,
                bfloat16=profile.bfloat16,
            )  # fmt: skip
            losses = tune(model, encoded, tuning, state=self.folder / "state", stage="fine-tune", progress=progress)
            save(model, self.tokenizer, adapter)
            tail = losses[-max(len(losses) // 20, 1) :]
            return {
                "loss_before": before,
                "loss_after": sum(tail) / len(tail),
                "steps": len(losses),
                "parameters": sum(p.numel() for p in base.parameters() if not p.requires_grad),
                "theta": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "seconds": time.monotonic() - started,
                "timed_steps": timed_steps,
            }

        return self.step("tuning", work)

    def loaded(self) -> LoadedModel:
        """Return the model with its tuned adapter."""
        return load_model(ModelSpec(model=self.model, adapter=str(self.folder / "adapter")))

    def said(self, name: str, prompts: Sequence[str], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Return what the tuned model says to prompts, most likely token by token, or drawn at a temperature."""

        def work() -> list[str]:
            texts = [self.template.render(query_from(prompt, "?")) for prompt in prompts]
            return generate_batch(
                self.loaded().model, self.tokenizer, texts, max_tokens=self.profile.new_tokens,
                temperature=temperature, seed=seed,
            )  # fmt: skip

        return self.step(name, work)

    def kept(self, name: str) -> tuple[np.ndarray, float] | None:
        """Return a method's scores, [queries, samples], and the seconds they took; None before they are made."""
        path = self.folder / "scores" / f"{name}.npy"
        if not path.exists():
            return None
        seconds = json.loads(path.with_suffix(".json").read_text("utf-8"))["seconds"]
        return np.load(path, allow_pickle=False).astype(np.float64), seconds

    def keep(self, name: str, scores: np.ndarray, seconds: float) -> None:
        """Keep a method's scores.

        Raises:
            RapidInError: they are not finite.
        """
        if not np.isfinite(scores).all():
            raise RapidInError(f"the scores of {name} are not finite")
        path = self.folder / "scores" / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps({"seconds": seconds}), "utf-8")
        with path.with_suffix(".new").open("wb") as file:
            np.save(file, scores.astype(np.float32), allow_pickle=False)
        path.with_suffix(".new").replace(path)
        self.say(f"scores of {name}: {seconds:.0f} s")

    def product(self, corpus: Path, queries: Sequence[Sample], scores: np.ndarray) -> dict[str, Any]:
        """Run the experiment through a database, as a user would; return its times, and check its rankings."""

        def work() -> dict[str, Any]:
            place, seconds = self.folder / "db", {}
            if not (place / "samples.lance").is_dir():
                rapidin_vdb.init(
                    place, model=self.model, adapter=str(self.folder / "adapter"), width=self.profile.width,
                    shuffles=self.profile.shuffles[0], max_tokens=self.profile.max_tokens,
                )  # fmt: skip
            database = rapidin_vdb.open(place)
            database.load()
            started = time.monotonic()
            added = database.ingest(corpus, progress=self.progress).added
            seconds["ingest"] = time.monotonic() - started
            started = time.monotonic()
            database.index("cpu")
            seconds["index"] = time.monotonic() - started
            rankings = database.query(queries=list(queries), top_k=10)
            seconds["gradient_a_query"] = float(np.mean([ranking.seconds.gradient for ranking in rankings]))
            seconds["search_a_query"] = float(np.mean([ranking.seconds.search for ranking in rankings]))
            differing = 0.0
            for ranking, row in zip(rankings, scores, strict=True):
                best = np.sort(row)[::-1][:10]
                ours = np.array([result.score for result in ranking.results])
                differing = max(differing, float(np.abs(best - ours).max() / np.abs(best).max()))
            if differing > 0.01:
                raise RapidInError(f"the database's scores differ from the experiment's by {differing:.3f}")
            return {
                "seconds": seconds,
                "timed_samples": added,
                "bytes": database.info().bytes,
                "largest_difference": differing,
            }

        return self.step("product", work)


def words_in(text: str, wanted: Callable[[str], bool]) -> list[str]:
    """Return the distinct words of a text that are wanted."""
    return [word for word in dict.fromkeys(re.findall(r"[\w-]+", text)) if wanted(word)]
