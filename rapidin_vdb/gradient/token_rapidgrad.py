"""RapidGrads of single tokens: of the loss AT a token, many of them in one batch."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64

from rapidin_vdb.batches import cut, padded_tokens
from rapidin_vdb.errors import GradientError, SpecError
from rapidin_vdb.gradient.rapidgrad import RapidGradMaker, apart
from rapidin_vdb.gradient.receivers import Scaler
from rapidin_vdb.gradient.sample import cut_behind_loss
from rapidin_vdb.records import Encoded

# Tokens whose RapidGrads are made at once have so many bytes of them at most.
_SKETCH_BYTES = 256 << 20


class TokenRapidGradMaker:
    """Makes the RapidGrads of the response tokens of samples, at a width of their own."""

    def __init__(self, maker: RapidGradMaker, *, width: int) -> None:
        """Fold the sketch of the samples, whose map is shared.

        Raises:
            SpecError: the width cannot be honoured.
        """
        check_token_width(width, maker.spec.width)
        self.width = width
        self._maker = maker
        self._sketch = maker.sketch.narrowed(width)

    def make(self, batch: Sequence[Encoded], norms: dict[str, np.ndarray]) -> dict[str, np.ndarray | GradientError]:
        """Return the RapidGrads of each sample's response tokens, float16 [tokens, width], by sample id.

        `norms` are those of the samples' own gradients, as `RapidGradMaker.make_batch` fills them: a token's gradient
        is scaled by them and by 1/G, so that the RapidGrads of a sample's tokens sum to the sample's own.

        Each token is an element of a batch, cut off behind it, with no loss but its own: the vector-Jacobian products
        of all tokens come from one backward pass. A forward pass that they shared would have to go through all of the
        response for each; cut off, they go through half of it on average, and cost as much.
        """
        vectors = {sample.sample_id: np.empty((sample.response_tokens, self.width), np.float16) for sample in batch}
        tokens = [(sample, number) for sample in batch for number in range(sample.response_tokens)]
        most = max(1, _SKETCH_BYTES // (4 * self.width))
        for part in cut(tokens, lambda token: token[0].place(token[1]) + 1, tokens=padded_tokens(batch), most=most):
            scales = np.stack([self._scale(sample, norms[sample.sample_id]) for sample, _ in part])
            for (sample, number), vector in zip(part, self._rapidgrads(part, scales), strict=True):
                vectors[sample.sample_id][number] = vector
        return {
            name: found
            if np.isfinite(found).all()
            else GradientError(f"sample {name}: the gradient of one of its tokens is not finite in half precision")
            for name, found in vectors.items()
        }

    def _scale(self, sample: Encoded, norms: Float64[np.ndarray, " tensors"]) -> Float64[np.ndarray, " tensors"]:
        return self._maker.scales(norms[None])[0] / sample.response_tokens

    def _rapidgrads(self, part: Sequence[tuple[Encoded, int]], scales: np.ndarray) -> np.ndarray:
        rapidgrads = torch.zeros(len(part), self.width, device=self._maker.loaded.device)
        factors = torch.from_numpy(scales).float().to(rapidgrads.device)
        tokens = [at_token(*token) for token in part]
        for places in apart(tokens, self._maker.loaded.rotary_limit):
            alone = len(places) == len(tokens)
            mine = rapidgrads if alone else torch.zeros(len(places), self.width, device=rapidgrads.device)
            self._maker.stream([tokens[place] for place in places], Scaler(self._sketch, mine, factors[places]))
            if not alone:
                rapidgrads[places] = mine
        return rapidgrads.half().cpu().numpy()


def at_token(sample: Encoded, number: int) -> Encoded:
    """Return a sample whose loss is that at one of its response tokens, without what comes behind it."""
    return cut_behind_loss(dataclasses.replace(sample, focus=(number,)))


def check_token_width(width: int, widest: int) -> None:
    """Refuse a width that is no fold of the samples' own.

    Raises:
        SpecError: it is none.
    """
    if not (1 <= width <= widest and width & (width - 1) == 0):
        raise SpecError(f"--token-width is {width}; wanted a power of two, at most the samples' own {widest}")
