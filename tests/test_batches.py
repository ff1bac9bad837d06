from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rapidin_vdb.batches import cut


@given(lengths=st.lists(st.integers(1, 9), max_size=30), tokens=st.integers(1, 40), most=st.none() | st.integers(1, 5))
def test_batches_are_within_their_bounds_and_no_smaller_than_these_make_them(lengths, tokens, most):
    items = list(enumerate(lengths))
    batches = list(cut(items, lambda item: item[1], tokens=tokens, most=most))
    assert [item for batch in batches for item in batch] == sorted(items, key=lambda item: (item[1], item[0]))

    def fits(batch):
        return len(batch) == 1 or (len(batch) * max(n for _, n in batch) <= tokens and len(batch) <= (most or 30))

    assert all(batches) and all(map(fits, batches))
    assert not any(fits([*batch, following[0]]) for batch, following in pairwise(batches))
