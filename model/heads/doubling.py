"""The transposed convolutions with which SAM's mask decoders double their cells, as matrix products on cells.

A kernel of 2 x 2 with stride 2 lets nothing overlap, so one product, (N, C) @ (C, 4 C'), makes four parts of each
cell. All that follows up to the logits (layer norm, GELU, the next doubling, the dot product with a mask's kernel)
treats every part alone, wherever it lies. So the parts stay next to their cell, and only the logits, one value where
the features have 32, are arranged as an image.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class Doubling(nn.ConvTranspose2d):
    """The weights of an `nn.ConvTranspose2d` with kernel and stride 2, one group and a bias."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(..., C) cells -> (..., 4, C'), the parts of each in reading order."""
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (4 C', C)
        bias = cast(Tensor, self.bias).repeat(4)
        return F.linear(input, weight, bias).unflatten(-1, (4, self.out_channels))


def to_cells(image: Tensor, doublings: int = 0) -> Tensor:
    """(B, C, 2^k h, 2^k w) -> (B, h * w, 4, ..., 4, C), contiguous, with the parts of k doublings."""
    number, channels, height, width = image.shape
    height, width, halves = height >> doublings, width >> doublings, [2] * doublings
    split = image.reshape(number, channels, height, *halves, width, *halves)
    rows, columns = range(2, 3 + doublings), range(3 + doublings, 4 + 2 * doublings)
    pairs = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
    return split.permute(0, *pairs, 1).reshape(number, height * width, *[4] * doublings, channels).contiguous()


def to_image(cells: Tensor, height: int, width: int) -> Tensor:
    """(B, h * w, 4, ..., 4, C) with the parts of k doublings -> (B, C, 2^k h, 2^k w)."""
    doublings = cells.dim() - 3
    split = cells.reshape(len(cells), height, width, *[2] * 2 * doublings, cells.shape[-1])
    rows, columns = range(1, 3 + 2 * doublings, 2), range(2, 3 + 2 * doublings, 2)
    image = split.permute(0, split.dim() - 1, *rows, *columns)
    return image.reshape(len(cells), cells.shape[-1], height << doublings, width << doublings)
