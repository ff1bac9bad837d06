"""Token-wise influence end to end: scores, focus, matrices, and RapidGrads of single tokens in a table of their own."""

import json
import re

import numpy as np
import pytest
from conftest import toy_records, write_jsonl
from reference import normalized, sketched, token_gradients

import rapidin_vdb
from rapidin_vdb.corpus import Record, encode, load_template, sample_from
from rapidin_vdb.errors import CorpusError, GradientError, SpecError, TableError
from rapidin_vdb.query import query_from
from rapidin_vdb.recipe import IndexRecipe
from rapidin_vdb.sketch import BucketMap, draw_shuffle, fold

PROMPT, GENERATION = "Say 5", "blue 35"


def token_rows(database) -> dict[tuple[str, int], np.ndarray]:
    """Every token's RapidGrad, as it is stored."""
    snapshot = database._table.tokens.snapshot()
    rows = [
        (key, vector) for batch in snapshot.vectors() for key, vector in zip(batch.keys, batch.vectors, strict=True)
    ]
    found = {(key.rpartition("\0")[0], int(key.rpartition("\0")[2])): vector.astype(np.float64) for key, vector in rows}
    assert len(found) == len(rows) == snapshot.rows(), "no token stands twice"
    return found


def slow_sides(database, sample) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """The normalised gradient of a sample, and of its tokens by its norms and 1/G; G backward passes."""
    engine = database._loaded()
    (one,) = encode([sample], tokenizer=engine.loaded.tokenizer, template=load_template("alpaca"), max_tokens=512)
    grads = token_gradients(engine.loaded.model, engine.loaded.theta, list(one.input_ids), one.response_tokens)
    whole = [np.mean(layer, 0) for layer in zip(*grads, strict=True)]
    norms = [np.linalg.norm(layer) or 1.0 for layer in whole]
    tokens = [[part / norm / len(grads) for part, norm in zip(token, norms, strict=True)] for token in grads]
    return normalized(whole), tokens


def inner(one, other) -> float:
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))


@pytest.fixture
def tokened(database, tmp_path):
    database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16)
    return database


def test_token_scores_and_matrices_equal_the_slow_way(database):
    (ranking,) = database.query(PROMPT, GENERATION, top_k=4, both=True, tokens=True, matrix=True)
    whole, columns = slow_sides(database, query_from(PROMPT, GENERATION))
    assert "".join(span.text for span in ranking.generation_tokens) == GENERATION
    records = {record["id"]: record for record in toy_records(24)}
    for result in (*ranking.results, *ranking.harmful):
        sample, rows = slow_sides(database, sample_from(Record(location="", fields=records[result.sample_id])))
        scores = [inner(row, whole) for row in rows]
        matrix = np.array([[inner(row, column) for column in columns] for row in rows])
        scale = np.abs(matrix).max()
        np.testing.assert_allclose([token.score for token in result.tokens], scores, atol=2e-5 * scale)
        np.testing.assert_allclose(result.matrix, matrix, atol=2e-5 * scale)
        assert result.exact_score == pytest.approx(inner(sample, whole), abs=2e-5 * scale)
        # The completeness law, in the numbers that come out.
        assert sum(token.score for token in result.tokens) == pytest.approx(result.exact_score, abs=1e-5 * scale)
        np.testing.assert_allclose(np.sum(result.matrix, 1), scores, atol=2e-5 * scale)
        # The sketch is near, and not the same.
        assert 0 < abs(result.score - result.exact_score)
        for token in result.tokens:
            assert token.text == result.response[token.start : token.end]
        assert (result.tokens[-1].start, result.tokens[-1].end, result.tokens[-1].text) == (
            len(result.response),
        ) * 2 + ("",)


def test_without_normalisation_scores_carry_epochs_and_learning_rate(tmp_path, models, adapters, database):
    made = [
        rapidin_vdb.init(
            tmp_path / name,
            model=str(models["llama"]),
            adapter=str(adapters["llama"]),
            width=64,
            normalize="none",
            **options,
        )
        for name, options in (("plain", {}), ("scaled", {"epochs": 3.0, "learning_rate": 0.5}))
    ]
    answers = []
    for one in made:
        one.ingest(tmp_path / "toy.jsonl", limit=5)
        answers += one.query(PROMPT, GENERATION, tokens=True, matrix=True)
    plain, scaled = ({result.sample_id: result for result in ranking.results} for ranking in answers)
    for name, result in plain.items():
        other = scaled[name]
        assert sum(token.score for token in result.tokens) == pytest.approx(result.exact_score, rel=1e-4)
        assert other.exact_score == pytest.approx(1.5 * result.exact_score)
        assert [t.score for t in other.tokens] == pytest.approx([1.5 * t.score for t in result.tokens])
        np.testing.assert_allclose(other.matrix, 1.5 * np.array(result.matrix), rtol=1e-6)


