"""What the project asks of a mask head.

A mask head encodes images in its own view and decodes K query vectors per mask into mask logits. A head is a class in a
file next to this one, registered in `HEADS`; it owns its view, its embedding cache, the way back to the image's size,
and what its files look like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data.types import Batch, Geometry
from data.views import LanguageView, SegView
from model.checkpoints.name_table import NameTable, Pair
from model.checkpoints.size_keys import SizeKeys
from model.vlm.base import Vision
from utils.batching import map_batched
from utils.config import CacheConfig
from utils.registry import Registry

HEADS: Registry[type[MaskHead]] = Registry("mask head")  # name -> MaskHead class
Features = Any  # whatever a head's `features` returns for its own `decode`
QUERIES_AT_ONCE = {"cpu": 16, "cuda": 64}  # without gradients; each costs about a dozen copies of an image embedding
CPU_CACHE = 2**23  # bytes of such copies on a CPU: more of them at once leave its cache, and each takes longer
CHECKPOINTED_AT_ONCE = {"cpu": 2, "cuda": 8, "meta": 8}  # in the backward pass, with twice that and more


@dataclass(frozen=True)
class HeadContext:
    """The sizes that a head has to fit."""

    tower_width: int
    tower_layers: int
    language_width: int
    tokens: int  # prompts per mask: of each mask token one or, by the text projection, more
    saved_config: dict[str, Any] | None = None  # the head's configuration in a folder's `config.json`, if it is there
    side: int | None = None  # of the view, where the recipe gives it (model.image_size); None: the head's usual one


@dataclass
class Decoded:
    """What a head decodes, image by image.

    masks: B x (N_b, H_b, W_b) float32 logits. scores: B x (N_b,) float32 in 0..1, the head's own confidence in each
    mask, e.g. its estimate of the IoU times the probability that the object is there; None of a head without one.
    """

    masks: list[Tensor]
    scores: list[Tensor] | None = None


class MaskHead(nn.Module):
    """A module with these members. Its weights are named `head.*` in a SegModel."""

    LICENCE: ClassVar[str] = "as the weights that it started from say"  # usual of the family's weights, for model cards
    WEIGHT_NAMES: ClassVar[list[Pair]]  # published weight names, of all layouts that are read, and ours (below `head.`)
    IGNORED: ClassVar[tuple[str, ...]] = ()  # published names, with wildcards, of weights that the head has no use for
    SIZE_KEYS: ClassVar[SizeKeys]  # of the head's configuration
    FILE_SIGNS: ClassVar[tuple[str, ...]] = ()  # names, with wildcards, that only files of this head's weights have
    NEEDS_WEIGHTS: ClassVar[bool]  # a new head starts from the weights of a file, unless options say otherwise
    READS_TOWER: ClassVar[bool] = False  # it decodes `levels` of `Vision.layers`, which not every backbone has
    OPTIONAL_WEIGHTS: ClassVar[tuple[str, ...]] = ()  # added by options: initialised where a finished head has none
    levels: tuple[int, ...] = ()  # hidden states of the tower, negative ones from the last, of a head that READS_TOWER
    tokens: int  # K, prompts per mask, where the head depends on it
    checkpoint_decoder: bool = False  # masks are decoded again in the backward pass, to save memory

    @classmethod
    def config_for(cls, tensors: dict[str, Tensor], options: dict[str, Any], context: HeadContext) -> dict[str, Any]:
        """The configuration (plain values) of a head with these weights; without any, of a new one."""
        raise NotImplementedError

    @staticmethod
    def read_weights(path: str | Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Pretrained weights under the head's own names, and `options` with what the file adds to them. Only of heads
        that NEEDS_WEIGHTS."""
        raise NotImplementedError

    @classmethod
    def check_options(cls, options: dict[str, Any], side: int | None) -> None:
        """Raises for options that cannot be, before any weights are read. side: model.image_size, of the view."""

    @classmethod
    def owns_file(cls, names: Iterable[str]) -> bool:
        """Whether a weight file with these names is of this head."""
        signs = NameTable((sign, sign) for sign in cls.FILE_SIGNS)
        return any(signs.to_model(name) for name in names)

    @classmethod
    def starts_random(cls, options: dict[str, Any]) -> bool:
        """Whether a new head starts from random weights, not from those of a file."""
        return not cls.NEEDS_WEIGHTS

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> MaskHead:
        """An uninitialised head of that configuration."""
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Computes the tables that no weight file holds, on the device of the weights."""

    @property
    def prompt_dim(self) -> int:
        """D, the width of a mask query."""
        raise NotImplementedError

    @property
    def view(self) -> SegView | None:
        """How the head sees an image, any square view; None: it reuses the features of the language-side view."""
        raise NotImplementedError

    def check_view(self, language_view: LanguageView) -> None:
        """Raises where a head without a view of its own cannot decode masks from that one."""

    def use_cache(self, settings: CacheConfig) -> None:
        """Keeps image embeddings on disk (model.embedding_cache); the weights must be final and on their device. Not of
        heads that READS_TOWER: the backbone keeps what they read."""
        raise NotImplementedError

    def trainable_parts(self, options: dict[str, Any]) -> Iterable[nn.Module | nn.Parameter]:
        """What trains with `train_mask_decoder`; the rest is frozen."""
        raise NotImplementedError

    def adapted_encoder(self, options: dict[str, Any]) -> AdaptedEncoder | None:
        """What gets LoRA with these options; None: nothing."""
        return None

    def features(self, batch: Batch, vision: Vision) -> Features:
        """Encodes the B images of a batch, each once. What it returns, only the head's own `decode` knows."""
        raise NotImplementedError

    def decode(
        self, features: Features, queries: Tensor, query_image: Tensor, geometry: list[Geometry], full: bool = True
    ) -> Decoded:
        """(Q, K, D) queries and their images (Q,), ascending -> a mask for each, and its score where the head has one.

        full: at the original sizes; else as the decoder gives them, without the padding."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdaptedEncoder:
    """A part of a head with LoRA in its linear layers of these names."""

    module: nn.Module
    layers: tuple[str, ...]
    rank: int


def decode_in_chunks(
    decode: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    queries: Tensor,
    query_image: Tensor,
    embedding_bytes: int,
    checkpointed: bool = False,
) -> tuple[Tensor, ...]:
    """All of `decode(queries, query_image)`, whose results have one entry per query: in one pass with gradients, in
    chunks without.

    Every query needs its own copy of its image's embedding, since SAM's decoder changes it by attention: chunks bound
    that memory. embedding_bytes: of one such copy. checkpointed: with gradients also in chunks, each but the last under
    activation checkpointing: the backward pass begins with the last, whose activations are gone when those of the next
    are there again.
    """
    device = queries.device.type
    size = len(queries)
    if not torch.is_grad_enabled():
        size = QUERIES_AT_ONCE[device]
        if device == "cpu":
            size = max(1, min(size, CPU_CACHE // embedding_bytes))
    again = decode
    if torch.is_grad_enabled() and checkpointed:
        size = CHECKPOINTED_AT_ONCE[device]
        # Decoding is deterministic, so no RNG state is kept. The determinism check must be off: ZeRO-3 parameters are
        # gathered in one pass and sharded in the other.
        again = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    *first, last = zip(queries.split(size), query_image.split(size), strict=True)
    results = [*(again(*chunk) for chunk in first), decode(*last)]
    return tuple(map(torch.cat, zip(*results, strict=True)))


def fourier_positions(embedding: nn.Module, features: Tensor) -> Tensor:
    """(1, C, h, w) random-Fourier encoding of the cell centres of (..., h, w) features, in their dtype."""
    height, width = features.shape[-2:]
    rows = (torch.arange(height, device=features.device) + 0.5) / height
    columns = (torch.arange(width, device=features.device) + 0.5) / width
    centres = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)], dim=-1)  # (h, w, xy)
    return embedding(centres).permute(2, 0, 1)[None].to(features.dtype)


def to_original(logits: Tensor, geometry: Geometry, size: int | None) -> Tensor:
    """(N, h, w) logits of a square view of side `size` -> (N, H, W) float32 ones of the image.

    Two bilinear steps with the crop of the padding between them, in float32 to the end (lisa.md 1.6). size None: in one
    step, of a view without padding (unipixel.md 4).
    """
    logits = logits[:, None].float()
    if size is not None:
        logits = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
        height, width = geometry.resized
        logits = logits[..., :height, :width]
    return F.interpolate(logits, geometry.original, mode="bilinear", align_corners=False)[:, 0]


def crop_padding(logits: Tensor, geometry: Geometry, size: int | None) -> Tensor:
    """(N, h, w) logits of a square view of side `size` -> float32 ones of the cells that show the image. size None: of
    a view without padding."""
    if size is None:
        return logits.float()
    rows, columns = (
        max(1, round(side * cells / size)) for side, cells in zip(geometry.resized, logits.shape[1:], strict=True)
    )
    return logits[:, :rows, :columns].float()


def split_by_image(
    logits: Tensor, query_image: Tensor, geometry: Sequence[Geometry], sizes: Sequence[int | None], full: bool
) -> list[Tensor]:
    """(Q, h, w) logits of square views of these sides (None: without padding), in ascending order of image ->
    B x (N_b, H_b, W_b): at the images' sizes or, unless `full`, the cells that show them. Images of one size are
    resized in one call."""
    parts = logits.split(torch.bincount(query_image, minlength=len(geometry)).tolist())
    finish = to_original if full else crop_padding
    return map_batched(lambda part, key: finish(part, *key), parts, list(zip(geometry, sizes, strict=True)))
