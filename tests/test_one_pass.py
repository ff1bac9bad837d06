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
