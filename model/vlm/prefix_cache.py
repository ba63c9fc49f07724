"""Prefix sharing in generation: the common prefix of an image's prompts is prefilled once, and all rows decode from it.

Eight questions about one image share its system prompt and several hundred image tokens. Their keys and values are held
once per image (`PrefixCache`), not copied per row as a batched KV cache would; each row keeps a cache of its own suffix
only, and `attend` takes one softmax over both.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig

from model.vlm.prefix_packing import common_prefix

ATTENTION = "prefix_cache"  # the name of `attend` among transformers' attention functions


@dataclass(frozen=True)
class PrefixSplit:
    """Left-padded rows (R, L) as common prefixes (I, P), left-padded, and the rows' own suffixes, the last S columns.

    I images; `first_row[i]` is a row that shows prefix i, `of_row[r]` the prefix of row r.
    """

    first_row: Tensor  # (I,) long
    of_row: Tensor  # (R,) long
    columns: Tensor  # (I, P) long: where prefix i stands in row first_row[i]; clamped where there is padding
    real: Tensor  # (I, P) bool: not padding
    suffix: Tensor  # (R, S) bool: positions that are the row's own


def split_prefix(ids: Tensor, attention: Tensor, row_image: Tensor) -> PrefixSplit | None:
    """Splits prompts at the common prefix of the rows of each image; None where no image has several rows.

    Every row keeps at least its last token, whose state predicts the first new one.
    """
    images, of_row = torch.unique(row_image, return_inverse=True)
    if len(images) == len(row_image):
        return None
    length = attention.shape[1]
    sizes = attention.sum(1)  # (R,)
    row = torch.arange(len(ids), device=ids.device)
    first_row = row.new_full((len(images),), len(ids)).scatter_reduce(0, of_row, row, "amin")
    steps = torch.arange(length, device=ids.device)
    # prompts end together; to compare their beginnings, move each row to the left
    aligned = ids.gather(1, (length - sizes[:, None] + steps).clamp(max=length - 1))  # (R, L)
    prefix = common_prefix(aligned, steps < (sizes - 1)[:, None], of_row, first_row)  # (I,)
    longest = int(prefix.max())
    if longest == 0:
        return None
    columns = (length - sizes[first_row] + prefix)[:, None] - longest + steps[:longest]
    real = columns >= (length - sizes[first_row])[:, None]
    own = sizes - prefix[of_row]
    suffix = steps[-int(own.max()) :] >= (length - own)[:, None]
    return PrefixSplit(first_row, of_row, columns.clamp(min=0), real, suffix)


@dataclass(frozen=True)
class PrefixCache:
    """Per layer, keys and values (I, h, P, d) of the prefixes of I images, however many rows decode from them. Rows of
    one image stand together."""

    keys: list[Tensor]
    values: list[Tensor]
    of_row: Tensor  # (R,) long
    counts: list[int]  # rows per prefix

    @classmethod
    def of(cls, cache: DynamicCache, of_row: Tensor) -> PrefixCache:
        keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
        return cls(keys, values, of_row, _counts(of_row, len(keys[0])))

    def __getitem__(self, rows: Tensor) -> PrefixCache:
        """For these rows only, in ascending order."""
        of_row = self.of_row[rows]
        return replace(self, of_row=of_row, counts=_counts(of_row, len(self.counts)))

    def times(self, rows: Tensor, images: Tensor) -> Tensor:
        """(R, h, L, a) of rows times (I, h, a, b) of their images, each read once: (R, h, L, b).

        The rows of an image become the rows of one matrix product, so that its keys are never expanded per row."""
        products = []
        for mine, image in zip(rows.split(self.counts), images, strict=True):
            product = mine.transpose(0, 1).flatten(1, 2) @ image  # (h, rows * L, b)
            products.append(product.view(len(image), len(mine), mine.shape[2], image.shape[-1]).transpose(0, 1))
        return torch.cat(products)


@contextmanager
def shared_attention(config: PreTrainedConfig) -> Generator[None]:
    """While it is open, a language model of this configuration attends as `attend` does."""
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
    prefix: PrefixCache,
    **_,
) -> tuple[Tensor, None]:
    """Each row attends to its image's prefix and to keys of its own, in one softmax.

    query (R, H, L, d), key and value (R, h, K, d), attention_mask (R, 1, L, P + K) bool -> (R, L, H, d)
    """
    rows, heads, length, _ = query.shape
    # grouped-query attention: the H / h query heads of one key head become rows of its product
    query = query.reshape(rows, key.shape[1], -1, query.shape[-1])  # (R, h, H / h * L, d)
    layer = cast(int, module.layer_idx)
    prefix_keys, prefix_values = prefix.keys[layer], prefix.values[layer]
    # In fp32, as fused attention does: in half precision scores of thousands, which the key biases of Qwen2.5 cause,
    # would be rounded before the softmax, or overflow.
    wide = query.float()
    scores = torch.cat([prefix.times(wide, prefix_keys.float().mT), wide @ key.float().mT], dim=-1) * scaling
    scores = scores.view(rows, heads, length, -1).masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(query.dtype).view(*query.shape[:3], -1)
    on_prefix, on_suffix = weights.split([prefix_keys.shape[2], key.shape[2]], dim=-1)
    mixed = prefix.times(on_prefix, prefix_values) + on_suffix @ value
    return mixed.view(rows, heads, length, -1).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


def _counts(of_row: Tensor, prefixes: int) -> list[int]:
    return torch.bincount(of_row, minlength=prefixes).tolist()
