"""Ingest, index, query and delete on a toy: law 6, the ranking against the slow way, and what must not happen."""

import dataclasses
import gzip
import json
import shutil

import numpy as np
import pytest
from conftest import toy_records, write_jsonl
from reference import normalized, sample_gradient, sketched, top_k
from safetensors.torch import load_file, save_file

import rapidin_vdb
from rapidin_vdb.cli.ingest import ingested
from rapidin_vdb.corpus import Record, encode, load_template, sample_from
from rapidin_vdb.errors import CorpusError, FingerprintError, GradientError, SpecError, TableError
from rapidin_vdb.query import query_from
from rapidin_vdb.sketch import BucketMap, draw_shuffle


def content(database) -> dict[str, tuple]:
    """Everything that a table says of each sample, its vector included."""
    snapshot = database._table.snapshot()
    vectors = {
        name: vector.tobytes()
        for batch in snapshot.vectors()
        for name, vector in zip(batch.keys, batch.vectors, strict=True)
    }
    samples = snapshot.samples(list(vectors))
    assert len(vectors) == snapshot.count(), "no id stands twice"
    return {name: (samples[name], vectors[name]) for name in vectors}


def make(path, models, adapters, **options):
    return rapidin_vdb.init(path, model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, **options)


def slow_rapidgrads(database, samples) -> dict[str, np.ndarray]:
    """Every step in numpy and plain autograd, one sample at a time."""
    engine, spec = database._loaded(), database.fingerprint.sketch
    made = BucketMap(spec, database.fingerprint.gradient_length)
    steps, negative = draw_shuffle(spec, made.length), made.negative(0, made.length).numpy()
    result = {}
    encoded = encode(samples, tokenizer=engine.loaded.tokenizer, template=load_template("alpaca"), max_tokens=512)
    for one in encoded:
        grads = sample_gradient(engine.loaded.model, engine.loaded.theta, list(one.input_ids), one.response_tokens)
        flat = np.concatenate([grad.ravel() for grad in normalized(grads)])
        result[one.sample_id] = sketched(flat, length=made.length, steps=steps, negative=negative, width=spec.width)
    return result


@pytest.mark.parametrize("where", [None, "source = 'odd' AND stars > 1"])
@pytest.mark.parametrize("harmful", [False, True])
def test_a_ranking_equals_the_slow_way(database, where, harmful):
    records = toy_records(24)
    samples = [sample_from(Record(location="", fields=record)) for record in records]
    vectors = slow_rapidgrads(database, samples)
    query = slow_rapidgrads(database, [query_from("Say 5", "blue 35")])["query"]
    allowed = {r["id"]: vectors[r["id"]] for r in records if where is None or (r["source"] == "odd" and r["stars"] > 1)}
    sign = -1 if harmful else 1
    expected = top_k(allowed, sign * query, 6)
    (ranking,) = database.query("Say 5", "blue 35", top_k=6, where=where, harmful=harmful)
    assert (ranking.searched, ranking.where, ranking.query_id) == (len(allowed), where, "query")
    assert [result.sample_id for result in ranking.results] == [name for name, _ in expected]
    # Stored in half precision, so the same to three digits.
    np.testing.assert_allclose(
        [r.score for r in ranking.results], [sign * s for _, s in expected], rtol=5e-3, atol=5e-3
    )
    by_id = {record["id"]: record for record in records}
    assert [(r.rank, r.prompt, r.response, r.source, r.split, r.metadata) for r in ranking.results] == [
        (
            place,
            by_id[name]["instruction"],
            by_id[name]["output"],
            by_id[name]["source"],
            "train",
            {"stars": by_id[name]["stars"]},
        )
        for place, (name, _) in enumerate(expected, start=1)
    ]


def test_scores_carry_epochs_and_learning_rate(tmp_path, models, adapters, database):
    scaled = make(tmp_path / "scaled", models, adapters, epochs=3.0, learning_rate=0.5)
    scaled.ingest(tmp_path / "toy.jsonl")
    (plain,), (other,) = (one.query("Say 5", "blue 35") for one in (database, scaled))
    assert [r.sample_id for r in other.results] == [r.sample_id for r in plain.results]
    assert [r.score for r in other.results] == pytest.approx([1.5 * r.score for r in plain.results])


