"""What a mask head is: it sees a picture in its own way and turns K vectors a mask into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data.types import Batch, Geometry
from model.checkpoints.name_table import Pair
from model.vlm.llava import Vision
from utils.batching import map_batched
from utils.registry import Registry

HEADS = Registry("mask head")  # names to MaskHead classes
Features = Any  # whatever `features` hands to `decode`
QUERIES_AT_ONCE = {"cpu": 4, "cuda": 64}  # without gradients; each costs about a dozen copies of a picture embedding
CHECKPOINTED_AT_ONCE = {"cpu": 2, "cuda": 8, "meta": 8}  # in the backward pass, with twice that and more


@dataclass(frozen=True)
class HeadContext:
    """What a head has to fit into."""

    tower_width: int
    tower_layers: int
    language_width: int
    tokens: int  # mask tokens of one mask
    saved_config: dict[str, Any] | None = None  # the head's configuration, where the folder's `config.json` has it


class MaskHead(Protocol):
    """A module with these members. Its weights are named `head.*` in a SegModel."""

    WEIGHT_NAMES: ClassVar[list[Pair]]  # published weight names (below `model.`) and ours (below `head.`)
    NEEDS_WEIGHTS: ClassVar[bool]  # a new one starts from the weights of a file; else it is drawn
    OPTIONAL_WEIGHTS: ClassVar[tuple[str, ...]]  # weights that options add: drawn where a finished head has none
    tokens: int  # K, mask tokens of one mask, as far as the head minds
    prompt_dim: int  # D, the width of a mask query
    checkpoint_decoder: bool  # masks are drawn again in the backward pass, to save memory
    view_size: int | None  # side of the mask-side view; None: the head uses the language-side features

    @classmethod
    def config_for(cls, tensors: dict[str, Tensor], options: dict[str, Any], host: HeadContext) -> dict[str, Any]:
        """The configuration (plain values) of a head with these weights; without any, of a new one."""

    @staticmethod
    def read_weights(path: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Pretrained weights of such a head, under its own names, and `options` with what the file adds to them.
        Only where PRETRAINED."""

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> MaskHead:
        """An uninitialised head of that configuration."""

    def features(self, batch: Batch, vision: Vision) -> Features:
        """Encodes the B pictures of a batch once."""

    def decode(
        self, features: Features, queries: Tensor, query_image: Tensor, geometry: list[Geometry], full: bool = True
    ) -> list[Tensor]:
        """(Q, K, D) queries and their pictures (Q,), ascending, to B x (N_b, H_b, W_b) float32 logits.

        full: at the original sizes; else as the decoder gives them, without the padding."""

    def trained(self, options: dict[str, Any]) -> Iterable[nn.Module | nn.Parameter]:
        """The parts that train with `train_mask_decoder`; the rest is frozen."""


def decode_in_chunks(
    draw: Callable[[Tensor, Tensor], Tensor], queries: Tensor, query_image: Tensor, checkpoint_decoder: bool = False
) -> Tensor:
    """`draw(queries, query_image)` of all queries in one pass; without gradients of so many at once. redraw: with
    gradients, too, each piece drawn again in the backward pass, so that what drawing leaves is never kept."""
    size = len(queries) if torch.is_grad_enabled() else QUERIES_AT_ONCE[queries.device.type]
    if torch.is_grad_enabled() and checkpoint_decoder:
        size = CHECKPOINTED_AT_ONCE[queries.device.type]
        # drawing has no chance in it; ZeRO-3 hands over weights of another shape the second time, whole or divided
        draw = partial(checkpoint, draw, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return torch.cat([draw(*piece) for piece in zip(queries.split(size), query_image.split(size), strict=True)])


def fourier_positions(embedding: nn.Module, features: Tensor) -> Tensor:
    """(1, C, h, w) random-Fourier encoding of the cell centres of (..., h, w) features, in their dtype."""
    height, width = features.shape[-2:]
    rows = (torch.arange(height, device=features.device) + 0.5) / height
    columns = (torch.arange(width, device=features.device) + 0.5) / width
    centres = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)], dim=-1)  # (h, w, xy)
    return embedding(centres).permute(2, 0, 1)[None].to(features.dtype)


def to_original(logits: Tensor, geometry: Geometry, size: int) -> Tensor:
    """(N, h, w) logits of a padded square view of side `size` to (N, H, W) float32 ones of the picture.

    Two bilinear steps with the crop between them, in float32 to the end (lisa.md 1.6).
    """
    logits = F.interpolate(logits[:, None].float(), (size, size), mode="bilinear", align_corners=False)
    height, width = geometry.resized
    logits = logits[..., :height, :width]
    return F.interpolate(logits, geometry.original, mode="bilinear", align_corners=False)[:, 0]


def crop_padding(logits: Tensor, geometry: Geometry, size: int) -> Tensor:
    """(N, h, w) logits of a padded square view of side `size` to float32 ones of the cells that show the picture."""
    rows, columns = (
        max(1, round(side * cells / size)) for side, cells in zip(geometry.resized, logits.shape[1:], strict=True)
    )
    return logits[:, :rows, :columns].float()


def split_by_image(
    logits: Tensor, query_image: Tensor, geometry: Sequence[Geometry], sizes: Sequence[int], full: bool
) -> list[Tensor]:
    """(Q, h, w) logits of padded square views of these sides, in ascending order of picture, to B x (N_b, H_b, W_b):
    those of the pictures, or, not `full`, of the cells that show them. Pictures of one size go together."""
    parts = logits.split(torch.bincount(query_image, minlength=len(geometry)).tolist())
    finish = to_original if full else crop_padding
    return map_batched(lambda part, key: finish(part, *key), parts, list(zip(geometry, sizes, strict=True)))