def test_focus_ranks_by_the_loss_at_its_tokens(database):
    """Eq. 7: a query of its own, the mean loss over the focus tokens, normalised by its own norms."""
    engine = database._loaded()
    (encoded,) = encode(
        [query_from(PROMPT, GENERATION)],
        tokenizer=engine.loaded.tokenizer,
        template=load_template("alpaca"),
        max_tokens=512,
    )
    grads = token_gradients(engine.loaded.model, engine.loaded.theta, list(encoded.input_ids), encoded.response_tokens)
    chosen = [number for number, (start, end) in enumerate(encoded.offsets) if end > 5 and start < 7]
    assert [GENERATION[slice(*encoded.offsets[number])] for number in chosen] == ["3", "5"]
    direction = normalized([np.mean([grads[number][layer] for number in chosen], 0) for layer in range(len(grads[0]))])
    (ranking,) = database.query(PROMPT, GENERATION, top_k=24, focus=["35"], tokens=True)
    records = {record["id"]: record for record in toy_records(24)}
    exact = {}
    for result in ranking.results:
        sample, rows = slow_sides(database, sample_from(Record(location="", fields=records[result.sample_id])))
        exact[result.sample_id] = inner(sample, direction)
        assert result.exact_score == pytest.approx(exact[result.sample_id], abs=1e-4)
        np.testing.assert_allclose(
            [token.score for token in result.tokens], [inner(row, direction) for row in rows], atol=1e-4
        )
    (plain,) = database.query(PROMPT, GENERATION, top_k=24)
    assert [r.sample_id for r in plain.results] != [r.sample_id for r in ranking.results]
    assert np.corrcoef([r.score for r in ranking.results], [r.exact_score for r in ranking.results])[0, 1] > 0.9
    assert (ranking.focus, "Eq. 7" in ranking.score_unit) == (("35",), True)


def test_refine_ranks_again_by_exact_score(database):
    (all_exact,) = database.query(PROMPT, GENERATION, top_k=24, tokens=True)
    wanted = sorted(all_exact.results, key=lambda result: (-result.exact_score, result.sample_id))
    assert [r.sample_id for r in wanted] != [r.sample_id for r in all_exact.results], "else this shows nothing"
    (refined,) = database.query(PROMPT, GENERATION, top_k=5, refine=24)
    assert [r.sample_id for r in refined.results] == [r.sample_id for r in wanted[:5]]
    assert [r.rank for r in refined.results] == [1, 2, 3, 4, 5]
    assert [r.exact_score for r in refined.results] == pytest.approx([r.exact_score for r in wanted[:5]], rel=1e-4)
    assert all(result.tokens is None for result in refined.results)
    assert refined.score_unit == all_exact.score_unit + (
        "; the first 24 are ranked by exact_score, epochs * learning_rate * the inner product of full gradients"
    )
    (harmful,) = database.query(PROMPT, GENERATION, top_k=5, refine=24, harmful=True)
    assert [r.sample_id for r in harmful.results] == [r.sample_id for r in wanted[::-1][:5]]
    (few,) = database.query(PROMPT, GENERATION, top_k=5, refine=2)
    assert [result.exact_score is None for result in few.results] == [False, False, True, True, True]


