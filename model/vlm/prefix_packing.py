"""Rows of one picture in one sequence: what they begin with once, then each row's own rest, blind to the others'.

A picture with k dialogues otherwise costs its system prompt and image tokens k times. Several pictures may share a
sequence, too, blind to one another, which saves the padding of short ones. States, loss and gradients are those of the
rows up to rounding; dropout draws once for what is shared.
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
    visible: Tensor  # (G, M, M) bool: slots that a slot may attend to

    def gather(self, values: Tensor) -> Tensor:
        """(R, L, H) of positions to (G, M, H) of slots."""
        return _take(values, self.source)

    def scatter(self, states: Tensor) -> Tensor:
        """(G, M, H) of slots to (R, L, H) of positions."""
        return _take(states, self.place)

    def mask(self, attention: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        """(G, 1, M, M) for an attention of MASKED; (R, L) attention: positions that any other may look at."""
        seen = (self.visible & attention.flatten()[self.source][:, None])[:, None]
        if kind == "eager":  # adds its mask to the scores
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return seen


def pack(ids: Tensor, attention: Tensor, row_image: Tensor, *, most: int = 0, share: bool = True) -> Packing | None:
    """How to pack right-padded rows (R, L) by picture (R,); None where that saves no position.

    most: slots up to which pictures share a sequence; 0: none do. share: False keeps rows whole, each on its own.
    """
    (rows, length), device = ids.shape, ids.device
    if not bool(attention[:, 0].all()):
        return None
    group = _groups(row_image) if share else torch.arange(rows, device=device)  # (R,)
    first = (group.diff(prepend=group[:1] - 1) != 0).nonzero()[:, 0]  # row that opens each group
    if len(first) == rows and not most:
        return None
    shared = _shared(ids, attention, group, first) if share else torch.zeros_like(group)  # (R,)
    lengths = attention.sum(1)
    ends = (lengths - shared).cumsum(0)  # of the rows' rests, one behind another
    starts = ends - (lengths - shared)
    starts = shared + starts - starts[first[group]]  # (R,) slot in its group where a row's rest begins
    sizes = torch.zeros_like(first).scatter_reduce(0, group, starts + lengths - shared, "amax")
    sequence, offset, slots = _fill(sizes.tolist(), most, device)
    sequences = int(sequence.max()) + 1
    if sequences * slots >= rows * length:
        return None
    column = torch.arange(length, device=device).minimum(lengths[:, None] - 1)  # (R, L)
    inside = torch.where(column < shared[:, None], column, column - shared[:, None] + starts[:, None])
    place = (sequence * slots + offset)[group][:, None] + inside
    index = torch.arange(rows * length, device=device).view(rows, length)
    source = index.new_zeros(sequences * slots)
    source = source.scatter_reduce(0, place[attention], index[attention], "amin", include_self=False)
    source = source.view(sequences, slots)
    row, positions = source // length, source % length
    owner = row.masked_fill(positions < shared[row], -1)  # (G, M) -1: shared
    seen = (owner[:, None] == -1) | (owner[:, None] == owner[:, :, None])
    seen &= group[row][:, None] == group[row][:, :, None]
    return Packing(source, place, positions, seen.tril())


def can_pack(wanted: bool, kind: str) -> bool:
    """Whether rows are packed: as the recipe says, though an attention that takes no mask lets them share nothing."""
    if wanted and kind not in MASKED:
        log.warning(
            "model.pack_rows: %s takes no mask between dialogues; rows are laid end to end without their padding, "
            "but each repeats what those of its picture have in common (model.attn_implementation=sdpa shares it)",
            kind,
        )
    return wanted


def _groups(row_image: Tensor) -> Tensor:
    """0, 1, ... for the rows of each picture, which stand together."""
    return (row_image.diff(prepend=row_image[:1] - 1) != 0).cumsum(0) - 1


def _shared(ids: Tensor, attention: Tensor, group: Tensor, first: Tensor) -> Tensor:
    """(R,) how many positions the rows of each row's group begin with alike."""
    alike = ((ids == ids[first[group]]) & attention).long().cumprod(1).sum(1)
    return alike.new_zeros(len(first)).scatter_reduce(0, group, alike, "amin", include_self=False)[group]


def _fill(sizes: list[int], most: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Groups of these sizes into sequences of up to `most` slots, each into the first with room: the sequence of each
    group, the slot it begins at, and the slots of the longest sequence."""
    used: list[int] = []
    places = []
    for size in sizes:
        fits = [number for number, taken in enumerate(used) if taken + size <= most]
        number = fits[0] if fits else len(used)
        used += [] if fits else [0]
        places.append((number, used[number]))
        used[number] += size
    sequence, offset = torch.tensor(places, device=device).unbind(1)
    return sequence, offset, max(used)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values.flatten(0, 1)[index], whose gradient is the same every time (indexing's is a race between threads)."""
    return F.embedding(index, values.flatten(0, 1))
