"""What a page asks of an index that lies on a disk takes one pass over it."""

import numpy as np
import pytest

from rapidin_vdb.index.source import FileSource


@pytest.mark.parametrize("where", [None, "stars > 1"])
def test_groups_a_histogram_and_both_ends_are_of_one_pass(database, monkeypatch, where):
    database.index("streamed")
    read, real = [], FileSource.chunks

    def chunks(self, wanted):
        for chunk in real(self, wanted):
            read.append(len(chunk.numbers))
            yield chunk

    monkeypatch.setattr(FileSource, "chunks", chunks)
    for top_k, ends in ((3, {"both": True}), (24, {"harmful": True}), (24, {})):
        del read[:]
        (found,) = database.query(
            "Say 5", "blue 35", where=where, top_k=top_k, group_by="source", histogram=6, index="streamed", **ends
        )
        assert sum(read) == found.searched == database.count(where)
    scores = np.array([result.score for result in found.results])
    sources = [result.source for result in found.results]
    for group in found.groups:
        of_group = [score for score, source in zip(scores, sources, strict=True) if source == group.value]
        assert (group.samples, group.score) == (len(of_group), pytest.approx(sum(of_group), abs=1e-5))
    counts, edges = np.histogram(scores, 6)
    assert found.histogram.edges == pytest.approx(edges, abs=1e-5)
    assert np.abs(np.array(found.histogram.counts) - counts).sum() <= 2


def test_each_of_several_queries_has_its_own_groups_and_histogram(database):
    from rapidin_vdb.query import query_from

    asked = [query_from("Say 5", "blue 35", query_id="a"), query_from("Say 12", "red 84, or so", query_id="b")]
    options = {"both": True, "group_by": "source", "histogram": 5, "top_k": 3}
    together = database.query(queries=asked, **options)
    alone = [database.query(queries=[query], **options)[0] for query in asked]
    for one, other in zip(together, alone, strict=True):
        assert one.query_id == other.query_id and one.note == other.note
        for end in ("results", "harmful"):
            assert [(r.sample_id, r.score) for r in getattr(one, end)] == [
                (r.sample_id, r.score) for r in getattr(other, end)
            ]
        assert [group.value for group in one.groups] == [group.value for group in other.groups]
        for measure in ("score", "error"):
            ours, theirs = ([getattr(group, measure) for group in side.groups] for side in (one, other))
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert one.histogram.counts == other.histogram.counts
        assert one.histogram.edges == pytest.approx(other.histogram.edges, rel=1e-4, abs=1e-5)
        assert one.score_error == pytest.approx(other.score_error, rel=1e-5)
    first, second = together
    assert first.groups != second.groups and first.histogram != second.histogram
    assert first.score_error != pytest.approx(second.score_error, rel=1e-4)
