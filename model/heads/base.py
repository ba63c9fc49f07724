"""What a mask head is: it sees a picture in its own way and turns K vectors a mask into logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.types import Batch, Geometry
from model.names import Pair
from model.vlm.llava import Vision
from utils.registry import Registry

HEADS = Registry("mask head")  # names to MaskHead classes
Features = Any  # whatever `features` hands to `decode`


class MaskHead(Protocol):
    """A module with these members. Its weights are named `head.*` in a SegModel."""

    NAMES: ClassVar[list[Pair]]  # published weight names (below `model.`) and ours (below `head.`)
    prompt_dim: int  # D, the width of a mask query
    view_size: int | None  # side of the mask-side view; None: the head uses the language-side features

    @classmethod
    def plan(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        """The configuration (plain values) of a head with these weights."""

    @staticmethod
    def read(path: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Pretrained weights of such a head, under its own names, and `options` with what the file adds to them."""

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> MaskHead:
        """An uninitialised head of that configuration."""

    def features(self, batch: Batch, vision: Vision) -> Features:
        """Encodes the B pictures of a batch once."""

    def decode(
        self, features: Features, queries: Tensor, query_image: Tensor, geometry: list[Geometry]
    ) -> list[Tensor]:
        """(Q, K, D) queries and their pictures (Q,), ascending, to B x (N_b, H_b, W_b) float32 logits."""

    def trained(self) -> Iterable[nn.Module]:
        """The parts that train with `train_mask_decoder`; the rest is frozen."""


def to_original(logits: Tensor, geometry: Geometry, size: int) -> Tensor:
    """(N, h, w) logits of a padded square view of side `size` to (N, H, W) float32 ones of the picture.

    Two bilinear steps with the crop between them, in float32 to the end (lisa.md 1.6).
    """
    logits = F.interpolate(logits[:, None].float(), (size, size), mode="bilinear", align_corners=False)
    height, width = geometry.resized
    logits = logits[..., :height, :width]
    return F.interpolate(logits, geometry.original, mode="bilinear", align_corners=False)[:, 0]


def split_by_image(values: Tensor, query_image: Tensor, images: int) -> list[Tensor]:
    """(Q, ...) values in ascending order of picture to B tensors."""
    return list(values.split(torch.bincount(query_image, minlength=images).tolist()))