def test_focus_in_a_file_and_its_errors(database, tmp_path):
    one = {"query_id": "a", "prompt": PROMPT, "generation": GENERATION}
    queries = write_jsonl(
        tmp_path / "q.jsonl", [one, one | {"query_id": "b", "focus": ["35"]}, one | {"query_id": "c", "focus": "blue"}]
    )
    rankings = database.query(file=queries)
    assert [ranking.focus for ranking in rankings] == [None, ("35",), ("blue",)]
    assert [ranking.focus for ranking in database.query(file=queries, focus=["b", "3"])] == [
        ("b", "3"),
        ("35",),
        ("blue",),
    ]
    (alone,) = database.query(PROMPT, GENERATION, focus=["blue"])
    assert [r.score for r in rankings[2].results] == [r.score for r in alone.results]
    with pytest.raises(SpecError, match="--focus 'green' is not in the generation of query, which is: 'blue 35'"):
        database.query(PROMPT, GENERATION, focus=["green"])
    with pytest.raises(SpecError, match="--focus is empty"):
        database.query(PROMPT, GENERATION, focus=[""])
    with pytest.raises(CorpusError, match="focus is 3; wanted a text of the generation, or a list"):
        database.query(file=write_jsonl(tmp_path / "bad.jsonl", [one | {"focus": 3}]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": -1}, "--refine is -1"),
        ({"level": "token", "tokens": True}, "--tokens is about samples"),
        ({"level": "token", "matrix": True}, "--matrix is about samples"),
        ({"level": "token", "group_by": "source"}, "--group-by is about samples"),
        ({"level": "token", "as_of": 1}, "--as-of is about samples"),
    ],
)
def test_what_cannot_be_asked(database, options, message):
    with pytest.raises(SpecError, match=message):
        database.query(PROMPT, GENERATION, **options)


def test_tokens_are_asked_for_before_they_are_there(database):
    with pytest.raises(
        TableError, match="no RapidGrads of single tokens; make them with: rapidin-vdb ingest .* --token-gradients"
    ):
        database.query(PROMPT, GENERATION, level="token")
    with pytest.raises(TableError, match="no RapidGrads of single tokens"):
        database.index("cpu", level="token")


def test_tokens_share_the_map_of_the_samples(database, monkeypatch):
    """To compose it again takes as long as the first time, to keep it as much memory."""
    from rapidin_vdb.gradient import TokenRapidGradMaker

    maker, composed, original = database._loaded().maker, [], BucketMap.__init__
    monkeypatch.setattr(BucketMap, "__init__", lambda made, *args: composed.append(args) or original(made, *args))
    assert TokenRapidGradMaker(maker, width=16).width == 16
    assert composed == []


def test_token_rapidgrads_equal_the_slow_way_and_sum_to_the_samples(tokened):
    rows = token_rows(tokened)
    spec = tokened.fingerprint.sketch
    made = BucketMap(spec, tokened.fingerprint.gradient_length)
    steps, negative = draw_shuffle(spec, made.length), made.negative(0, made.length).numpy()
    vectors = {
        key: v
        for batch in tokened._table.snapshot().vectors()
        for key, v in zip(batch.keys, batch.vectors, strict=True)
    }
    for record in toy_records(24)[:6]:
        _, tokens = slow_sides(tokened, sample_from(Record(location="", fields=record)))
        for number, token in enumerate(tokens):
            flat = np.concatenate([part.ravel() for part in token])
            wanted = sketched(flat, length=made.length, steps=steps, negative=negative, width=16)
            np.testing.assert_allclose(rows[record["id"], number], wanted, atol=2e-3 * np.abs(wanted).max())
        total = sum(rows[record["id"], number] for number in range(len(tokens)))
        import torch

        narrow = fold(torch.from_numpy(vectors[record["id"]].astype(np.float64)), width=16).numpy()
        np.testing.assert_allclose(total, narrow, atol=5e-3 * np.abs(narrow).max())
    assert len(rows) == tokened.info().tokens == tokened.info().token_gradients