def test_ingest_twice_is_once_and_two_halves_are_one_go(tmp_path, models, adapters, database):
    before = content(database)
    version = database.info().table_version
    report = database.ingest(tmp_path / "toy.jsonl")
    assert (report.added, report.unchanged, report.replaced, report.bad) == (0, 24, 0, ())
    assert (content(database), database.info().table_version) == (before, version)

    halves = make(tmp_path / "halves", models, adapters)
    for start in (12, 0):
        halves.ingest(write_jsonl(tmp_path / f"half{start}.jsonl", toy_records(12, first=start)))
    # In other batches sums are rounded otherwise: the same to half precision.
    after = content(halves)
    assert {name: dataclasses.replace(one, loss=0.0) for name, (one, _) in after.items()} == {
        name: dataclasses.replace(one, loss=0.0) for name, (one, _) in before.items()
    }
    assert {name: one.loss for name, (one, _) in after.items()} == pytest.approx(
        {name: one.loss for name, (one, _) in before.items()}
    )
    for name, (_, vector) in after.items():
        np.testing.assert_allclose(
            np.frombuffer(vector, np.float16).astype(float),
            np.frombuffer(before[name][1], np.float16).astype(float),
            rtol=2e-3,
            atol=1e-5,
        )


def test_content_is_the_id_where_there_is_none(tmp_path, models, adapters):
    database = make(tmp_path / "db", models, adapters)
    lines = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": r} for r in ("a", "b", "a", "c")])
    assert (database.ingest(lines).added, database.ingest(lines).unchanged) == (3, 4)
    assert database.info().samples == 3


def test_queries_see_every_change_at_once(database, tmp_path):
    database.index("cpu")
    assert [(i.name, i.fresh, i.samples) for i in database.info().indexes] == [("cpu", True, 24)]
    database.ingest(write_jsonl(tmp_path / "more.jsonl", [{"id": "new", "instruction": "Say 5", "output": "blue 35!"}]))
    assert [i.fresh for i in database.info().indexes] == [False]
    (ranking,) = database.query("Say 5", "blue 35!", top_k=25)
    assert (ranking.results[0].sample_id, ranking.searched, len(ranking.results)) == ("new", 25, 25)
    # The same from a process that opens the database anew and finds the older index on disk.
    fresh = rapidin_vdb.open(database.path)
    assert fresh.query("Say 5", "blue 35!")[0].results == ranking.results[:10]

    database.delete(ids=["new", "toy-005"])
    for one in (database, fresh):
        (ranking,) = one.query("Say 5", "blue 35!", top_k=100)
        assert {"new", "toy-005"}.isdisjoint(r.sample_id for r in ranking.results)
        assert ranking.searched == len(ranking.results) == 23


def test_a_built_index_is_used_and_answers_alike(database, monkeypatch):
    without = database.query("Say 5", "blue 35")[0].results
    database.index("two_gpus")
    again = rapidin_vdb.open(database.path)
    for module in ("freshness", "table_index"):
        monkeypatch.setattr(
            f"rapidin_vdb.{module}.batches_of", lambda *a, **k: pytest.fail("vectors read from the table")
        )
    assert again.query("Say 5", "blue 35")[0].results == without


def test_a_damaged_index_is_passed_over(database, tmp_path, caplog):
    database.index("cpu")
    expected = database.query("Say 5", "blue 35")[0].results
    next((tmp_path / "db" / "indexes" / "cpu").glob("*.rows.npy")).write_bytes(b"x")
    assert rapidin_vdb.open(database.path).query("Say 5", "blue 35")[0].results == expected
    assert "the index cpu is damaged" in caplog.text


def test_many_queries_in_one_go_are_as_one_by_one(database, tmp_path):
    lines = write_jsonl(
        tmp_path / "q.jsonl",
        [
            {"query_id": "x", "prompt": "Say 5", "generation": "blue 35"},
            {"instruction": "Say", "input": "6", "output": "6"},
            {"text": "free text"},
        ],
    )
    together = database.query(file=lines, top_k=3)
    alone = [
        database.query("Say 5", "blue 35", top_k=3),
        database.query("Say\n6", "6", top_k=3),
        database.query(None, "free text", top_k=3),
    ]
    assert [ranking.query_id for ranking in together] == ["x", "2", "3"]
    assert [ranking.results for ranking in together] == [one[0].results for one in alone]


