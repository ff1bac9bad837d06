"""Exact influence, from full gradients and not from their sketches: of samples, of their tokens, and between tokens."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from rapidin_vdb.errors import GradientError
from rapidin_vdb.gradient.memory import in_parts, is_out_of_memory
from rapidin_vdb.gradient.rapidgrad import RapidGradMaker, apart
from rapidin_vdb.gradient.receivers import Dots, Measuring, norms_of
from rapidin_vdb.gradient.sample import cut_behind_loss, stream_gradient
from rapidin_vdb.gradient.tangent import NoTangentError, TangentPass
from rapidin_vdb.gradient.token_rapidgrad import at_token
from rapidin_vdb.gradient.twice import token_scores_twice
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded

logger = logging.getLogger(__name__)

# How far the token scores of a sample may sum beside its own score, relative to what was added up.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


@dataclass(frozen=True, eq=False)
class Direction:
    """The full gradient of a query, normalised where RapidGrads are."""

    grads: dict[int, Tensor]
    """Tensors of theta by number, float32, of their shapes; those that are zero are left out."""
    norms: Float64[np.ndarray, " tensors"]
    """The L2 norm of each before it was normalised."""


@dataclass(frozen=True, eq=False)
class Exact:
    """What the full gradients of a batch have to do with a direction."""

    parts: Float64[np.ndarray, "batch tensors"]
    """What each tensor adds to each sample's score."""
    norms: Float64[np.ndarray, "batch tensors"]
    """The L2 norm of each sample's gradient of each tensor."""

    @property
    def scores(self) -> Float64[np.ndarray, " batch"]:
        """The samples' scores."""
        return self.parts.sum(1)


