"""A database with its model, for what needs no index: the model is loaded, asked, and compared with another."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rapidin_vdb.arguments import whole
from rapidin_vdb.comparison import Judged, check_other, compare, judge, load_other, other_model
from rapidin_vdb.corpus import load_template
from rapidin_vdb.engine import Engine, load_checked, load_engine
from rapidin_vdb.focus import check_focus
from rapidin_vdb.gradient import release_memory
from rapidin_vdb.gradient.device import resolve_device
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import queries_of
from rapidin_vdb.reading import SampleReader
from rapidin_vdb.records import Focus, Sample
from rapidin_vdb.results import Comparison
from rapidin_vdb.store import SampleTable

Moved = str | Path | None  # where a model or an adapter is, if it has moved since `init`


class Speaker(SampleReader):
    """What a database's model is asked for, beside gradients."""

    def __init__(self, table: SampleTable, *, engine: Engine | None = None) -> None:
        super().__init__(table)
        self._engine = engine

    def load(self, *, model: Moved = None, adapter: Moved = None, device: str = "auto") -> None:
        """Load the model now; `model` and `adapter` say where they are, if they have moved since `init`.

        Raises:
            ModelError: they cannot be loaded.
            FingerprintError: they are not those that the database was made with.
        """
        self._engine = load_engine(self.fingerprint, place=self.path, model=model, adapter=adapter, device=device)

    def _loaded(self) -> Engine:
        if self._engine is None:
            self.load()
        assert self._engine is not None
        return self._engine

    def _engine_on(self, model: Moved, adapter: Moved, device: str, *, elsewhere: bool) -> Engine:
        """Return the engine; if it may be `elsewhere` than it is loaded, one on this very device."""
        here = self._engine
        if here is None:
            self.load(model=model, adapter=adapter, device=device)
        elif elsewhere and resolve_device(device) != here.loaded.device:
            self.load(model=model or here.loaded.spec.model, adapter=adapter or here.loaded.spec.adapter, device=device)
        return self._loaded()

    def generate(
        self, prompt: str | None = None, *, messages: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (), max_tokens: int = 128, temperature: float = 0.0, seed: int = 0,
        progress: Progress = silent,
    ) -> str:  # fmt: skip
        """Return what the model says to a prompt, or to a record's `messages`; most likely, or drawn at a temperature.

        Raises:
            CorpusError: a turn has no texts `role` and `content`, or the turns do not fit the template.
            SpecError: not one of both is given, an option is out of range, or the prompt leaves no room.
        """
        return self._loaded().generate(
            prompt, messages=messages, tools=tools, max_tokens=max_tokens, temperature=temperature, seed=seed,
            progress=progress,
        )  # fmt: skip

    def compare(
        self, prompt: str | None = None, generation: str | None = None, *, file: str | Path | None = None,
        queries: Iterable[Sample] | None = None, new_model: Moved = None, new_adapter: Moved = None,
        focus: str | Sequence[Focus] | None = (), answer_tokens: int = 0, model: Moved = None, adapter: Moved = None,
        device: str = "auto", progress: Progress = silent,
    ) -> list[Comparison]:  # fmt: skip
        """Return, for each query, how likely its generation is for the database's model, and for one trained anew.

        That is `new_adapter` on the database's base model, or `new_model`, or both; of the same tokenizer, and loaded
        in the same type. Queries and `focus` are as for `query`. With `answer_tokens`, the new model answers each
        prompt, too, by its most likely tokens; not where there is none, or where several turns follow it. One model is
        in memory at a time, unless the database's was loaded before. `model`, `adapter` and `device` are as for
        `query`: where the model is loaded on that device already, a new adapter is put on that one's base.

        Raises:
            CorpusError: a query cannot be read or encoded.
            ModelError: a model cannot be loaded, gives losses that are not finite, or has a tokenizer that makes other
                tokens of a query.
            FingerprintError: the database's model is not the one that it was made with.
            GradientError: a query, or an answer, does not fit the memory.
            SpecError: no model to compare with is given, no query or several kinds of query, an option is out of range,
                or a prompt leaves no room for an answer.
        """
        answer_tokens = whole("--answer-tokens", answer_tokens, 0, 4096, wanted="0 (none) to 4096")
        wanted = (focus,) if isinstance(focus, str) else tuple(focus or ())
        check_focus(wanted)
        stored = self.fingerprint
        here = None if self._engine is None else self._engine.loaded
        if here is not None:  # both are to be computed alike, and of one base
            device = here.device if device == "auto" else resolve_device(device)
            model = here.spec.model if model is None or device == here.device else model
        spec = other_model(stored, model=model, new_model=new_model, new_adapter=new_adapter)
        asked = queries_of(prompt, generation, file=file, queries=queries)
        if not asked:
            return []
        with nullcontext() if self._engine is None else self._engine.alone:
            check_other(
                stored, spec, asked, model=model, adapter=adapter, tokenizer=None if here is None else here.tokenizer,
                focus=wanted, answers=answer_tokens > 0,
            )  # fmt: skip
        before = self._judged(asked, wanted, model, adapter, device, progress)
        loaded = load_other(stored, spec, device=device)
        return compare(before, loaded, answer_tokens=answer_tokens, progress=progress)

    def _judged(
        self, queries: Sequence[Sample], focus: Sequence[Focus], model: Moved, adapter: Moved, device: str,
        progress: Progress,
    ) -> Judged:  # fmt: skip
        """Return queries judged by the database's model; what was not in memory before is not there afterwards."""
        stored = self.fingerprint
        if self._engine is not None:
            engine = self._engine_on(model, adapter, device, elsewhere=device != "auto")
            with engine.alone:
                return judge(
                    queries, engine.loaded, engine.template, max_tokens=stored.max_tokens, focus=focus,
                    progress=progress,
                )  # fmt: skip
        loaded = load_checked(stored, place=self.path, model=model, adapter=adapter, device=device)
        template = load_template(stored.template, tokenizer=loaded.tokenizer, text=stored.template_text)
        before = judge(queries, loaded, template, max_tokens=stored.max_tokens, focus=focus, progress=progress)
        del loaded, template
        gc.collect()  # its modules may know each other
        release_memory()
        return before