@pytest.mark.parametrize("where", [None, "source = 'odd' AND stars > 1"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_ranking_of_tokens_equals_brute_force(tokened, where, indexed):
    if indexed:
        assert tokened.index("cpu", level="token").level == "token"
    rows = token_rows(tokened)
    allowed = {r["id"] for r in toy_records(24) if where is None or (r["source"] == "odd" and r["stars"] > 1)}
    engine = tokened._loaded()
    (encoded,) = encode(
        [query_from(PROMPT, GENERATION)],
        tokenizer=engine.loaded.tokenizer,
        template=load_template("alpaca"),
        max_tokens=512,
    )
    query = engine.maker.make(encoded)[0].reshape(16, -1).sum(1).astype(np.float64)
    scores = {key: float(vector @ query) for key, vector in rows.items() if key[0] in allowed}
    best = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
    (ranking,) = tokened.query(PROMPT, GENERATION, level="token", top_k=7, where=where, both=True)
    for found, wanted in ((ranking.results, best[:7]), (ranking.harmful, best[::-1][:7])):
        assert [result.score for result in found] == pytest.approx([score for _, score in wanted], rel=1e-5)
        assert {(r.sample_id, r.token_index) for r in found} == {key for key, _ in wanted}
        for result in found:
            assert result.text == result.response[result.start : result.end]
    assert ranking.searched == len(scores)


def test_tokens_follow_their_samples(tokened, tmp_path):
    def shown(**options):
        (ranking,) = tokened.query(PROMPT, GENERATION, level="token", top_k=1000, **options)
        return {result.sample_id for result in ranking.results}

    tokened.index("cpu", level="token")
    everything = {record["id"] for record in toy_records(24)}
    assert shown() == everything
    tokened.delete(ids=["toy-003"])
    tokened.delete(where="stars = 4")
    left = {record["id"] for record in toy_records(24) if record["stars"] != 4} - {"toy-003"}
    assert shown() == left == {name for name, _ in token_rows(tokened)}
    # Replaced without tokens: the old ones are gone; and made up for by the next ingest with them.
    changed = write_jsonl(tmp_path / "changed.jsonl", [{"id": "toy-001", "instruction": "Say", "output": "more"}])
    tokened.ingest(changed, on_duplicate="replace")
    assert shown() == left - {"toy-001"} == {name for name, _ in token_rows(tokened)}
    report = tokened.ingest(changed, token_gradients=True)
    assert (report.added, report.replaced, report.unchanged, report.token_gradients) == (0, 0, 1, 5)
    assert shown() == left
    assert tokened.ingest(changed, token_gradients=True).token_gradients == 0
    # New samples without tokens are simply not there.
    tokened.ingest(write_jsonl(tmp_path / "new.jsonl", toy_records(2, first=50)))
    assert shown() == left
    tokened.ingest(write_jsonl(tmp_path / "new.jsonl", toy_records(4, first=50)), token_gradients=True)
    assert shown() == left | {"toy-050", "toy-051", "toy-052", "toy-053"}


def test_what_a_dead_process_left_is_not_seen(tokened):
    """Tokens are written before their samples: of a sample that never came, or came with other content."""
    rows = token_rows(tokened)
    table = tokened._table.tokens._place.open_table("tokens")
    table.update(where="sample_id = 'toy-002'", values={"content_hash": "of other content"})
    table.update(where="sample_id = 'toy-004'", values={"sample_id": "toy-999"})
    (ranking,) = tokened.query(PROMPT, GENERATION, level="token", top_k=10_000)
    assert {r.sample_id for r in ranking.results} == {name for name, _ in rows} - {"toy-002", "toy-004"}


@pytest.mark.usefixtures("forked_workers")
def test_token_gradients_from_the_start_and_by_workers_are_the_same(tmp_path, models, adapters, tokened):
    path = tmp_path / "toy.jsonl"
    options = {"model": str(models["llama"]), "adapter": str(adapters["llama"]), "width": 64}
    for name, workers in (("one", 1), ("two", 2)):
        fresh = rapidin_vdb.init(tmp_path / name, **options)
        report = fresh.ingest(path, token_gradients=True, token_width=16, workers_per_device=workers)
        assert (report.added, report.token_gradients) == (24, tokened.info().tokens)
        expected, found = token_rows(tokened), token_rows(fresh)
        assert found.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(found[key], expected[key], atol=1e-3 * np.abs(expected[key]).max())


def test_widths_of_tokens(tokened, tmp_path, database):
    with pytest.raises(SpecError, match="--token-width is 32, but tokens are stored with 16 here"):
        tokened.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=32)
    with pytest.raises(SpecError, match="--token-width goes with --token-gradients"):
        tokened.ingest(tmp_path / "toy.jsonl", token_width=16)


@pytest.mark.parametrize("width", [0, 24, 128])
def test_widths_that_cannot_be(database, tmp_path, width):
    with pytest.raises(
        SpecError, match=f"--token-width is {width}; wanted a power of two, at most the samples' own 64"
    ):
        database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=width)
    assert not database._table.tokens


def test_a_dry_run_counts_tokens_and_makes_no_table(database, tmp_path):
    expected = database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16, dry_run=True)
    assert (expected.samples, expected.token_gradients) == (24, database.info().tokens)
    assert not database._table.tokens