class ExactInfluence:
    """Full gradients of one model, normalised layer by layer or not, as its RapidGrads are."""

    def __init__(self, maker: RapidGradMaker) -> None:
        self._maker = maker
        self._loaded = maker.loaded
        self._normal = maker.normalize == "layer"
        self._twice = False

    @cached_property
    def _tangents(self) -> TangentPass | None:
        """What carries derivatives beside activations; None where a module has no rule for that, which is said."""
        try:
            return TangentPass(self._loaded)
        except NoTangentError as reason:
            self._give_up_tangents(str(reason))
            return None

    def _give_up_tangents(self, reason: str) -> None:
        if not self._twice:
            self._twice = True
            logger.warning("token scores by double differentiation, sample by sample, which is slower (%s)", reason)

    def direction(self, query: Encoded, *, norms: Float64[np.ndarray, " tensors"] | None = None) -> Direction:
        """Return the full gradient of a query's loss, normalised by its own layer norms or by those given.

        Raises:
            GradientError: the loss or the gradient is not finite.
        """
        return self._maker.within_memory(partial(self._direction, query, norms), "the full gradient of query", query)

    def _direction(self, query: Encoded, norms: Float64[np.ndarray, " tensors"] | None) -> Direction:
        grads: dict[int, Tensor] = {}
        found = np.zeros(len(self._loaded.theta))

        def receive(number: int, grad: Tensor) -> None:
            found[number] = norms_of(grad.reshape(1, -1))[0]
            norm = found[number] if norms is None else norms[number]
            if norm:
                grads[number] = grad.detach().float() / (norm if self._normal else 1.0)

        # As for RapidGrads: what stands behind the focus would leave rounding where attention has nothing to choose.
        stream_gradient(self._loaded, cut_behind_loss(query), receive, checkpointing=self._maker.checkpointing)
        if not np.isfinite(found).all():
            raise GradientError(f"sample {query.sample_id}: the gradient is not finite")
        return Direction(grads, found)

    def exact(self, direction: Direction, batch: Sequence[Encoded]) -> Exact:
        """Return the exact scores of samples (Eq. 5 without epochs and learning rate), from one backward pass.

        Raises:
            GradientError: the gradient of a sample is not finite.
        """
        tensors = len(self._loaded.theta)

        norms, parts = np.zeros((len(batch), tensors)), np.zeros((len(batch), tensors))

        def measured(places: list[int]) -> list[None]:
            dots = Dots(direction.grads, len(places), tensors)
            measuring = Measuring(dots, len(places), tensors)
            self._maker.stream([batch[place] for place in places], measuring)
            norms[places], parts[places] = measuring.norms, dots.dots
            return [None] * len(places)

        for places in apart(batch, self._loaded.rotary_limit):
            longest = max((batch[place] for place in places), key=lambda sample: len(sample.input_ids))
            self._maker.within_memory(partial(in_parts, measured, places), "sample", longest)
        parts *= self._maker.scales(norms)
        for sample, row in zip(batch, parts, strict=True):
            if not np.isfinite(row).all():
                raise GradientError(f"sample {sample.sample_id}: the gradient is not finite")
        return Exact(parts, norms)

    def token_scores(
        self, direction: Direction, batch: Sequence[Encoded], exact: Exact
    ) -> list[Float64[np.ndarray, " _"]]:
        """Return for each sample the scores of its tokens that carry loss (Eq. 6), which sum to its exact score.

        A token's gradient is that of the loss at the token; it has the sample's layer norms and 1/G.
        """
        scales = self._maker.scales(exact.norms)
        scores = self._token_scores(direction.grads, batch, scales)
        off = self._off(scores, exact)
        if off and not self._twice:
            # Of a sample alone, and by other means: is it forward mode, or the sample?
            again = self._scores_twice(direction.grads, [batch[place] for place in off], scales[off])
            if len(self._off(again, exact, off)) < len(off):
                self._give_up_tangents("in forward mode they did not sum to the samples' scores")
                scores = self._token_scores(direction.grads, batch, scales)
                off = self._off(scores, exact)
        self._tell_of(off, batch, scores, exact)
        return scores

    def _off(self, scores: Sequence[np.ndarray], exact: Exact, places: Sequence[int] | None = None) -> list[int]:
        """Return the places of samples whose tokens' scores do not sum to their own, as far as precision goes.

        `scores` are those of the samples at `places`; by default of all.
        """
        tolerance = _TOLERANCE.get(self._loaded.dtype, 0.05)
        whole, size = exact.scores, np.abs(exact.parts).sum(1)
        return [
            place
            for place, found in zip(range(len(whole)) if places is None else places, scores, strict=True)
            if not abs(found.sum() - whole[place]) <= tolerance * (np.abs(found).sum() + size[place])
        ]

    def _tell_of(
        self, off: Sequence[int], batch: Sequence[Encoded], scores: Sequence[np.ndarray], exact: Exact
    ) -> None:
        """Refuse token scores that do not sum to the samples' own; in 16 bits, where that is rounding, say so.

        Raises:
            GradientError: the model computes in single precision.
        """
        for place in off:
            said = (
                f"sample {batch[place].sample_id}: the scores of its tokens sum to {scores[place].sum():.4g}, and its "
                f"exact score is {exact.scores[place]:.4g}"
            )
            if self._loaded.dtype == "float32":
                raise GradientError(f"{said}; in this model, samples of a batch may depend on one another")
            logger.warning(
                "%s: rounding in %s; a database made with --dtype float32 has none", said, self._loaded.dtype
            )

    def matrix(
        self,
        query: Encoded,
        whole: Direction,
        batches: Sequence[Sequence[Encoded]],
        exacts: Sequence[Exact],
        *,
        progress: Progress = silent,
    ) -> list[list[Float64[np.ndarray, "_ _"]]]:
        """Return for each sample of each batch its tokens' scores on the query's tokens (Eq. 8), [tokens, generated].

        `whole` is the direction of the whole query, and `exacts` the batches' scores on it: both sides have the norms
        of the whole, so that over all of the query's tokens the scores sum to `token_scores`.
        """
        found = self._columns(query, whole, batches, exacts, progress)
        off = any(self._off(scores, exact) for scores, exact in zip(found, exacts, strict=True))
        if off and not self._twice and self._loaded.dtype == "float32":
            self._give_up_tangents("in forward mode they did not sum to the samples' scores")
            found = self._columns(query, whole, batches, exacts, progress)
        for batch, scores, exact in zip(batches, found, exacts, strict=True):
            self._tell_of(self._off(scores, exact), batch, scores, exact)
        return found

    def _columns(
        self,
        query: Encoded,
        whole: Direction,
        batches: Sequence[Sequence[Encoded]],
        exacts: Sequence[Exact],
        progress: Progress,
    ) -> list[list[np.ndarray]]:
        columns: list[list[list[np.ndarray]]] = [[[] for _ in batch] for batch in batches]
        steps, step = len(query.loss_tokens) * len(batches), 0
        for token in query.loss_tokens:
            progress("matrix", step, steps)
            grads = self.direction(at_token(query, token), norms=whole.norms).grads
            for number, (batch, exact) in enumerate(zip(batches, exacts, strict=True)):
                progress("matrix", step, steps)
                step += 1
                scales = self._maker.scales(exact.norms) / len(query.loss_tokens)
                for place, scores in enumerate(self._token_scores(grads, batch, scales)):
                    columns[number][place].append(scores)
        progress("matrix", steps, steps)
        return [[np.stack(scores, 1) for scores in batch] for batch in columns]

    def _token_scores(self, grads: dict[int, Tensor], batch: Sequence[Encoded], scales: np.ndarray) -> list[np.ndarray]:
        factors = torch.from_numpy(scales).float().to(self._loaded.device)
        scores: list[Tensor] | None = None
        if not grads:
            scores = [torch.zeros(len(sample.loss_tokens)) for sample in batch]
        elif not self._twice and (tangents := self._tangents) is not None:

            def forward(part: list[int]) -> list[Tensor]:
                rows = [batch[number] for number in part]
                found: dict[int, Tensor] = {}
                for places in apart(rows, self._loaded.rotary_limit):
                    mine = factors[[part[place] for place in places]]
                    found |= zip(places, tangents.token_scores([rows[p] for p in places], grads, mine), strict=True)
                return [found[place] for place in range(len(rows))]

            try:
                scores = in_parts(forward, list(range(len(batch))))
            except NoTangentError as reason:
                self._give_up_tangents(str(reason))
            except (RuntimeError, MemoryError) as error:
                _see_to_memory(batch, error)
                raise
        if scores is None:
            return self._scores_twice(grads, batch, scales)
        return [found.double().cpu().numpy() / len(found) for found in scores]

    def _scores_twice(self, grads: dict[int, Tensor], batch: Sequence[Encoded], scales: np.ndarray) -> list[np.ndarray]:
        factors = torch.from_numpy(scales).float().to(self._loaded.device)
        try:
            scores = [
                token_scores_twice(self._loaded, sample, grads, row) for sample, row in zip(batch, factors, strict=True)
            ]
        except (RuntimeError, MemoryError) as error:
            _see_to_memory(batch, error)
            raise
        return [found.double().cpu().numpy() / len(found) for found in scores]


def _see_to_memory(batch: Sequence[Encoded], error: Exception) -> None:
    """Tell by the longest sample that memory ended, if that is what an error says.

    Raises:
        GradientError: it is.
    """
    if is_out_of_memory(error):
        whose = max(batch, key=lambda sample: len(sample.input_ids)).sample_id
        raise GradientError(
            f"sample {whose}: the scores of its tokens do not fit the memory; leave tokens and matrix out"
        ) from error
