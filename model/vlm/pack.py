"""Rows of one picture in one sequence: what they begin with once, then each row's own rest, blind to the others'.

A picture with k dialogues otherwise costs its system prompt and image tokens k times. States, loss and gradients are
those of the rows up to rounding; dropout draws once for what is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.log import log

MASKED = ("sdpa", "eager")  # attention implementations that take a mask of any shape


@dataclass(frozen=True)
class Packing:
    """R rows of L positions as G sequences of M slots. Slots behind the end of a sequence repeat position (0, 0)."""

    source: Tensor  # (G, M) which of the R * L positions stands in each slot
    place: Tensor  # (R, L) in which of the G * M slots each position stands; padding: where its row's last token does
    positions: Tensor  # (G, M) distance of each slot from the beginning of its row
    seen: Tensor  # (G, M, M) bool: slots that a slot may attend to

    def gather(self, values: Tensor) -> Tensor:
        """(R, L, H) of positions to (G, M, H) of slots."""
        return _take(values, self.source)

    def scatter(self, states: Tensor) -> Tensor:
        """(G, M, H) of slots to (R, L, H) of positions."""
        return _take(states, self.place)

    def mask(self, attention: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        """(G, 1, M, M) for an attention of MASKED; (R, L) attention: positions that any other may look at."""
        seen = (self.seen & attention.flatten()[self.source][:, None])[:, None]
        if kind == "eager":  # adds its mask to the scores
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return seen


def pack(ids: Tensor, attention: Tensor, row_image: Tensor) -> Packing | None:
    """How to pack right-padded rows (R, L) by picture (R,); None where that saves no position."""
    (rows, length), device = ids.shape, ids.device
    changes = row_image.diff(prepend=row_image[:1] - 1) != 0  # rows of one picture stand together
    group = changes.cumsum(0) - 1  # (R,)
    first = changes.nonzero()[:, 0]  # (G,) row that opens each group
    if len(first) == rows or not bool(attention[:, 0].all()):
        return None
    alike = (ids == ids[first[group]]) & attention
    shared = alike.long().cumprod(1).sum(1)
    shared = shared.new_zeros(len(first)).scatter_reduce(0, group, shared, "amin", include_self=False)[group]  # (R,)
    lengths = attention.sum(1)
    ends = (lengths - shared).cumsum(0)  # of the rows' rests, one behind another
    starts = ends - (lengths - shared)
    starts = shared + starts - starts[first[group]]  # (R,) slot in its sequence where a row's rest begins
    slots = int((starts + lengths - shared).max())
    if len(first) * slots >= rows * length:
        return None
    column = torch.arange(length, device=device).minimum(lengths[:, None] - 1)  # (R, L)
    inside = torch.where(column < shared[:, None], column, column - shared[:, None] + starts[:, None])
    place = group[:, None] * slots + inside
    index = torch.arange(rows * length, device=device).view(rows, length)
    source = index.new_zeros(len(first) * slots)
    source = source.scatter_reduce(0, place[attention], index[attention], "amin", include_self=False)
    source = source.view(len(first), slots)
    row, positions = source // length, source % length
    owner = row.masked_fill(positions < shared[row], -1)  # (G, M) -1: shared
    seen = (owner[:, None] == -1) | (owner[:, None] == owner[:, :, None])
    return Packing(source, place, positions, seen.tril())


def can_pack(wanted: bool, kind: str) -> bool:
    """Whether rows are packed: as the recipe says, unless the attention implementation takes no such mask."""
    if wanted and kind not in MASKED:
        log.warning("model.pack_rows: %s takes no mask between dialogues, so each row goes alone", kind)
    return wanted and kind in MASKED


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values.flatten(0, 1)[index], whose gradient is the same every time (indexing's is a race between threads)."""
    return F.embedding(index, values.flatten(0, 1))
