"""Rows that ask about one picture begin alike: what they share is read once, and every row goes on from its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig

ATTENTION = "shared_beginnings"  # the name of `attend` among transformers' attention functions


@dataclass(frozen=True)
class PrefixSplit:
    """Left-padded rows (R, L) as shared beginnings (B', P), left-padded, and the rows' own ends, the last S columns.

    `lead[b]` is a row that shows beginning b, `of_row[r]` the beginning of row r.
    """

    first_row: Tensor  # (B',) long
    of_row: Tensor  # (R,) long
    columns: Tensor  # (B', P) long: where beginning b stands in row lead[b]; clamped where there is padding
    real: Tensor  # (B', P) bool: not padding
    suffix: Tensor  # (R, S) bool: positions that are the row's own


def split_prefix(ids: Tensor, attention: Tensor, row_image: Tensor) -> PrefixSplit | None:
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
    return PrefixSplit(lead, of_row, columns.clamp(min=0), real, ends)


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values (B', h, P, d) a layer of what the rows of B' pictures begin with: there once, however many rows
    go on from them. Rows of one picture stand together."""

    keys: list[Tensor]
    values: list[Tensor]
    of_row: Tensor  # (R,) long
    counts: list[int]  # rows of each beginning

    @classmethod
    def of(cls, cache: DynamicCache, of_row: Tensor) -> PrefixCache:
        keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
        return cls(keys, values, of_row, _counts(of_row, len(keys[0])))

    def __getitem__(self, rows: Tensor) -> PrefixCache:
        """For these rows only, in ascending order."""
        of_row = self.of_row[rows]
        return replace(self, of_row=of_row, counts=_counts(of_row, len(self.counts)))

    def times(self, rows: Tensor, pictures: Tensor) -> Tensor:
        """(R, h, L, a) of rows times (B', h, a, b) of their pictures, each read once: (R, h, L, b)."""
        products = []
        for mine, picture in zip(rows.split(self.counts), pictures, strict=True):
            product = mine.transpose(0, 1).flatten(1, 2) @ picture  # (h, rows * L, b)
            products.append(product.view(len(picture), len(mine), mine.shape[2], picture.shape[-1]).transpose(0, 1))
        return torch.cat(products)


@contextmanager
def shared_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Meanwhile a language model of this configuration attends as `attend` does."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    beginnings: PrefixCache,
    **_,
) -> tuple[Tensor, None]:
    """Each row looks at its picture's beginning and at keys of its own, in one softmax.

    query (R, H, L, d), key and value (R, h, K, d), attention_mask (R, 1, L, P + K) bool -> (R, L, H, d)
    """
    rows, heads, length, _ = query.shape
    query = query.reshape(rows, key.shape[1], -1, query.shape[-1])  # (R, h, H / h * L, d): heads of one key together
    keys, values = beginnings.keys[module.layer_idx], beginnings.values[module.layer_idx]
    scores = torch.cat([beginnings.times(query, keys.mT), query @ key.mT], dim=-1).float() * scaling
    scores = scores.view(rows, heads, length, -1).masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(query.dtype).view(*query.shape[:3], -1)
    far, near = weights.split([keys.shape[2], key.shape[2]], dim=-1)
    mixed = beginnings.times(far, values) + near @ value
    return mixed.view(rows, heads, length, -1).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


def _counts(of_row: Tensor, beginnings: int) -> list[int]:
    return torch.bincount(of_row, minlength=beginnings).tolist()
