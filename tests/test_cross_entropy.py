"""The loss has right derivatives where a model is all but sure, which training data that it knows by heart makes it."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F

from rapidin_vdb.gradient import cross_entropy as module
from rapidin_vdb.gradient.cross_entropy import cross_entropy, derivative_, plain_cross_entropy
from rapidin_vdb.gradient.head import OutputLayer
from rapidin_vdb.gradient.tangent import _load_forward_rules

# By how much the wanted token's logit is above: losses of some 6 nats down to 1e-7.
ABOVE = torch.tensor([-8.0, 0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 22.0])
WANTED = torch.arange(8) * 30


def drawn():
    logits = torch.randn(8, 259, generator=torch.Generator().manual_seed(0))
    return logits.scatter_add(1, WANTED.unsqueeze(1), ABOVE.unsqueeze(1))


def exactly(logits):
    """Losses and their derivatives in double precision, from the sum over the other tokens."""
    logits = logits.double().requires_grad_(True)
    others = logits.scatter(1, WANTED.unsqueeze(1), float("-inf")).logsumexp(1)
    losses = torch.log1p(torch.exp(others - logits.gather(1, WANTED.unsqueeze(1)).squeeze(1)))
    (grads,) = torch.autograd.grad(losses.sum(), logits)
    return losses.detach(), grads


def near(found, wanted, tolerance):
    """Row by row, for derivatives of one token are a million times those of another."""
    error = (found.double() - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert (error < tolerance).all(), error
    return error


@pytest.mark.parametrize("function", [cross_entropy, plain_cross_entropy])
def test_derivatives_are_right_however_sure_the_model_is(function):
    losses, wanted = exactly(drawn())
    assert losses.min() < 2e-7 and losses.max() > 5
    logits = drawn().requires_grad_(True)
    found = function(logits, WANTED)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=2e-7)
    (grads,) = torch.autograd.grad(found, logits, torch.arange(1.0, 9.0))
    near(grads, wanted * torch.arange(1.0, 9.0).unsqueeze(1), 3e-6)


def test_torch_alone_is_off():
    """Why there is a function of our own: if torch's is ever as exact, it can go."""
    logits = drawn().requires_grad_(True)
    (grads,) = torch.autograd.grad(F.cross_entropy(logits, WANTED, reduction="sum"), logits)
    with pytest.raises(AssertionError):
        near(grads, exactly(drawn())[1], 1e-2)


@pytest.mark.parametrize("function", [cross_entropy, plain_cross_entropy])
def test_forward_mode_says_the_same(function):
    moved = torch.randn(8, 259, generator=torch.Generator().manual_seed(1))
    wanted = (exactly(drawn())[1] * moved.double()).sum(1)
    _load_forward_rules()
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(drawn(), moved), WANTED)).tangent
    near(found.unsqueeze(1), wanted.unsqueeze(1), 1e-5)


def test_derivatives_are_formed_block_by_block(monkeypatch):
    monkeypatch.setitem(module._BLOCK_BYTES, "cpu", 3 * 4 * 259)  # three rows at a time, two at last
    test_derivatives_are_right_however_sure_the_model_is(cross_entropy)


def test_an_output_layer_forms_the_same_derivatives(monkeypatch):
    monkeypatch.setitem(module._BLOCK_BYTES, "cpu", 1)
    torch.manual_seed(0)
    layer, hidden = torch.nn.Linear(16, 259, bias=False), torch.randn(8, 16)
    with torch.no_grad():
        for row, (token, above) in enumerate(zip(WANTED.tolist(), ABOVE.tolist(), strict=True)):
            layer.weight[token] += above * hidden[row] / hidden[row].square().sum()
    layer.requires_grad_(False)
    read = hidden.clone().requires_grad_(True)
    shares = torch.full((8,), 1 / 64)
    losses = OutputLayer(layer).losses(read, WANTED, shares)
    (grads,) = torch.autograd.grad(losses, read, shares)
    wanted = exactly(hidden.double() @ layer.weight.T.double())[1] @ layer.weight.double() / 64
    near(grads, wanted, 3e-5)


def test_the_derivative_is_made_in_place():
    logs = torch.log_softmax(drawn(), 1)
    made = derivative_(logs, WANTED)
    assert made.data_ptr() == logs.data_ptr()
    assert made.sum(1).abs().max() < 1e-6  # a loss does not move where all logits do
