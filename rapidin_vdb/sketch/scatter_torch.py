"""The sketch's inner loop in plain torch, for any device: a GPU's for rows of an embedding, and without Triton."""

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor


def scatter_batch_torch(
    rapidgrads: Float[Tensor, "batch sketch"],
    grads: Float[Tensor, "batch grad"],
    *,
    buckets: Integer[Tensor, " grad"],
    signs: UInt8[Tensor, " bytes"],
    normalize: bool,
) -> None:
    """Add each sample's gradient of one tensor to its RapidGrad, in place."""
    grads = grads.float()
    if normalize:
        grads = grads * inverse_norms(grads)
    rapidgrads.index_add_(1, numbers(buckets), grads * unpacked(signs, grads.shape[1]))


def scatter_rows_torch(
    rapidgrad: Float[Tensor, " sketch"],
    grads: Float[Tensor, "rows columns"],
    *,
    rows: Integer[Tensor, " rows"],
    buckets: Integer[Tensor, " grad"],
    signs: UInt8[Tensor, " bytes"],
    normalize: bool,
) -> None:
    """Add some rows of one sample's gradient of one tensor to its RapidGrad, in place; the other rows are zero."""
    if normalize:
        grads = grads * inverse_norms(grads.reshape(1, -1))
    columns = torch.arange(grads.shape[1], device=grads.device)
    places = (rows.unsqueeze(1) * grads.shape[1] + columns).reshape(-1)
    negative = (signs[places >> 3] >> (places & 7).to(torch.uint8)) & 1
    signed = grads.reshape(-1) * (1 - 2 * negative.to(grads.dtype))
    # The rows of a large vocabulary are many, those of a sample few.
    rapidgrad.index_add_(0, numbers(buckets, places), signed)


def numbers(
    buckets: Integer[Tensor, " grad"], places: Integer[Tensor, " places"] | None = None
) -> Integer[Tensor, " places"]:
    """Return buckets, of all coordinates or of some, as int32: torch can index neither with uint16 nor in it."""
    stored = signed_view(buckets)
    chosen = (stored if places is None else stored[places]).to(torch.int32)
    return chosen & 0xFFFF if stored.dtype == torch.int16 else chosen


def signed_view(buckets: Integer[Tensor, " grad"]) -> Integer[Tensor, " grad"]:
    """Return uint16 as the int16 of the same bits, which more of torch, and Triton's launcher, knows how to take."""
    return buckets.view(torch.int16) if buckets.dtype == torch.uint16 else buckets


def unpacked(signs: UInt8[Tensor, " bytes"], length: int) -> Float[Tensor, " grad"]:
    """Return signs as +1.0 and -1.0."""
    bits = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return 1.0 - 2.0 * ((signs.unsqueeze(1) >> bits) & 1).reshape(-1)[:length].float()


def inverse_norms(grads: Float[Tensor, "batch grad"]) -> Float[Tensor, "batch 1"]:
    """Return 1 / L2 norm of each row, 0 for one that is exactly zero."""
    largest = grads.abs().amax(1, keepdim=True)
    # Squares of very small gradients would vanish.
    scaled = grads / largest.clamp(min=torch.finfo(grads.dtype).tiny)
    # In float32, torch's sum of millions of squares is off by 1e-4 on a CPU.
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True, dtype=torch.float64).to(grads.dtype)
    return torch.where(largest == 0, torch.zeros_like(largest), 1 / (norms * largest))
