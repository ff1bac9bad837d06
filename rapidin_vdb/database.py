"""One database, as a Python object: the same operations as the command line's, with the same names and defaults."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rapidin_vdb.answering import Keeper, answer, nearest, pooled, versions_for
from rapidin_vdb.arguments import name_of, one_of, whole
from rapidin_vdb.cluster import ClusterKeeper, session_of
from rapidin_vdb.corpus import paths_of
from rapidin_vdb.engine import Engine
from rapidin_vdb.errors import SpecError
from rapidin_vdb.estimate import estimate
from rapidin_vdb.freshness import IndexKeeper
from rapidin_vdb.ingest import ingest
from rapidin_vdb.intake import Corpus
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import queries_of
from rapidin_vdb.question import Question
from rapidin_vdb.reading import ids_of, info_of
from rapidin_vdb.recipe import IndexRecipe, read_recipe
from rapidin_vdb.records import Aggregate, Focus, Level, OnBadRecord, OnDeleted, OnDuplicate, Sample
from rapidin_vdb.results import DatabaseInfo, IndexInfo, IngestEstimate, IngestReport, Pool, Ranking, VerifyReport
from rapidin_vdb.roads import choose_road, token_width_for
from rapidin_vdb.speaker import Moved, Speaker
from rapidin_vdb.store import SampleTable, TableVersion, undisturbed, undisturbed_each
from rapidin_vdb.verification import verify


class Database(Speaker):
    """A database of RapidGrads. Make one with `rapidin_vdb.init`, open one with `rapidin_vdb.open`."""

    def __init__(self, table: SampleTable, *, engine: Engine | None = None) -> None:
        super().__init__(table, engine=engine)
        self._clusters: dict[tuple[str, str], ClusterKeeper] = {}  # by session; a process can be in one at a time
        self._indexes: dict[Level, IndexKeeper] = {
            "sample": IndexKeeper(table.place.cache / "indexes", cached=table.place.cached),
            "token": IndexKeeper(table.place.cache / "token_indexes", cached=table.place.cached),
        }

    def ingest(
        self, *files: str | Path, split: str | None = None, source: str | None = None, id_field: str = "id",
        limit: int | None = None, batch_tokens: int | None = None, device: str = "auto", workers_per_device: int = 1,
        cluster: str | None = None, on_bad_record: OnBadRecord = "stop", on_duplicate: OnDuplicate = "error",
        on_deleted: OnDeleted = "add", token_gradients: bool = False, token_width: int | None = None,
        dry_run: bool = False, model: Moved = None, adapter: Moved = None, progress: Progress = silent,
    ) -> IngestReport | IngestEstimate:  # fmt: skip
        """Add the records of some files; samples that are there already are left alone.

        `device` may name several, as `cuda:0,cuda:1`. With more than one device or worker, each worker is a process
        that loads the model for itself; `cluster` puts them on a Ray cluster: its address, `auto` or `local`.
        `batch_tokens` limits a batch, padding included; by default it follows free memory. With `token_gradients`,
        response tokens get RapidGrads of their own, of width `token_width` (by default that of those there, else 4096);
        samples that are there without get them. By `on_deleted="skip"`, samples stay away that kept versions show to
        have been deleted. A `dry_run` counts and times instead of writing.

        Raises:
            CorpusError: a file or a record cannot be read; nothing is written. Or a file was changed meanwhile.
            GradientError: a sample gives no finite gradient; those before it are written.
            TableError: a field does not fit its column; nothing is written.
        """
        if not files:
            raise SpecError("no file to ingest")
        least_one = {"limit": limit, "batch-tokens": batch_tokens, "workers-per-device": workers_per_device}
        for name, value in least_one.items():
            whole(f"--{name}", 1 if value is None else value, 1)
        one_of("on-bad-record", on_bad_record, OnBadRecord)
        one_of("on-duplicate", on_duplicate, OnDuplicate)
        one_of("on-deleted", on_deleted, OnDeleted)
        single = token_width_for(self._table, token_width, wanted=token_gradients)
        corpus = Corpus(
            paths=paths_of(files), split=split, source=source, id_field=id_field, limit=limit,
            turns=self.fingerprint.turns,
        )  # fmt: skip
        road, tokens, workers, devices = choose_road(
            self.fingerprint, place=self.path, device=str(device),
            loaded=partial(self._engine_on, model, adapter, elsewhere=device != "auto"),
            workers_per_device=workers_per_device, batch_tokens=batch_tokens, dry_run=dry_run, cluster=cluster,
            model=name_of(model), adapter=name_of(adapter), token_width=single,
        )  # fmt: skip
        options = {"tokenizer": road.tokenizer, "template": road.template, "batch_tokens": tokens}
        options |= {"token_width": single, "progress": progress}
        options |= {"on_bad_record": on_bad_record, "on_duplicate": on_duplicate, "on_deleted": on_deleted}
        if dry_run:
            return estimate(self._table, corpus, road.compute, workers=workers, devices=devices, **options)
        return ingest(self._table, corpus, road.compute, **options)

    @undisturbed
    def index(
        self, recipe: str | Path | IndexRecipe = "cpu", *, level: Level = "sample", progress: Progress = silent
    ) -> IndexInfo:
        """Build an index after a recipe, or bring one up to date, keep it beside the table, and say what it holds.

        With the level `token` it is one of single tokens.

        Raises:
            SpecError: no such recipe, or one that cannot be honoured.
            TableError: the database is empty, or has no RapidGrads of tokens.
        """
        chosen = recipe if isinstance(recipe, IndexRecipe) else read_recipe(recipe)
        versions_for(self._table, Question(level=level))
        self._table.ensure_scalar_indices()
        samples, tokens = versions_for(self._table, Question(level=level))
        return self._indexes[level].build(tokens or samples, chosen, progress=progress)

    @undisturbed
    def open_index(self, *, progress: Progress = silent) -> None:
        """Read what queries are answered from, as otherwise the first of them does; nothing of an empty database."""
        if (snapshot := self._table.snapshot()).count():
            self._indexes["sample"].fresh(snapshot, progress=progress)

    def query(
        self,
        prompt: str | None = None,
        generation: str | None = None,
        *,
        file: str | Path | None = None,
        queries: Iterable[Sample] | None = None,
        top_k: int = 10,
        where: str | None = None,
        harmful: bool = False,
        both: bool = False,
        level: Level = "sample",
        focus: str | Sequence[Focus] | None = (),
        tokens: bool = False,
        matrix: bool = False,
        refine: int = 0,
        group_by: str | None = None,
        aggregate: Aggregate = "sum",
        histogram: int = 0,
        index: str | None = None,
        as_of: int | None = None,
        model: Moved = None,
        adapter: Moved = None,
        device: str = "auto",
        cluster: str | None = None,
        progress: Progress = silent,
    ) -> list[Ranking]:
        """Return, for each query, the samples that most influenced its generation.

        Queries are one prompt and generation, or those of a file, or samples made by `query_from`. With `both`, the
        most negative come beside the most positive, from one pass. With the level `token`, single training tokens are
        ranked. `focus` names texts of the generation, or spans of its code points, whose tokens alone are asked about
        (Eq. 7); a query of a file may have its own. `tokens` gives each result's tokens scores (Eq. 6), and `matrix`
        their influence on each token of the generation as a part of the whole (Eq. 8), both exact; `refine` ranks so
        many of the first results again by exact score. `group_by` names a column, by whose values the influence of all
        samples is added up or averaged; `histogram` counts all scores in so many bins. `index` names the built index to
        use, and `as_of` an older version of the table. `model`, `adapter` and `device` are as for `load`, where nothing
        is loaded yet, or elsewhere. `cluster`, a Ray cluster's address, `auto` or `local`, searches a share of the rows
        on each node.

        Raises:
            CorpusError: a query cannot be read or encoded.
            GradientError: a query gives no finite gradient.
            FilterError: the filter cannot be understood.
            SpecError: an option is out of range or excludes another, no query or several kinds of query are given, a
                focus is not in its generation, or no such index is built.
            TableError: the database is empty, has no such version, or no RapidGrads of tokens.
        """
        question = Question(
            top_k=top_k, where=where, harmful=harmful, both=both, level=level,
            focus=(focus,) if isinstance(focus, str) else tuple(focus or ()), tokens=tokens,
            matrix=matrix, refine=refine, group_by=group_by, aggregate=aggregate, histogram=histogram,
            index=index, as_of=as_of,
        )  # fmt: skip
        asked = queries_of(prompt, generation, file=file, queries=queries)
        if not asked:
            return []
        self.prepare(question, model=model, adapter=adapter, device=device)
        return undisturbed(lambda: list(self.ask(question, asked, cluster=cluster, progress=progress)))()

    def pool(
        self, prompt: str | None = None, generation: str | None = None, *, file: str | Path | None = None,
        queries: Iterable[Sample] | None = None, size: int = 100, where: str | None = None, harmful: bool = False,
        both: bool = False, focus: str | Sequence[Focus] | None = (), index: str | None = None,
        as_of: int | None = None, model: Moved = None, adapter: Moved = None, device: str = "auto",
        cluster: str | None = None, progress: Progress = silent,
    ) -> Pool:  # fmt: skip
        """Return the `size` samples of largest influence on any of the queries' generations, as one list.

        So a fault that was told in several ways is found by several generations that show it. With `both`, samples
        count by absolute influence: those, too, that say the fault otherwise and are most negative. All else is as for
        `query`.

        Raises:
            SpecError: as for `query`, or there is no query at all.
            CorpusError, GradientError, FilterError, TableError: as for `query`.
        """
        question = Question(
            top_k=whole("--size", size, 1, wanted="1 or more"), where=where, harmful=harmful, both=both,
            focus=(focus,) if isinstance(focus, str) else tuple(focus or ()), index=index, as_of=as_of,
        )  # fmt: skip
        asked = queries_of(prompt, generation, file=file, queries=queries)
        if not asked:
            raise SpecError("no generation to pool the rankings of; give one or more")
        self.prepare(question, model=model, adapter=adapter, device=device)

        def answered() -> Pool:
            versions, keeper = versions_for(self._table, question), self._keeper("sample", cluster)
            return pooled(question, asked, versions=versions, keeper=keeper, engine=self._loaded(), progress=progress)

        return undisturbed(answered)()

    def prepare(self, question: Question, *, model: Moved = None, adapter: Moved = None, device: str = "auto") -> None:
        """See that a question can be answered, and load the model where that is still to be done.

        Raises:
            FilterError: the filter cannot be understood.
            ModelError: the model cannot be loaded.
            SpecError: there is no such device.
            FingerprintError: it is not that which the database was made with.
            TableError: the database is empty, has no such version, or no RapidGrads of tokens.
        """
        if self._engine is None:
            undisturbed(versions_for)(self._table, question)  # what it cannot answer is said before a model is loaded
        self._engine_on(model, adapter, device, elsewhere=device != "auto")

    @undisturbed_each
    def ask(
        self, question: Question, queries: Sequence[Sample], *, cluster: str | None = None, progress: Progress = silent
    ) -> Iterator[Ranking]:
        """Yield what `query` returns, each as soon as it is ready, for options that were put together before."""
        versions = versions_for(self._table, question)
        keeper, engine = self._keeper(question.level, cluster), self._loaded()
        return answer(question, queries, versions=versions, keeper=keeper, engine=engine, progress=progress)

    def _keeper(self, level: Level, cluster: str | None) -> Keeper:
        if cluster is None:
            return self._indexes[level]
        if (session := session_of(cluster)) not in self._clusters:
            self._clusters = {session: ClusterKeeper(self._table.place, cluster)}
        return self._clusters[session]

    @undisturbed
    def nearest(self, sample_id: str, question: Question, *, progress: Progress = silent) -> Ranking:
        """Return the samples that most influence what a sample teaches, by its stored RapidGrad; it is among them.

        Raises:
            TableError: there is no sample of that id.
            SpecError: the question asks for what takes a generation.
        """
        snapshot, _ = versions_for(self._table, question)
        return nearest(question, sample_id, snapshot=snapshot, keeper=self._indexes["sample"], progress=progress)

    @undisturbed
    def info(self) -> DatabaseInfo:
        """Return how large the database is, what made it, and which indexes are fresh."""
        snapshot = self._table.snapshot()
        tokens = self._table.tokens.snapshot()
        built = self._indexes["sample"].built(snapshot)
        built += () if tokens is None else self._indexes["token"].built(tokens)
        return info_of(snapshot, tokens, built=built, size=self.bytes)

    def verify(self, *, progress: Progress = silent) -> VerifyReport:
        """Read all of the database, say what is wrong, and mend what is only a cache."""
        return verify(self._table, self._kept(), progress=progress)

    def _kept(self) -> list[tuple[IndexKeeper, Callable[[], TableVersion]]]:
        """Return the keepers of indexes, each with what gives the version that its indexes should hold."""
        kept: list[tuple[IndexKeeper, Callable[[], TableVersion]]] = [(self._indexes["sample"], self._table.snapshot)]
        return kept + ([(self._indexes["token"], self._table.tokens.newest)] if self._table.tokens else [])

    def delete(
        self, *, where: str | None = None, ids: Sequence[str] | None = None, purge: bool = False
    ) -> list[str] | int:
        """Delete the samples that match a filter, or those of some ids; return how many, or which ids were there.

        With `purge`, nothing of them is left in any file, nor of what was deleted or replaced before: older versions
        are gone, and built indexes are built anew. It may be asked for alone.

        Raises:
            FilterError: the filter cannot be understood; nothing is deleted.
            SpecError: neither or both are given, or the ids are one string.
        """
        wanted = ids_of(ids)
        if (where is None) == (ids is None) and not (purge and where is None):
            raise SpecError("give one of: --where SQL, or --ids FILE")
        gone: list[str] | int = 0
        if where is not None or ids is not None:
            delete = undisturbed(self._table.delete_where)
            gone = delete(where) if where is not None else self._table.delete_ids(wanted or [])
        if purge:
            self._table.purge()
            for keeper, newest in self._kept():
                keeper.rebuild_all(newest)
        return gone
