"""Rows that ask about one picture begin alike: what they share is read once, and every row goes on from its cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Left-padded rows (R, L) as shared beginnings (B', P), left-padded, and the rows' own ends, the last S columns.

    `lead[b]` is a row that shows beginning b, `of_row[r]` the beginning of row r.
    """

    lead: Tensor  # (B',) long
    of_row: Tensor  # (R,) long
    columns: Tensor  # (B', P) long: where beginning b stands in row lead[b]; clamped where there is padding
    real: Tensor  # (B', P) bool: not padding
    ends: Tensor  # (R, S) bool: positions that are the row's own


def split_shared(ids: Tensor, attention: Tensor, row_image: Tensor) -> Split | None:
    """How to split prompts at what the rows of each picture share; None where no picture has several rows.

    Every row keeps at least its last token, whose state predicts the first new one.
    """
    images, of_row = torch.unique(row_image, return_inverse=True)
    if len(images) == len(row_image):
        return None
    length = attention.shape[1]
    sizes = attention.sum(1)  # (R,)
    first = torch.arange(len(ids), device=ids.device)
    lead = first.new_full((len(images),), len(ids)).scatter_reduce(0, of_row, first, "amin")
    steps = torch.arange(length, device=ids.device)
    starting = ids.gather(1, (length - sizes[:, None] + steps).clamp(max=length - 1))  # (R, L), rows moved to the left
    same = (starting == starting[lead[of_row]]) & (steps < (sizes - 1)[:, None])
    common = same.long().cumprod(1).sum(1)  # (R,)
    shared = common.new_full((len(images),), length).scatter_reduce(0, of_row, common, "amin")  # (B',)
    longest = int(shared.max())
    if longest == 0:
        return None
    columns = (length - sizes[lead] + shared)[:, None] - longest + steps[:longest]
    real = columns >= (length - sizes[lead])[:, None]
    own = sizes - shared[of_row]
    widest = int(own.max())
    ends = steps[-widest:] >= (length - own)[:, None]
    return Split(lead, of_row, columns.clamp(min=0), real, ends)
