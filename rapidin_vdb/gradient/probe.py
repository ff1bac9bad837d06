"""What of a batch is compared with autograd in the self-check, and by what."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rapidin_vdb.records import Encoded
from rapidin_vdb.sketch import Sketch, fold

_ENOUGH_TOKENS = 8
_TOKENS = 64
_PROJECTIONS = 64


def kind_of(batch: Sequence[Encoded]) -> int:
    """Return 1 for a sample alone, 2 for several, which may disturb one another, 3 where padding may too."""
    lengths = {len(sample.input_ids) for sample in batch}
    return 3 if len(lengths) > 1 else min(len(batch), 2)


def to_compare(batch: Sequence[Encoded]) -> int:
    """Return the place of the shortest sample that is long enough, else of the longest.

    Behind a single token, attention has nothing to choose from: the gradients of queries and keys are zero but for
    rounding, and differ wherever that does.
    """
    lengths = [len(sample.input_ids) for sample in batch]
    enough = [place for place, length in enumerate(lengths) if length >= _ENOUGH_TOKENS]
    if enough:
        return min(enough, key=lengths.__getitem__)
    return max(range(len(batch)), key=lengths.__getitem__)


def ends(batch: Sequence[Encoded]) -> list[Encoded]:
    """Return the last tokens of samples, so few that they fit any memory; of longer ones more."""
    longest = max(len(sample.input_ids) for sample in batch)
    if longest <= _TOKENS:
        return list(batch)
    found = []
    for sample in batch:
        keep = max(len(sample.input_ids) * _TOKENS // longest, min(len(sample.input_ids), _ENOUGH_TOKENS))
        offsets = sample.offsets[-(keep - 1) :]
        found.append(replace(sample, input_ids=sample.input_ids[-keep:], offsets=offsets, focus=None))
    return found


def near(one: Tensor, other: Tensor, allowed: float) -> bool:
    """Say whether two gradients, as `Prober.probe` tells them, are no further apart; what is not finite is from all."""
    norms, projections = (one - other).abs().split([1, len(one) - 1])
    return float(norms) <= allowed and float(projections.norm()) <= allowed


class Prober:
    """Keeps the norm and some random projections of each tensor's gradient, of one sample.

    A single projection of a wrong gradient of the right norm would be right now and then; so many are as far from those
    of the right one as the gradients are from each other.
    """

    def __init__(self, sketch: Sketch, place: int) -> None:
        self._sketch = sketch
        self._place = place
        self.count = min(_PROJECTIONS, sketch.spec.width)
        """How many projections there are."""
        self.found: dict[int, Tensor] = {}

    def probe(self, number: int, grads: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the norm and the projections of a gradient, or of some rows of one, float32 [1 + projections]."""
        sketched = torch.zeros(self._sketch.spec.width, device=grads.device)
        if rows is None:
            self._sketch.add(sketched, number, grads.reshape(-1))
        else:
            self._sketch.add_rows(sketched, number, rows, grads, normalize=False)
        norm = torch.linalg.vector_norm(grads).reshape(1)
        return torch.cat([norm, fold(sketched, self.count)]).cpu()

    def dense(self, number: int, first: int, grads: Tensor) -> None:
        """Keep those of the sample, if it is among these."""
        if first <= self._place < first + len(grads):
            self.found[number] = self.probe(number, grads[self._place - first].unsqueeze(0).float())

    def rows(self, number: int, sample: int, ids: Tensor, grads: Tensor) -> None:
        """Keep those of the sample, if it is this."""
        if sample == self._place:
            self.found[number] = self.probe(number, grads, ids)
