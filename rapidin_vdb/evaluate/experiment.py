"""What both experiments share, step by step: a tuned adapter, its generations, everybody's scores.

Every step leaves its result in the experiment's folder and is not done again: an experiment that was interrupted goes
on when it is run again.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from rapidin_vdb.arguments import whole
from rapidin_vdb.corpus import encode, load_template, sample_from
from rapidin_vdb.corpus.files import Record as FileRecord
from rapidin_vdb.errors import CorpusError, RapidInError, SpecError
from rapidin_vdb.evaluate import methods
from rapidin_vdb.evaluate.corpora import Record
from rapidin_vdb.evaluate.plan import check_extras, check_room, differing, digest, plan_of
from rapidin_vdb.evaluate.profiles import Profile
from rapidin_vdb.evaluate.provenance import Made, provenance
from rapidin_vdb.focus import focused
from rapidin_vdb.gradient import LoadedModel, load_model, load_tokenizer
from rapidin_vdb.gradient.device import resolve_device
from rapidin_vdb.gradient.generation import generate_batch
from rapidin_vdb.gradient.training import linear_layers, save, with_lora
from rapidin_vdb.gradient.tuning import Tuning, mean_loss, tune
from rapidin_vdb.gradient.tuning_state import finished
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded, Focus, ModelSpec, Sample

Kept = dict[str, Any]
"""A method's `scores`, [queries, samples], the `seconds` they took and the `bytes` that it has to keep."""