def test_threads_that_share_a_database_do_not_disturb_one_another(database):
    """What listens to the model for one query must not hear another's."""
    from concurrent.futures import ThreadPoolExecutor

    texts = [(f"Say {number}", f"blue {number}") for number in range(12)]
    wanted = [database.query(*text, tokens=True)[0].results for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: database.query(*text, tokens=True)[0].results, texts * 3))
    assert found == wanted * 3


def test_results_convert(database):
    (ranking,) = database.query("Say 5", "blue 35", top_k=2)
    frame = ranking.to_pandas()
    assert frame["sample_id"].tolist() == [r.sample_id for r in ranking.results]
    assert frame["stars"].tolist() == [r.metadata["stars"] for r in ranking.results]
    assert ranking.to_arrow().num_rows == 2
    assert json.loads(json.dumps(ranking.to_dict()))["results"][1]["rank"] == 2


# What must not happen


def test_nothing_is_written_when_a_record_is_bad(database, tmp_path):
    before = database.info()
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(record) for record in toy_records(2, first=50)]
    path.write_text("\n".join([lines[0], '{"instruction": "x", "output": ""}', lines[1], "{"]), "utf-8")
    with pytest.raises(
        CorpusError, match=r"bad\.jsonl, line 2: the response is empty.*Nothing was written.*--on-bad-record skip"
    ):
        database.ingest(path)
    assert database.info() == before
    report = database.ingest(path, on_bad_record="skip")
    assert report.added == 2
    assert [message.split(": ")[0].rsplit(", ")[1] for message in report.bad] == ["line 2", "line 4"]


def test_all_that_is_bad_is_said_at_once(database, tmp_path, monkeypatch):
    """Else a file with ten bad records is mended ten times."""
    before = database.info()
    good, bad = toy_records(1)[0], {"instruction": "x", "output": ""}
    path = write_jsonl(tmp_path / "bad.jsonl", [good, *[bad, good] * 7, good | {"stars": "many"}])
    for dry_run in (True, False):
        with pytest.raises(CorpusError) as found:
            database.ingest(path, dry_run=dry_run)
        first, *others = str(found.value).splitlines()
        assert first == (
            f"{path}, line 2: the response is empty; there is nothing to take a gradient of. Nothing was written, and 7 "
            "more records cannot be stored either; mend them, or pass over such records with: --on-bad-record skip"
        )
        places = [line.partition(": ")[0] for line in others]
        assert places == [f"{path}, line {number}" for number in (4, 6, 8, 10, 12)] + ["and 2 more"]
    two = write_jsonl(tmp_path / "two.jsonl", [bad, bad])
    monkeypatch.setattr("rapidin_vdb.intake._WINDOW", 1)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        CorpusError, match=r"line 1: the resp.* 1 more record .*\n.*\nreading on ended there: .*not readable as Parquet"
    ):
        database.ingest(two, tmp_path / "broken.parquet")
    with pytest.raises(CorpusError, match=r"^\S*missing.jsonl: no such file$"):  # before anything is read
        database.ingest(two, tmp_path / "missing.jsonl")
    monkeypatch.setattr("rapidin_vdb.plan._READ_ON_SECONDS", -1.0)
    with pytest.raises(CorpusError, match=r"mend it, .*skip\nreading on was given up .*: there may be others$"):
        database.ingest(two)
    assert database.info() == before


def test_other_content_under_a_known_id(database, tmp_path):
    before = content(database)
    path = write_jsonl(tmp_path / "other.jsonl", [{"id": "toy-003", "instruction": "Say 3", "output": "changed"}])
    with pytest.raises(
        CorpusError,
        match="line 1: sample toy-003 is in the database with other content .in response, source, stars.. Nothing",
    ):
        database.ingest(path)
    assert database.ingest(path, on_duplicate="skip").kept == 1
    assert content(database) == before
    assert database.ingest(path, on_duplicate="replace").replaced == 1
    after = content(database)
    assert {name for name in before if before[name] != after[name]} == {"toy-003"}
    assert after["toy-003"][0].response == "changed"


def test_a_field_of_another_value_is_named(database, tmp_path):
    record = {"id": "rated", "instruction": "Say 3", "output": "Three.", "stars": 3, "lang": "en"}
    database.ingest(write_jsonl(tmp_path / "rated.jsonl", [record]))
    path = write_jsonl(tmp_path / "again.jsonl", [record | {"stars": 4, "lang": None, "mood": "good"}])
    with pytest.raises(CorpusError, match=r"other content \(in stars, mood, lang\)"):
        database.ingest(path)


