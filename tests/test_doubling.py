"""Transposed convolutions as products: the convolution's values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.heads.doubling import Doubling, use_doubling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_gradients_are_the_convolutions(dtype, channels_last):
    torch.manual_seed(0)
    released = nn.ConvTranspose2d(6, 5, kernel_size=2, stride=2, dtype=dtype)
    (product,) = use_doubling(nn.Sequential(nn.ConvTranspose2d(6, 5, kernel_size=2, stride=2, dtype=dtype)))
    assert isinstance(product, Doubling)
    product.load_state_dict(released.state_dict())
    features = torch.randn(3, 6, 4, 7, dtype=dtype)
    if channels_last:  # as the decoder's transformer gives them
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    expected, got = released(features), product(features)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((values * weights).sum(), [features, *made.parameters()])
        for values, made in ((expected, released), (got, product))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)
    with torch.no_grad():
        assert torch.equal(product(features), released(features)), "inference keeps the convolution"