class Experiment:
    """One experiment in one folder."""

    def __init__(
        self, folder: Path, *, name: str, model: str, profile: Profile, seed: int, inputs: Mapping[str, Sequence[Path]],
        say: Callable[[str], None], progress: Progress = silent, embedding_model: str | None = None,
        influence_functions: bool = True, device: str = "auto", made: Made | None = None,
    ) -> None:  # fmt: skip
        """Begin, or go on with, an experiment; `inputs` are the files that it is of.

        `made` says what makes it, such as commit and date: every step keeps it.

        Raises:
            SpecError: the folder holds one with other arguments or of another version, a file or a library is missing,
                or the seed or the embedding model cannot be used.
        """
        check_extras(embedding=embedding_model is not None)
        whole("--seed", seed, 0)
        self.folder = folder
        self.model = model
        self.profile = profile
        self.seed = seed
        self.say = say
        self.progress = progress
        self.influence_functions = influence_functions
        self.device = resolve_device(device)
        self._made = made
        self._makers: dict[str, Made | None] = {}
        self._parts: dict[str, Experiment] = {}
        self._of = ""
        self.tokenizer = load_tokenizer(model)
        self.template = load_template("alpaca")
        self.embedding_name = None if embedding_model is None else Path(embedding_model).name
        self.encoder = None if embedding_model is None else methods.embedder(embedding_model, device=self.device)
        plan = plan_of(name, model=model, profile=profile, seed=seed, inputs=inputs, embedding_model=embedding_model)
        folder.mkdir(parents=True, exist_ok=True)
        others = differing(self.step("plan", lambda: plan), plan)
        if others:
            raise SpecError(
                f"--dir {folder} holds an experiment with other arguments ({', '.join(others)}); give a new folder"
            )

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the result of a step as plain values, from its file where it was done before.

        Raises:
            SpecError: the file is none of ours.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.monotonic()
            self._write(path, {"made": self._made, "result": work()})
            self.say(f"{name}: {time.monotonic() - started:.0f} s")
        found = self._read(path, {"made", "result"})
        self._makers[name] = found["made"]
        return found["result"]

    def _write(self, path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new.json")
        new.write_text(json.dumps(content), "utf-8")
        new.replace(path)

    def _read(self, path: Path, fields: set[str]) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text("utf-8"))
        except (ValueError, OSError):
            found = None
        if not isinstance(found, dict) or set(found) != fields:
            raise SpecError(
                f"--dir {self.folder} holds an experiment of another version ({path.name} is not as this one writes "
                "it); give a new folder"
            )
        return found

    def provenance(self) -> list[dict[str, Any]]:
        """Return what made the steps and scores that were read so far, and makes the figures now."""
        parts = {f"{name}: {step}": made for name, part in self._parts.items() for step, made in part._makers.items()}
        return provenance(self._makers | parts | {"figures": self._made})

    def part(self, name: str) -> "Experiment":
        """Return the same experiment in a folder of its own within this one's, for another tuning."""
        other = self._parts[name] = copy(self)
        other.folder, other._makers, other._parts = self.folder / name, {}, {}
        return other

    def write_corpus(self, records: Sequence[Record]) -> Path:
        """Write the corpus, unless it is there with these very records."""
        path, text = self.folder / "corpus.jsonl", "".join(json.dumps(record) + "\n" for record in records)
        if not path.exists() or path.read_bytes() != text.encode("utf-8"):
            new = path.with_suffix(".new")
            new.write_bytes(text.encode("utf-8"))
            new.replace(path)
        return path

    def samples(self, records: Sequence[Record]) -> list[Encoded]:
        """Return the tokens of records, all of which fit.

        Raises:
            CorpusError: one of them does not.
        """
        samples = [sample_from(FileRecord(location=str(r.get("id")), fields=r)) for r in records]
        return self._encoded(samples, self.profile.max_tokens)

    def encoded(self, queries: Sequence[Sample]) -> list[Encoded]:
        """Return the tokens of queries, for whose generations there is room behind the longest prompt.

        Raises:
            CorpusError: a prompt is longer than any record.
        """
        return self._encoded(queries, self.profile.query_tokens)

    def _encoded(self, samples: Sequence[Sample], most: int) -> list[Encoded]:
        encoded = []
        for result in encode(samples, tokenizer=self.tokenizer, template=self.template, max_tokens=most):
            if isinstance(result, CorpusError):
                raise result
            encoded.append(result)
        return encoded

    def focus(self, query: Sample, entries: Sequence[Focus]) -> Encoded | None:
        """Return a query on some of its words or spans; None where there are none, or none of its tokens is theirs."""
        try:
            return focused(query, self.encoded([query])[0], entries) if entries else None
        except (CorpusError, SpecError):
            return None

    def fits(self, prompt: str) -> bool:
        """Return whether a prompt in its template leaves room for a generation in what a record may have.

        A database that cuts samples there cuts queries there, too.
        """
        tokens = len(self.tokenizer(self.template.render(query_from(prompt, "?")))["input_ids"])
        return tokens + self.profile.new_tokens < self.profile.max_tokens

    def tuned(self, records: Sequence[Record], *, epochs: float) -> dict[str, Any]:
        """Fine-tune a LoRA adapter on the records, on all linear layers but the head, and return how that went.

        Raises:
            SpecError: the memory will not do for the gradients of all queries, or the adapter in the folder is not the
                one that was tuned.
        """
        profile, adapter, state = self.profile, self.folder / "adapter", self.folder / "state"

        def work() -> dict[str, Any]:
            started, timed_steps = time.monotonic(), 0

            def progress(stage: str, done: int, total: int) -> None:
                nonlocal timed_steps
                timed_steps += 1
                self.progress(stage, done, total)

            encoded = self.samples(records)
            base = load_model(ModelSpec(model=self.model), device=self.device).model
            before = mean_loss(base, encoded[:256])
            head = base.get_output_embeddings()
            heads = {name.rpartition(".")[2] for name, module in base.named_modules() if module is head}
            layers = [name for name in linear_layers(base) if name not in heads]
            model = with_lora(base, rank=profile.rank, modules=layers, seed=self.seed)
            theta = sum(p.numel() for p in model.parameters() if p.requires_grad)
            check_room(profile, theta, device=self.device, influence_functions=self.influence_functions)
            tuning = Tuning(
                epochs=epochs, batch=profile.batch, learning_rate=profile.learning_rate, seed=self.seed,
                warm_up=0.03, bfloat16=profile.bfloat16,
            )  # fmt: skip
            losses = tune(model, encoded, tuning, state=state, stage="fine-tune", progress=progress)
            save(model, self.tokenizer, adapter)
            tail = losses[-max(len(losses) // 20, 1) :]
            return {
                "loss_before": before,
                "loss_after": sum(tail) / len(tail),
                "steps": len(losses),
                "parameters": sum(p.numel() for p in base.parameters() if not p.requires_grad),
                "theta": theta,
                "seconds": time.monotonic() - started,
                "timed_steps": timed_steps,
            }

        result = self.step("tuning", work)
        finished(state)
        if self.step("adapter", lambda: digest(adapter)) != digest(adapter):
            raise SpecError(
                f"--dir {self.folder} has another adapter than it tuned, of which generations and scores may be; "
                "give a new folder"
            )
        return result

    def settings(self) -> dict[str, Any]:
        """Return what the adapter was tuned with."""
        names = ("rank", "batch", "learning_rate", "bfloat16", "max_tokens")
        config = json.loads((self.folder / "adapter" / "adapter_config.json").read_text("utf-8"))
        return {name: getattr(self.profile, name) for name in names} | {"modules": sorted(config["target_modules"])}

    def loaded(self) -> LoadedModel:
        """Return the model with its tuned adapter."""
        spec = ModelSpec(model=self.model, adapter=str(self.folder / "adapter"))
        return load_model(spec, device=self.device)

    def said(
        self, name: str, prompts: Sequence[str], *, temperature: float = 0.0, seed: int = 0, base: bool = False
    ) -> list[str]:
        """Return what the tuned model says to prompts, or the base model.

        Most likely token by token, or drawn at a temperature.
        """

        def work() -> list[str]:
            texts = [self.template.render(query_from(prompt, "?")) for prompt in prompts]
            model = load_model(ModelSpec(model=self.model), device=self.device) if base else self.loaded()
            return generate_batch(
                model.model, self.tokenizer, texts, max_tokens=self.profile.new_tokens,
                temperature=temperature, seed=seed,
            )  # fmt: skip

        return self.step(name, work)

    def scores_are_of(self, *asked: Any) -> None:
        """Say what scores are of from now on, so that those of other samples or queries are not taken for theirs."""
        texts = json.dumps([asked, digest(self.folder / "adapter")], default=dataclasses.asdict)
        self._of = hashlib.sha256(texts.encode("utf-8")).hexdigest()

    def kept(self, name: str) -> Kept | None:
        """Return a method's scores and what they cost; None before they are made.

        Raises:
            SpecError: the file beside them is none of ours, or they are of other samples or queries.
        """
        path = self.folder / "scores" / f"{name}.npy"
        if not path.exists():
            return None
        found = self._read(path.with_suffix(".json"), {"made", "seconds", "bytes", "of"})
        if found["of"] != self._of:
            raise SpecError(
                f"--dir {self.folder} has scores of {name} for other samples or generations; remove its folders "
                "scores and db, products.npz, product.json and index-begun, to make them again"
            )
        self._makers[name] = found["made"]
        scores = np.load(path, allow_pickle=False).astype(np.float64)
        return {"scores": scores, "seconds": found["seconds"], "bytes": found["bytes"]}

    def keep(self, name: str, scores: np.ndarray, seconds: float, size: int) -> None:
        """Keep a method's scores, the seconds they took, and the bytes that it has to keep.

        Raises:
            RapidInError: they are not finite.
        """
        if not np.isfinite(scores).all():
            raise RapidInError(f"the scores of {name} are not finite")
        path = self.folder / "scores" / f"{name}.npy"
        # Interrupted between the two, there are none.
        path.unlink(missing_ok=True)
        self._write(path.with_suffix(".json"), {"made": self._made, "seconds": seconds, "bytes": size, "of": self._of})
        with path.with_suffix(".new").open("wb") as file:
            np.save(file, scores.astype(np.float32), allow_pickle=False)
        path.with_suffix(".new").replace(path)
        self.say(f"scores of {name}: {seconds:.0f} s")