def test_a_token_whose_gradient_is_not_finite_is_refused(tokened, tmp_path, monkeypatch):
    from rapidin_vdb.gradient.token_rapidgrad import TokenRapidGradMaker

    original = TokenRapidGradMaker._rapidgrads
    monkeypatch.setattr(
        TokenRapidGradMaker, "_rapidgrads", lambda self, *args: original(self, *args) * np.float16(np.inf)
    )
    with pytest.raises(GradientError, match="the gradient of one of its tokens is not finite"):
        tokened.ingest(write_jsonl(tmp_path / "new.jsonl", toy_records(2, first=60)), token_gradients=True)
    assert not {name for name, _ in token_rows(tokened)} & {"toy-060", "toy-061"}
    assert tokened.info().samples == 24


def test_json_has_the_fixed_fields(database):
    (ranking,) = database.query(PROMPT, GENERATION, top_k=1, tokens=True)
    printed = json.loads(json.dumps(ranking.to_dict()))
    assert list(printed) == [
        "query_id", "score_unit", "searched", "where", "seconds", "results", "score_error", "table_version", "identity"
    ]  # fmt: skip
    (result,) = printed["results"]
    assert list(result) == [
        "rank", "sample_id", "score", "exact_score", "split", "source", "prompt", "response", "metadata", "tokens", "difference",
    ]  # fmt: skip
    assert list(result["tokens"][0]) == ["text", "start", "end", "score"]
    (ranking,) = database.query(PROMPT, GENERATION, top_k=2, matrix=True)
    table = ranking.to_arrow()
    spans = json.loads(table.schema.metadata[b"generation_tokens"])
    assert spans == json.loads(json.dumps(ranking.to_dict()))["generation_tokens"]
    assert np.array(table["matrix"].to_pylist()[0]).shape == (
        len(ranking.results[0].tokens or ranking.results[0].matrix),
        len(spans),
    )
    assert "".join(span["text"] for span in spans) == GENERATION


def test_samples_without_tokens_are_counted(database, tmp_path):
    database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16, limit=10)
    for where, matching, without in (
        (None, 24, 14), ("source = 'odd'", 12, 7), ("sample_id < 'toy-010'", 10, 0), ("sample_id >= 'toy-010'", 14, 14),
        ("stars > 99", 0, 0),
    ):  # fmt: skip
        (ranking,) = database.query(PROMPT, GENERATION, level="token", where=where, top_k=1000)
        assert (ranking.matching, ranking.without_tokens) == (matching, without)
        assert len({result.sample_id for result in ranking.results}) == matching - without
        printed = ranking.to_dict()
        assert (printed["matching"], printed["without_tokens"]) == (matching, without)
        assert printed.get("note") == ranking.note
        assert ranking.note == (
            f"{without} of the {matching} samples that match have no RapidGrads of their tokens, which are left out here; "
            "make them with: rapidin-vdb ingest DB FILE --token-gradients"
            if without
            else None
        )
        assert ranking.level == "token"
        assert (ranking.table_version, ranking.identity) == (database.version, database.identity)
    (plain,) = database.query(PROMPT, GENERATION)
    assert not {"matching", "without_tokens", "note"} & set(plain.to_dict()) and plain.level == "sample"


def test_tokens_that_a_coarse_index_may_have_missed_are_told(database, tmp_path):
    database.ingest(tmp_path / "toy.jsonl", token_gradients=True, token_width=16)
    recall = database.index(IndexRecipe(name="narrow", coarse_width=2, refine=1), level="token").recall
    asked = {"level": "token", "where": "stars < 3", "both": True}
    (ranking,) = database.query(PROMPT, GENERATION, top_k=3, **asked)
    assert ranking.note == (
        f"the index narrow is not exact: it found {100 * recall['recall']:.0f} % of the best 10 and "
        f"{100 * recall['recall_harmful']:.0f} % of the most negative 10 when it was built, so that tokens may be missing "
        "here; an exact one misses none: rapidin-vdb index DB --level token"
    )
    (everything,) = database.query(PROMPT, GENERATION, top_k=ranking.searched, **asked)
    assert everything.note is None and len(everything.results) == ranking.searched > 3


def test_a_sample_that_was_cut_says_so(tmp_path, models, adapters):
    made = rapidin_vdb.init(
        tmp_path / "cut", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, template="text",
        max_tokens=9,
    )  # fmt: skip
    texts = ("short", "too long for it")
    made.ingest(write_jsonl(tmp_path / "cut.jsonl", [{"id": text, "text": text} for text in texts]))
    (ranking,) = made.query(None, "blue", tokens=True)
    for result in ranking.results:
        assert result.truncated == (result.sample_id == texts[1])
        assert result.to_dict().get("truncated") == (True if result.truncated else None)
        assert "".join(token.text for token in result.tokens) == result.response[:8]