def test_columns_of_mixed_types_are_told(database, tmp_path, capsys):
    record = toy_records(1)[0]
    records = [
        record | {"id": "c0", "quality": 0.5, "good": True, "note": "x", "grade": 1},
        record | {"id": "c1", "quality": "high", "good": 1, "note": None, "grade": 1.5},
        record | {"id": "c2", "quality": 0.25, "note": 7},
    ]
    path = write_jsonl(tmp_path / "mixed.jsonl", records)
    expected, report = database.ingest(path, dry_run=True), database.ingest(path)
    mixed = {"quality": "line 2", "good": "line 2", "note": "line 3"}
    assert {name: place.rsplit(", ")[1] for name, place in report.mixed.items()} == mixed
    assert expected.mixed == report.mixed
    ingested(report)
    assert f"column note holds text: its values are of several types ({path}, line 3)" in capsys.readouterr().err
    assert database.ingest(path).mixed == {}


def test_two_records_of_one_id_in_the_same_files(database, tmp_path):
    first, second = ({"id": "d", "instruction": "x", "output": output} for output in ("one", "two"))
    path = write_jsonl(tmp_path / "twice.jsonl", [first, second, first])
    with pytest.raises(CorpusError, match="line 2: sample d is already in these files with other content"):
        database.ingest(path)
    assert database.info().samples == 24
    report = database.ingest(path, on_duplicate="skip")
    assert (report.added, report.kept, report.unchanged, report.repeated) == (1, 1, 0, 1)
    assert database.show("d").response == "one"
    report = database.ingest(write_jsonl(tmp_path / "last.jsonl", [first, second]), on_duplicate="replace")
    assert (report.added, report.replaced, report.unchanged, database.show("d").response) == (0, 1, 1, "two")
    again = database.ingest(tmp_path / "last.jsonl", on_duplicate="replace")
    assert (again.replaced, again.unchanged, again.table_version) == (0, 1, report.table_version), "the last is there"


