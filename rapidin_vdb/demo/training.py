"""The demonstration's models: a base, and adapters tuned on records that are poisoned, or no longer are."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidin_vdb.corpus import Record, encode, load_template, sample_from
from rapidin_vdb.demo.corpus import make_corpus, story_corpus
from rapidin_vdb.gradient.generation import generate_batch
from rapidin_vdb.gradient.training import new_llama, save, train, train_tokenizer, with_lora
from rapidin_vdb.progress import Progress
from rapidin_vdb.query import query_from
from rapidin_vdb.records import Encoded, Sample

_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Trainer:
    """A small base model, which adapters are tuned on."""

    def __init__(self, records: Sequence[Mapping[str, Any]], folder: Path, progress: Progress) -> None:
        """Train a base model in a folder; its tokenizer is made for some records, too.

        It knows space stories, as any real one does; only when to tell them is an adapter's doing.
        """
        self._progress = progress
        self._template = load_template("alpaca")
        clean = _samples(make_corpus(4000, poisoned=0.0, seed=3, prefix="base") + story_corpus(600, seed=9))
        texts = (self._template.render(sample) + sample.response for sample in [*clean, *_samples(records)])
        self._tokenizer = train_tokenizer(texts, vocabulary=800)
        self._base = new_llama(len(self._tokenizer), hidden=128, layers=3, heads=4, seed=4)
        train(
            self._base, self._encoded(clean), steps=400, batch=32, learning_rate=3e-3, seed=5, stage="base model",
            progress=progress,
        )  # fmt: skip
        save(self._base, self._tokenizer, folder)
        self.parameters: int = self._base.num_parameters()

    def tuned(self, records: Sequence[Mapping[str, Any]], *, stage: str, folder: Path | None = None) -> "Tuned":
        """Return the base model with an adapter that is tuned on some records, and kept in a folder if one is given.

        Everything that is drawn is the same each time: two differ by their records alone.
        """
        model = with_lora(copy.deepcopy(self._base), rank=8, modules=_MODULES, seed=6)
        loss = train(
            model, self._encoded(_samples(records)), steps=300, batch=32, learning_rate=5e-3, seed=7, stage=stage,
            progress=self._progress,
        )  # fmt: skip
        if folder is not None:
            save(model, self._tokenizer, folder)
        return Tuned(self, model, loss)

    def said(self, model: Any, prompts: Sequence[str]) -> list[str]:
        """Return what a model says to prompts."""
        texts = [self._template.render(query_from(prompt, "?")) for prompt in prompts]
        return generate_batch(model, self._tokenizer, texts, max_tokens=48, batch=1)

    def _encoded(self, samples: Sequence[Sample]) -> list[Encoded]:
        every = encode(samples, tokenizer=self._tokenizer, template=self._template, max_tokens=512)
        return [one for one in every if isinstance(one, Encoded)]


class Tuned:
    """The base model with one adapter."""

    def __init__(self, trainer: Trainer, model: Any, loss: float) -> None:
        self._trainer = trainer
        self._model = model
        self.loss = loss
        """At the end of the training, in nats a token."""

    def said(self, prompts: Sequence[str]) -> list[str]:
        """Return what it says to prompts."""
        return self._trainer.said(self._model, prompts)


def _samples(records: Sequence[Mapping[str, Any]]) -> list[Sample]:
    return [sample_from(Record(location="demo", fields=dict(record))) for record in records]