@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_what_rows_and_columns_of_a_matrix_sum_to(tmp_path, models, adapters, normalize):
    """Rows: token scores on the whole generation. Columns: a focus on the token, by 1/G, where nothing has norms."""
    made = rapidin_vdb.init(
        tmp_path / "sums", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, normalize=normalize
    )
    made.ingest(write_jsonl(tmp_path / "toy.jsonl", toy_records(6)))
    (whole,) = made.query(PROMPT, GENERATION, tokens=True, matrix=True)
    (focused,) = made.query(PROMPT, GENERATION, tokens=True, focus=[(5, 6)])
    exact = {result.sample_id: result.exact_score for result in focused.results}
    differ = []
    for result in whole.results:
        scale = float(np.abs(result.matrix).max())
        np.testing.assert_allclose(result.matrix.sum(1), [token.score for token in result.tokens], atol=1e-4 * scale)
        assert result.matrix.sum() == pytest.approx(result.exact_score, abs=1e-4 * scale)
        differ.append(abs(result.matrix[:, 5].sum() * len(whole.generation_tokens) - exact[result.sample_id]) / scale)
    assert (max(differ) < 1e-3) == (normalize == "none"), differ


def test_a_later_record_of_the_same_files_replaces_what_had_no_tokens(database, tmp_path):
    first = toy_records(1)[0]
    path = write_jsonl(tmp_path / "twice.jsonl", [first, first | {"output": "something else"}])
    report = database.ingest(path, token_gradients=True, token_width=16, on_duplicate="replace")
    assert (report.added, report.replaced) == (0, 1)
    assert database.show("toy-000").response == "something else"
    (ranking,) = database.query(PROMPT, GENERATION, level="token", top_k=100)
    assert {r.response for r in ranking.results} == {"something else"}


def test_tokens_of_who_came_too_late_take_nothing_away(tokened, tmp_path):
    """Another writer has the same sample with other content: the first one's tokens stay."""
    from rapidin_vdb.store import TokenRows

    before = token_rows(tokened)
    encoded = tokened._table.snapshot().encoded(["toy-001"])["toy-001"]
    rows = TokenRows(encoded=encoded, content_hash="f" * 32, vectors=np.ones((encoded.response_tokens, 16), np.float16))
    tokened._table.tokens.write([rows])
    (ranking,) = tokened.query(PROMPT, GENERATION, level="token", top_k=1000)
    assert {(r.sample_id, r.token_index) for r in ranking.results} == set(before)
    assert ranking.searched == len(before)
    # What nobody sees goes with its sample, with the next deletion by a filter, or with a purge.
    tokened.delete(ids=["toy-000"])
    (ranking,) = tokened.query(PROMPT, GENERATION, level="token", top_k=1000)
    assert {r.sample_id for r in ranking.results} == {name for name, _ in before} - {"toy-000"}
    tokened.delete(where="sample_id = 'toy-002'")
    assert {name for name, _ in token_rows(tokened)} == {name for name, _ in before} - {"toy-000", "toy-002"}
    tokened._table.tokens.write([rows])
    tokened.delete(ids=["toy-001"])
    assert {name for name, _ in token_rows(tokened)} == {name for name, _ in before} - {"toy-000", "toy-001", "toy-002"}


def test_a_refused_ingest_leaves_no_table_of_tokens(database, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"id": "x", "nothing": 1}])
    with pytest.raises(CorpusError):
        database.ingest(path, token_gradients=True, token_width=16)
    assert not database._table.tokens


def test_what_was_computed_is_kept_where_tokens_cannot_be_written(database, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rapidin_vdb.store.tokens.TokenTable.write", lambda *a: (_ for _ in ()).throw(TableError("full"))
    )
    with pytest.raises(TableError, match="full"):
        database.ingest(
            write_jsonl(tmp_path / "new.jsonl", toy_records(2, first=70)), token_gradients=True, token_width=16
        )
    monkeypatch.undo()
    report = database.ingest(tmp_path / "new.jsonl", token_gradients=True, token_width=16)
    assert report.added + report.unchanged == 2 and report.token_gradients > 0
    (ranking,) = database.query(PROMPT, GENERATION, level="token", top_k=1000)
    assert {r.sample_id for r in ranking.results} == {"toy-070", "toy-071"}