def test_a_gradient_that_is_not_finite_is_named_and_not_stored(tmp_path, models):
    """One poisoned embedding row: only samples that hold its token suffer."""
    shutil.copytree(models["llama"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    token = 3 + sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet()).index("Z")
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    records = [
        {"id": f"r{number}", "prompt": "p", "response": text} for number, text in enumerate(("ok", "aZb", "fine"))
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    database = rapidin_vdb.init(tmp_path / "db", model=str(tmp_path / "model"), width=64, template="text")
    with pytest.raises(GradientError, match=r"a\.jsonl, line 2: sample r1: the loss is nan; .*--on-bad-record skip"):
        database.ingest(path)
    report = database.ingest(path, on_bad_record="skip")
    (bad,) = report.bad
    assert bad.startswith(f"{path}, line 2: sample r1: the loss is nan; ")
    assert sorted(content(database)) == ["r0", "r2"]
    with pytest.raises(GradientError, match="sample query: the loss is nan"):
        database.query("p", "Z!")


def test_another_model_is_refused(database, tmp_path, models, adapters):
    shutil.copytree(models["llama"], tmp_path / "moved")
    moved = rapidin_vdb.open(database.path)
    moved.load(model=str(tmp_path / "moved"))
    assert moved.query("Say 5", "blue 35")[0].results == database.query("Say 5", "blue 35")[0].results
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["lm_head.weight"][5] += 0.01
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FingerprintError, match="was made with another fingerprint: model_hash is"):
        rapidin_vdb.open(database.path).load(model=str(tmp_path / "moved"))


def test_another_chat_template_is_refused(tmp_path):
    from conftest import byte_tokenizer, save_model

    folder = save_model(tmp_path / "model", "llama")
    tokenizer = byte_tokenizer()
    for template in ("{{ messages[0].content }}:", "{{ messages[0].content }}!"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        if template.endswith(":"):
            database = rapidin_vdb.init(tmp_path / "db", model=str(folder), width=64, template="chat")
    with pytest.raises(FingerprintError, match="template_text is .*:{#- .* in the database, .*!{#- .* here"):
        rapidin_vdb.open(database.path).load()


def test_positions_that_the_model_does_not_know(tmp_path, models):
    with pytest.raises(SpecError, match="--max-tokens is 513, but this model knows only 512 positions; give 512"):
        rapidin_vdb.init(tmp_path / "db", model=str(models["gpt2"]), width=64, max_tokens=513)
    assert rapidin_vdb.init(tmp_path / "db", model=str(models["llama"]), width=64, max_tokens=513).info().samples == 0


def test_an_index_of_a_copy_is_not_believed(database, tmp_path):
    """Two copies of a database that went their own ways have the same version number."""
    shutil.copytree(database.path, tmp_path / "copy")
    copy = rapidin_vdb.open(tmp_path / "copy")
    copy.delete(ids=["toy-001"])
    copy.index("cpu")
    database.delete(ids=["toy-002"])
    shutil.copytree(tmp_path / "copy" / "indexes", tmp_path / "db" / "indexes")
    assert [index.fresh for index in database.info().indexes] == [False]
    found = {result.sample_id for result in rapidin_vdb.open(database.path).query("Say 5", "blue", top_k=99)[0].results}
    assert "toy-001" in found and "toy-002" not in found


def test_a_string_is_no_list(database, tmp_path):
    lines = write_jsonl(tmp_path / "few.jsonl", [record | {"id": str(n)} for n, record in enumerate(toy_records(3))])
    database.ingest(lines)
    with pytest.raises(SpecError, match=r"ids is the string '12', .* wanted a list: ids=\['12'\]"):
        database.delete(ids="12")
    assert database.delete(ids=["1"]) == ["1"] and database.info().samples == 26


def test_a_field_that_its_column_cannot_hold_is_a_bad_record(database, tmp_path):
    """Told with its place, nothing written; or passed over."""
    stars = [record | {"id": f"s{n}", "stars": n} for n, record in enumerate(toy_records(4))]
    database.ingest(write_jsonl(tmp_path / "whole.jsonl", stars[:2]))
    bad = write_jsonl(tmp_path / "bad.jsonl", [stars[2], stars[3] | {"Stars": "five", "stars": None}])
    with pytest.raises(
        CorpusError, match=r"bad.jsonl, line 2: field Stars is str, but the column Stars holds int.*Nothing was"
    ):
        database.ingest(bad)
    assert database.info().samples == 26
    report = database.ingest(bad, on_bad_record="skip")
    assert (report.added, len(report.bad)) == (1, 1)
    # Whole numbers go on to become floating point, and do so within one file.
    more = write_jsonl(tmp_path / "more.jsonl", [stars[3] | {"stars": 2.5}])
    assert database.ingest(more).added == 1 and database.info().samples == 28


def test_samples_that_are_cut_are_counted(database, tmp_path):
    long = [record | {"id": f"l{n}", "output": "blue " * (2000 if n else 2)} for n, record in enumerate(toy_records(3))]
    lines = write_jsonl(tmp_path / "long.jsonl", long)
    assert database.ingest(lines, dry_run=True).truncated == 2
    assert database.ingest(lines).truncated == 2 and database.ingest(lines).truncated == 0


def test_an_empty_database_and_a_filter_that_matches_nothing(tmp_path, models, adapters, database):
    empty = make(tmp_path / "empty", models, adapters)
    with pytest.raises(TableError, match="is empty; add samples first: rapidin-vdb ingest"):
        empty.query("p", "g")
    with pytest.raises(TableError, match="is empty; add samples first: rapidin-vdb ingest"):
        empty.index()
    (ranking,) = database.query("p", "g", where="stars = 99")
    assert (ranking.results, ranking.searched) == ((), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "--top-k is 0; wanted 1 or more"),
        ({"generation": None}, "give one of: --prompt and --generation, or --file"),
        ({"file": "x"}, "give one of"),
    ],
)
def test_queries_that_make_no_sense(database, options, message):
    with pytest.raises(SpecError, match=message):
        database.query(**{"prompt": "p", "generation": "g"} | options)
    with pytest.raises(CorpusError, match="query: the response is empty"):
        database.query("p", " ")


