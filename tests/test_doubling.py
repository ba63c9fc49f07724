"""Transposed convolutions on cells: the convolutions' values and gradients, wherever the parts of a cell lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.heads.doubling import Doubling, to_cells, to_image


def convolutions(kind: type[nn.ConvTranspose2d]) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(kind(*sizes, kernel_size=2, stride=2, dtype=torch.float64) for sizes in ((6, 5), (5, 3)))


def test_values_and_gradients_are_the_convolutions():
    """Two in a row, on an image that is not square, with a layer norm over channels between them."""
    features = torch.randn(3, 6, 4, 7, dtype=torch.float64, requires_grad=True)
    released, ours = convolutions(nn.ConvTranspose2d), convolutions(Doubling)
    norm = nn.LayerNorm(5, dtype=torch.float64)
    expected = released[1](norm(released[0](features).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    got = to_image(ours[1](norm(ours[0](to_cells(features)))), 4, 7)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((values * weights).sum(), [features, *made.parameters()])
        for values, made in ((expected, released), (got, ours))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("doublings", [0, 1, 2, 3])
def test_an_image_is_its_cells_arranged(doublings):
    image = torch.randn(2, 3, 4 << doublings, 7 << doublings)
    cells = to_cells(image, doublings)
    assert cells.shape == (2, 28, *[4] * doublings, 3) and cells.is_contiguous()
    assert torch.equal(to_image(cells, 4, 7), image)
