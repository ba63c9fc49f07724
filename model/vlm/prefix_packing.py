"""Prefix sharing in training: the dialogues of an image in one sequence, their common prefix once.

An image with three dialogues otherwise costs its system prompt and image tokens three times. Rows

    S i i i a b          S: system prompt, i: image tokens
    S i i i c
    S i i i d e f

become one sequence of 4 + 2 + 1 + 3 slots

    S i i i a b c d e f

with the rotary positions 0 1 2 3 4 5 4 4 5 6 and a mask in which `c` sees `S i i i` and itself, but not `a b`. States,
loss and gradients are those of the separate rows up to rounding; dropout is sampled once for what is shared. Several
images may share a sequence, too, hidden from one another, which saves the padding of short ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.vlm.causal_strips import STRIPS
from utils.log import log

MASKED = ("sdpa", STRIPS, "eager")  # attention implementations that take a mask of any shape


@dataclass(frozen=True)
class Packing:
    """R rows of L positions as G sequences of M slots. Slots after the end of a sequence repeat position (0, 0)."""

    source: Tensor  # (G, M): which of the R * L positions stands in each slot
    place: Tensor  # (R, L): in which of the G * M slots each position stands; padding: where its row's last token does
    visible: Tensor  # (G, M, M) bool: slots that a slot may attend to

    def gather(self, values: Tensor) -> Tensor:
        """(R, L, H) of positions -> (G, M, H) of slots."""
        return _take(values, self.source)

    def gather_each(self, values: Tensor) -> Tensor:
        """(..., R, L) numbers of positions, e.g. rotary ones -> (..., G, M) of slots. A suffix counts on from its
        prefix, wherever its slots are."""
        return values.flatten(-2)[..., self.source]

    def scatter(self, states: Tensor) -> Tensor:
        """(G, M, H) of slots -> (R, L, H) of positions; what is shared goes to every row that shares it."""
        return _take(states, self.place)

    def mask(self, attention: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        """(G, 1, M, M) for an attention of MASKED. attention: (R, L) positions that any other may attend to."""
        visible = (self.visible & attention.flatten()[self.source][:, None])[:, None]
        if kind == "eager":  # adds its mask to the scores
            return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
                ~visible, torch.finfo(dtype).min
            )
        return visible


def pack(ids: Tensor, attention: Tensor, row_image: Tensor, *, most: int = 0, share: bool = True) -> Packing | None:
    """The packing of right-padded rows (R, L), grouped by image (R,); None where it would save no position.

    most: slots up to which images share a sequence; 0: none do. share: False keeps rows in full, each on its own.
    """
    (rows, length), device = ids.shape, ids.device
    if not bool(attention[:, 0].all()):
        return None
    group = _groups(row_image) if share else torch.arange(rows, device=device)  # (R,)
    first_row = (group.diff(prepend=group[:1] - 1) != 0).nonzero()[:, 0]  # (groups,) the row that opens each
    if len(first_row) == rows and not most:
        return None
    lengths = attention.sum(1)
    prefix = common_prefix(ids, attention, group, first_row)[group] if share else torch.zeros_like(group)  # (R,)

    # Within a group: the prefix, then the suffixes one after another. `start` is the slot of a row's suffix; the
    # running sum counts over all groups, so what earlier groups took is subtracted.
    suffix_end = (lengths - prefix).cumsum(0)
    suffix_start = suffix_end - (lengths - prefix)
    start = prefix + suffix_start - suffix_start[first_row[group]]  # (R,)
    sizes = torch.zeros_like(first_row).scatter_reduce(0, group, start + lengths - prefix, "amax")
    sequence, offset, slots = _fill(sizes.tolist(), most, device)
    sequences = int(sequence.max()) + 1
    if sequences * slots >= rows * length:
        return None

    # Row -> slot: a position of the prefix stands at its own column, one of the suffix after `start`. Padding (columns
    # past the row's end) is sent to its row's last token, so that `scatter` reads something defined there.
    column = torch.arange(length, device=device).minimum(lengths[:, None] - 1)  # (R, L)
    slot = torch.where(column < prefix[:, None], column, column - prefix[:, None] + start[:, None])
    place = (sequence * slots + offset)[group][:, None] + slot

    # Slot -> row: the inverse. A shared slot has several rows; "amin" takes the first of them, whatever the order in
    # which a parallel scatter writes.
    index = torch.arange(rows * length, device=device).view(rows, length)
    source = index.new_zeros(sequences * slots)
    source = source.scatter_reduce(0, place[attention], index[attention], "amin", include_self=False)
    source = source.view(sequences, slots)

    # A slot sees earlier slots of its own image that are shared (owner -1) or of its own row.
    row, position = source // length, source % length
    owner = row.masked_fill(position < prefix[row], -1)  # (G, M)
    visible = (owner[:, None] == -1) | (owner[:, None] == owner[:, :, None])
    visible &= group[row][:, None] == group[row][:, :, None]
    return Packing(source, place, visible.tril())


def can_pack(wanted: bool, kind: str, able: bool = True) -> bool:
    """Whether rows are packed: as the recipe says, but not by a backbone that is not able to (its `packs`); and an
    attention (kind) that takes no mask lets them share nothing."""
    if wanted and not able:
        log.warning(
            "model.pack_rows: this language model's layers do not let a mask hide dialogues from one another (linear "
            "attention or a sliding window); every dialogue gets a row of its own"
        )
    elif wanted and kind not in MASKED:
        log.warning(
            "model.pack_rows: %s takes no mask between dialogues; rows are laid end to end without their padding, "
            "but each repeats what the dialogues of its image share (model.attn_implementation=sdpa shares it)",
            kind,
        )
    return wanted and able


def common_prefix(ids: Tensor, comparable: Tensor, group: Tensor, first_row: Tensor) -> Tensor:
    """(groups,) number of leading positions in which all rows of a group equal its first row.

    ids (R, L), rows aligned on the left; comparable (R, L) bool: positions that may count; group (R,).
    """
    equal = (ids == ids[first_row[group]]) & comparable
    leading = equal.long().cumprod(1).sum(1)  # (R,): ones up to the first difference
    return leading.new_zeros(len(first_row)).scatter_reduce(0, group, leading, "amin", include_self=False)


def _groups(row_image: Tensor) -> Tensor:
    """0, 1, ... for the rows of each image, which stand together."""
    return (row_image.diff(prepend=row_image[:1] - 1) != 0).cumsum(0) - 1


def _fill(sizes: list[int], most: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """First-fit packing of groups of these sizes into sequences of up to `most` slots: the sequence of each group, the
    slot it begins at, and the number of slots of the longest sequence."""
    used: list[int] = []
    places = []
    for size in sizes:
        room = [number for number, taken in enumerate(used) if taken + size <= most]
        number = room[0] if room else len(used)
        if not room:
            used.append(0)
        places.append((number, used[number]))
        used[number] += size
    sequence, offset = torch.tensor(places, device=device).unbind(1)
    return sequence, offset, max(used)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values.flatten(0, 1)[index]. Written as an embedding lookup, whose gradient sums in a fixed order: that of
    indexing is a race between threads, and runs would not be reproducible."""
    return F.embedding(index, values.flatten(0, 1))