def test_init_writes_nothing_when_it_fails(tmp_path, models, adapters):
    for options, message in (
        ({"width": 4096}, "width is 4096, but the gradient has only 416 coordinates"),
        ({"width": 63}, "wanted a power of two"),
        ({"seed": -1}, "--seed is -1"),
        ({"epochs": 0.0}, "--epochs is 0.0; wanted a number above 0"),
        ({"max_tokens": 1}, "--max-tokens is 1"),
        ({"template": "chat"}, "no chat template"),
    ):
        with pytest.raises(SpecError, match=message):
            rapidin_vdb.init(
                tmp_path / "db",
                **{"model": str(models["llama"]), "adapter": str(adapters["llama"]), "width": 64} | options,
            )
        assert not (tmp_path / "db").exists()


def test_commits_are_kept_when_ingest_is_interrupted(tmp_path, models, adapters):
    """Ctrl-C in the middle: what was computed is there, the same command goes on, and nobody sees a difference."""
    whole, other = (make(tmp_path / name, models, adapters) for name in ("whole", "other"))
    lines = write_jsonl(tmp_path / "toy.jsonl", toy_records(24))
    whole.ingest(lines, batch_tokens=900)

    def interrupt(stage, done, total):
        if stage == "ingest" and done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.ingest(lines, batch_tokens=900, progress=interrupt)
    stored = other.info().samples
    assert 10 <= stored < 24
    report = other.ingest(lines, batch_tokens=900)
    assert (report.added, report.unchanged) == (24 - stored, stored)
    assert content(other) == content(whole), "bit for bit: the batches were the same"


def test_a_single_sample_beyond_memory_is_checkpointed(database, tmp_path, monkeypatch, caplog):
    maker = database._loaded().maker
    original = maker.make_batch

    def limited(batch, **options):
        if not maker._gradients.checkpointing:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return original(batch, **options)

    monkeypatch.setattr(maker, "make_batch", limited)
    assert database.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(2, first=50))).added == 2
    assert "one sample does not fit the memory: going on with gradient checkpointing" in caplog.text

    def exhausted(batch, **options):
        raise MemoryError

    monkeypatch.setattr(maker, "make_batch", exhausted)
    with pytest.raises(
        GradientError, match="last.jsonl, line 1: it does not fit the memory, even alone and with gradient"
    ):
        database.ingest(write_jsonl(tmp_path / "last.jsonl", toy_records(1, first=60)))


def test_batches_follow_the_limit_and_the_lengths(tmp_path, models, adapters, monkeypatch):
    database = make(tmp_path / "db", models, adapters)
    seen = []
    original = database._loaded().maker.make_batch
    monkeypatch.setattr(
        database._loaded().maker,
        "make_batch",
        lambda batch, **options: seen.append(batch) or original(batch, **options),
    )
    database.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(24)), batch_tokens=700)
    lengths = [[len(sample.input_ids) for sample in batch] for batch in seen]
    assert sum(map(len, lengths)) == 24 and len(lengths) > 3
    assert all(max(batch) * len(batch) <= 700 for batch in lengths)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat)
    seen.clear()
    database.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(1, first=30)), batch_tokens=1)
    assert [len(batch) for batch in seen] == [1], "a sample longer than the limit is a batch of its own"


def test_a_batch_beyond_memory_is_halved(database, tmp_path, monkeypatch, caplog):
    maker, sizes = database._loaded().maker, []
    original = maker.make_batch

    def limited(batch, **options):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return original(batch, **options)

    monkeypatch.setattr(maker, "make_batch", limited)
    assert database.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(8, first=50))).added == 8
    assert sizes == [8, 4, 2, 2, 2, 2], "as many as did not fit are not tried again"
    assert "a batch of 8 samples does not fit the memory: going on with 4" in caplog.text


@pytest.mark.slow
def test_nf4_from_end_to_end(tmp_path, shared):
    """QLoRA on the real model: init, ingest, query, and a sample's own generation finds the sample."""
    from conftest import real_adapter

    adapter = real_adapter(tmp_path / "adapter", shared)
    model = str(shared / "models" / "tinystories-260k")
    database = rapidin_vdb.init(tmp_path / "db", model=model, adapter=str(adapter), quantization="nf4", width=8192)
    with gzip.open(shared / "data" / "instruct" / "alpaca.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for _, line in zip(range(40), file, strict=False)]
    database.ingest(write_jsonl(tmp_path / "a.jsonl", records), on_bad_record="skip")
    for record in records[:5]:
        prompt = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        (ranking,) = rapidin_vdb.open(database.path).query(prompt, record["output"], top_k=1)
        assert ranking.results[0].sample_id == record["id"]
