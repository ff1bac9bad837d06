"""One database, as a Python object: the same operations as the command line's, with the same names and defaults."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rapidin_vdb.corpus import Template, load_template
from rapidin_vdb.errors import SpecError, TableError
from rapidin_vdb.gradient import LoadedModel, RapidGradMaker, fingerprint_of, load_model
from rapidin_vdb.index import Manifest, ShardedIndex, build_index, list_manifests, load_index, save_index
from rapidin_vdb.ingest import Corpus, ingest
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.query import encode_queries, query_from, rank, read_queries, sketch_queries
from rapidin_vdb.recipe import IndexRecipe, read_recipe
from rapidin_vdb.records import (
    DatabaseInfo,
    DType,
    Fingerprint,
    IndexInfo,
    IngestReport,
    ModelSpec,
    Normalize,
    OnBadRecord,
    OnDuplicate,
    Quantization,
    Ranking,
    Sample,
    SketchSpec,
    StoredSample,
)
from rapidin_vdb.store import SampleTable, Snapshot, check_fingerprint
from rapidin_vdb.store.table import TABLE

logger = logging.getLogger(__name__)

_DEFAULT_SKETCH = SketchSpec()


def init(
    path: str | Path,
    *,
    model: str,
    adapter: str | None = None,
    quantization: Quantization = "none",
    dtype: DType = "auto",
    width: int = _DEFAULT_SKETCH.width,
    shuffles: int = _DEFAULT_SKETCH.shuffles,
    seed: int = _DEFAULT_SKETCH.seed,
    normalize: Normalize = "layer",
    parameters: str = "trainable",
    template: str = "alpaca",
    max_tokens: int = 512,
    epochs: float = 1.0,
    learning_rate: float = 1.0,
    device: str = "auto",
) -> "Database":
    """Make a new database for the training samples of a model, and return it.

    The model is loaded, to take its fingerprint and to see that the sketch fits; nothing is written before that.

    Raises:
        TableExistsError: something is at `path` already.
        ModelError: the model or the adapter is missing, or they do not belong together.
        SpecError: a value that cannot be honoured, such as a width beyond the gradient.
    """
    for name, value in (("epochs", epochs), ("learning-rate", learning_rate)):
        if not (math.isfinite(value) and value > 0):
            raise SpecError(f"--{name} is {value}; wanted a number above 0")
    if max_tokens < 2:
        raise SpecError(f"--max-tokens is {max_tokens}; wanted 2 or more")
    if seed < 0:
        raise SpecError(f"--seed is {seed}; wanted 0 or more")
    SampleTable.check_free(str(path))
    loaded = load_model(
        ModelSpec(model=model, adapter=adapter, quantization=quantization, dtype=dtype, parameters=parameters),
        device=device,
    )
    chosen = load_template(template, tokenizer=loaded.tokenizer)
    fingerprint = fingerprint_of(
        loaded,
        template=chosen.name,
        template_text=chosen.text,
        max_tokens=max_tokens,
        normalize=normalize,
        sketch=SketchSpec(width=width, shuffles=shuffles, seed=seed),
        epochs=epochs,
        learning_rate=learning_rate,
    )
    engine = _Engine(fingerprint, loaded)
    return Database(SampleTable.create(str(path), fingerprint), engine=engine)


def open(path: str | Path) -> "Database":
    """Return an existing database; its model is loaded when first needed.

    Raises:
        TableNotFoundError: there is none.
    """
    return Database(SampleTable(str(path)))


class _Engine:
    """A loaded model with its sketch: what turns samples of one fingerprint into RapidGrads."""

    def __init__(self, fingerprint: Fingerprint, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.template: Template = load_template(
            fingerprint.template, tokenizer=loaded.tokenizer, text=fingerprint.template_text
        )
        self.maker = RapidGradMaker(loaded, spec=fingerprint.sketch, normalize=fingerprint.normalize)


class Database:
    """A database of RapidGrads. Make one with `rapidin_vdb.init`, open one with `rapidin_vdb.open`."""

    def __init__(self, table: SampleTable, *, engine: _Engine | None = None) -> None:
        self._table = table
        self._engine = engine
        self._resident: tuple[int, ShardedIndex] | None = None

    @property
    def path(self) -> str:
        """Where the database is."""
        return self._table.uri

    @property
    def fingerprint(self) -> Fingerprint:
        """What its vectors were made with."""
        return self._table.fingerprint

    def load(self, *, model: str | None = None, adapter: str | None = None, device: str = "auto") -> None:
        """Load the model now; `model` and `adapter` say where they are, if they have moved since `init`.

        Raises:
            ModelError: they cannot be loaded.
            FingerprintError: they are not those that the database was made with.
        """
        stored = self.fingerprint
        spec = ModelSpec(
            model=model or stored.model,
            adapter=adapter or stored.adapter,
            quantization=stored.quantization,
            dtype=cast(DType, stored.dtype if stored.dtype in ("float32", "bfloat16", "float16") else "auto"),
            parameters=stored.parameters,
        )
        loaded = load_model(spec, device=device)
        here = fingerprint_of(
            loaded,
            template=stored.template,
            template_text=stored.template_text,
            max_tokens=stored.max_tokens,
            normalize=stored.normalize,
            sketch=stored.sketch,
            epochs=stored.epochs,
            learning_rate=stored.learning_rate,
        )
        check_fingerprint(stored, here, place=self.path)
        self._engine = _Engine(stored, loaded)

    def _loaded(self) -> _Engine:
        if self._engine is None:
            self.load()
        assert self._engine is not None
        return self._engine

    def ingest(
        self,
        *files: str | Path,
        split: str | None = None,
        source: str | None = None,
        id_field: str = "id",
        limit: int | None = None,
        on_bad_record: OnBadRecord = "stop",
        on_duplicate: OnDuplicate = "error",
        progress: Progress = silent,
    ) -> IngestReport:
        """Add the records of some files; samples that are there already are left alone.

        Raises:
            CorpusError: a file or a record cannot be read; nothing is written.
            GradientError: a sample gives no finite gradient; those before it are written.
            TableError: a field does not fit its column; nothing is written.
        """
        if not files:
            raise SpecError("no file to ingest")
        if limit is not None and limit < 1:
            raise SpecError(f"--limit is {limit}; wanted 1 or more")
        engine = self._loaded()
        return ingest(
            self._table,
            engine.maker,
            Corpus(
                paths=tuple(Path(file) for file in files), split=split, source=source, id_field=id_field, limit=limit
            ),
            tokenizer=engine.loaded.tokenizer,
            template=engine.template,
            on_bad_record=on_bad_record,
            on_duplicate=on_duplicate,
            progress=progress,
        )

    def index(self, recipe: str | Path | IndexRecipe = "cpu", *, progress: Progress = silent) -> IndexInfo:
        """Build an index after a recipe, keep it beside the table, and say what it holds.

        Raises:
            SpecError: no such recipe, or one that cannot be honoured.
            TableError: the database is empty.
        """
        chosen = recipe if isinstance(recipe, IndexRecipe) else read_recipe(recipe)
        snapshot = self._table.snapshot()
        if not snapshot.count():
            raise TableError(
                f"the database {self.path} is empty; add samples first: rapidin-vdb ingest {self.path} FILE"
            )
        built = self._build(snapshot, chosen, progress=progress)
        manifest = save_index(built, self._index_folder, table=TABLE, table_version=snapshot.version)
        self._resident = (snapshot.version, built)
        return self._index_info(manifest, snapshot.version)

    def query(
        self,
        prompt: str | None = None,
        generation: str | None = None,
        *,
        file: str | Path | None = None,
        queries: Sequence[Sample] | None = None,
        top_k: int = 10,
        where: str | None = None,
        harmful: bool = False,
        model: str | None = None,
        adapter: str | None = None,
        device: str = "auto",
        progress: Progress = silent,
    ) -> list[Ranking]:
        """Return, for each query, the samples that most influenced its generation.

        Queries are one prompt and generation, or those of a file, or samples made by `query_from`. `model`, `adapter`
        and `device` are as for `load`, where nothing is loaded yet.

        Raises:
            CorpusError: a query cannot be read or encoded.
            GradientError: a query gives no finite gradient.
            FilterError: the filter cannot be understood.
            SpecError: `top_k` is not positive, or no query or several kinds of query are given.
        """
        if top_k < 1:
            raise SpecError(f"--top-k is {top_k}; wanted 1 or more")
        if (generation is not None) + (file is not None) + (queries is not None) != 1:
            raise SpecError("give one of: --prompt and --generation, or --file QUERIES.jsonl")
        if generation is not None:
            queries = [query_from(prompt, generation)]
        elif file is not None:
            queries = read_queries(Path(file))
        assert queries is not None
        snapshot = self._table.snapshot()
        if where is not None:
            snapshot.count(where)  # a filter that is not understood is said before a model is loaded
        if self._engine is None:
            self.load(model=model, adapter=adapter, device=device)
        engine = self._loaded()
        encoded = encode_queries(
            queries,
            tokenizer=engine.loaded.tokenizer,
            template=engine.template,
            max_tokens=self.fingerprint.max_tokens,
        )
        sketched = sketch_queries(engine.maker, encoded, progress=progress)
        index = self._fresh_index(snapshot, progress=progress)
        return rank(snapshot, index, sketched, top_k=top_k, where=where, harmful=harmful)

    def show(self, sample_id: str) -> StoredSample:
        """Return a sample as it is stored, without its vector.

        Raises:
            TableError: there is none of that id.
        """
        found = self._table.snapshot().samples([sample_id])
        if sample_id not in found:
            raise TableError(f"no sample {sample_id!r} in {self.path}; list some with: rapidin-vdb info {self.path}")
        return found[sample_id]

    def info(self) -> DatabaseInfo:
        """Return how large the database is, what made it, and which indexes are fresh."""
        snapshot = self._table.snapshot()
        stored = self.fingerprint
        return DatabaseInfo(
            samples=snapshot.count(),
            tokens=snapshot.total_tokens(),
            width=stored.sketch.width,
            shuffles=stored.sketch.shuffles,
            seed=stored.sketch.seed,
            normalize=stored.normalize,
            model=stored.model,
            adapter=stored.adapter,
            table_version=snapshot.version,
            indexes=tuple(
                self._index_info(manifest, snapshot.version) for manifest in list_manifests(self._index_folder)
            ),
            bytes=sum(path.stat().st_size for path in Path(self.path).rglob("*") if path.is_file()),
        )

    def delete(self, *, where: str | None = None, ids: Sequence[str] | None = None) -> list[str] | int:
        """Delete the samples that match a filter, or those of some ids; return how many, or which ids were there.

        Raises:
            FilterError: the filter cannot be understood; nothing is deleted.
            SpecError: neither or both are given.
        """
        if (where is None) == (ids is None):
            raise SpecError("give one of: --where SQL, or --ids FILE")
        return self._table.delete_where(where) if where is not None else self._table.delete_ids(ids or [])

    @property
    def _index_folder(self) -> Path:
        return Path(self.path) / "indexes"

    def _index_info(self, manifest: Manifest, version: int) -> IndexInfo:
        return IndexInfo(
            name=manifest.name,
            recipe=manifest.recipe,
            fresh=manifest.table_version == version,
            samples=manifest.samples,
        )

    def _build(self, snapshot: Snapshot, recipe: IndexRecipe, *, progress: Progress) -> ShardedIndex:
        count, done = snapshot.count(), 0
        progress("index", 0, count)

        def batches():  # type: ignore[no-untyped-def]
            nonlocal done
            for ids, vectors in snapshot.vectors():
                yield ids, vectors
                done += len(ids)
                progress("index", done, count)

        return build_index(recipe, batches(), width=self.fingerprint.sketch.width, count=count)

    def _fresh_index(self, snapshot: Snapshot, *, progress: Progress) -> ShardedIndex:
        """Return an index of exactly this version of the table: at hand, on disk, or made now."""
        if self._resident is not None and self._resident[0] == snapshot.version:
            return self._resident[1]
        manifests = list_manifests(self._index_folder)
        index = None
        for manifest in manifests:
            if manifest.table_version == snapshot.version and manifest.width == self.fingerprint.sketch.width:
                try:
                    index = load_index(self._index_folder, manifest)
                    break
                except SpecError as error:
                    logger.warning("%s", error)
        if index is None:
            if manifests:
                logger.info("no built index is of version %d: searching the table itself", snapshot.version)
            index = self._build(snapshot, read_recipe(manifests[0].name if manifests else "cpu"), progress=progress)
        self._resident = (snapshot.version, index)
        return index