def test_one_text_as_a_focus_is_one_text(database):
    (one,), (other,) = (database.query(PROMPT, GENERATION, focus=focus) for focus in ("35", ["35"]))
    assert one.results == other.results and one.focus == ("35",)


def test_batches_that_do_not_fit_are_halved(database, monkeypatch, caplog):
    from rapidin_vdb.gradient.tangent import TangentPass

    (whole,) = database.query(PROMPT, GENERATION, tokens=True)
    original, largest = TangentPass.token_scores, []

    def limited(self, batch, *args):
        if len(batch) > 3:
            raise MemoryError
        largest.append(len(batch))
        return original(self, batch, *args)

    monkeypatch.setattr(TangentPass, "token_scores", limited)
    (parts,) = database.query(PROMPT, GENERATION, tokens=True)
    assert max(largest) <= 3 and "does not fit the memory" in caplog.text
    for one, other in zip(whole.results, parts.results, strict=True):
        assert [t.score for t in one.tokens] == pytest.approx([t.score for t in other.tokens], rel=1e-4, abs=1e-6)


def luminance(colour) -> float:
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (c / 255 for c in colour)
    ]
    return sum(part * value for part, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_can_be_read_on_dark_and_on_light_and_grow_with_the_score():
    from rich.style import Style

    from rapidin_vdb.cli.coloured import style_of

    for sign in (1, -1):
        styles = [Style.parse(style_of(sign * share / 100, 1.0)) for share in range(101)]
        assert not any(styles[:10]) and all(styles[10:]), "weak tokens are left as they are"
        assert {bool(style.underline) for style in styles[10:]} == {sign < 0}, "the sign without colours"
        shades = [style.bgcolor or style.color for style in styles[10:]]
        assert all(style.color.name == "black" for style in styles[10:] if style.bgcolor)
        assert [bool(style.bgcolor) for style in styles[10:]] == [False] * 30 + [True] * 61
        colours = [shade.get_truecolor() for shade in shades]
        strengths = [max(colour) - min(colour) for colour in colours]
        assert strengths == sorted(strengths) and strengths[-1] > strengths[0] + 100
        for colour in colours:
            bright = luminance(colour)
            assert (bright + 0.05) / 0.05 >= 4.5 and 1.05 / (bright + 0.05) >= 4.5
    assert style_of(1.0, 1.0) != style_of(-1.0, 1.0) and style_of(0.0, 0.0) == ""


def test_a_terminal_of_few_colours_tells_red_from_blue():
    """Shades of both would be rounded to the same white there."""
    from rapidin_vdb.cli.coloured import style_of as _style

    assert [_style(score, 1.0, few=True) for score in (0.1, 0.2, -0.2, 0.5, -0.5, 0.9, -1.0)] == [
        "", "red", "underline blue", "bold red", "underline bold blue", "bold white on red", "underline bold white on blue"
    ]  # fmt: skip
    assert _style(1.0, 1.0) != _style(-1.0, 1.0) and _style(0.5, 1.0) != _style(1.0, 1.0) and _style(0.0, 0.0) == ""


def test_a_generation_that_was_cut_is_said_to_be(tmp_path, models, adapters):
    made = rapidin_vdb.init(
        tmp_path / "db", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64, template="text",
        max_tokens=24,
    )  # fmt: skip
    made.ingest(
        write_jsonl(tmp_path / "toy.jsonl", [{"id": "a", "prompt": "Say 5", "response": "red 5"}, {"id": "b", "prompt": "Say 6", "response": "red 6"}]),
        token_gradients=True,
    )  # fmt: skip
    for level in ("sample", "token"):
        (cut,) = made.query("Say 5", "red " * 9, level=level)
        (whole,) = made.query("Say 5", "red", level=level)
        assert whole.note is None and "note" not in whole.to_dict()
        found = re.fullmatch(
            r"the generation was cut to the database's --max-tokens: what stands behind its first (\d+) tokens has no "
            "part in the scores",
            cut.note,
        )
        (other,) = made.query("Say 5", ("red " * 9)[: int(found[1])] + "x" * 9, level=level)
        assert [result.score for result in other.results] == [result.score for result in cut.results]
        assert cut.to_dict()["note"] == cut.note
