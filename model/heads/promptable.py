"""What the heads of the Segment Anything family share: a frozen image encoder with its cache, LoRA in it or random
weights instead of a file's, and text prompts as sparse embeddings, decoded in chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data.types import Batch, Geometry
from model.checkpoints.name_table import NameTable, Pair
from model.embedding_cache import EmbeddingCache
from model.heads.base import (
    HEADS,
    AdaptedEncoder,
    Decoded,
    HeadContext,
    MaskHead,
    decode_in_chunks,
    fourier_positions,
    split_by_image,
)
from model.vlm.base import Vision
from utils.config import CacheConfig, from_dict, merge
from utils.registry import unknown

Levels = tuple[Tensor, ...]  # (B, C, h, w) each


@dataclass(frozen=True)
class Options:
    """`model.head_options` of a recipe."""

    decoder_heads: int = 8  # of the mask decoder, which no shape shows; a Hugging Face folder says it
    train_encoder: bool = False  # the image encoder, too; as published it is frozen
    # LoRA of this rank in the image encoder's attention, 0: none (LISA's ablation "SAM + LoRA", lisa.md 9.3)
    encoder_lora_rank: int = 0
    # no file: a released size with random weights, whose encoder trains (LISA's ablation "SAM not pre-trained",
    # lisa.md 9.3); null: the weights of model.vision_pretrained
    from_scratch: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)  # sections of the configuration over the released size's


class PromptableHead(MaskHead):
    """Prompts are the only sparse embeddings, the dense one is "no mask". As published only the decoder trains."""

    NEEDS_WEIGHTS = True
    OPTIONS: ClassVar[type[Options]] = Options
    RELEASED: ClassVar[dict[str, dict[str, Any]]]  # configurations of released sizes, by the name in their files' names
    LORA_LAYERS: ClassVar[tuple[str, ...]]  # linear layers of the encoder's attention
    tokens = 1  # of a dummy query; any number of tokens is a mask, each a sparse prompt of its own
    encoder: Any  # the modules of transformers; each head's own classes
    prompts: Any
    decoder: Any

    def __init__(self) -> None:
        super().__init__()
        self.cache: EmbeddingCache | None = None

    @classmethod
    @abstractmethod
    def sizes_of(cls, tensors: dict[str, Tensor], settings: Any) -> dict[str, Any]:
        """The configuration of weights, from their shapes and what `settings` say that no shape shows."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Levels:
        """(B, 3, S, S) pixels -> what the decoder takes of the images; the encoder runs within `encoding`."""

    @abstractmethod
    def chunk_decoder(self, levels: Levels) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        """The function that decodes (Q, K, D) queries of images (Q,) to (Q, h, w) logits and, where the head has them,
        (Q,) scores. It reads no weights that are not inside modules: under ZeRO-3 these are gathered in the forward
        pass only, and the function runs again in the backward pass."""

    @property
    @abstractmethod
    def padded_side(self) -> int | None:
        """Of the square to which logits are resized before the padding is cut off; None: to the image in one step."""

    @classmethod
    def settings(cls, options: dict[str, Any]) -> Any:
        return from_dict(cls.OPTIONS, options, "model.head_options")

    @classmethod
    def check_options(cls, options: dict[str, Any], side: int | None) -> None:
        settings = cls.settings(options)
        if settings.encoder_lora_rank < 0:
            raise ValueError(
                f"model.head_options.encoder_lora_rank must be 0 or more, got {settings.encoder_lora_rank}"
            )
        if settings.encoder_lora_rank and settings.train_encoder:
            raise ValueError(
                "model.head_options: train_encoder trains all that encoder_lora_rank would adapt; one of them"
            )
        check_sections(settings.sizes, cls.SIZE_KEYS.parts, cls.SIZE_KEYS.all)

    @classmethod
    def config_for(
        cls, tensors: dict[str, Tensor], options: dict[str, Any], context: HeadContext | None = None
    ) -> dict[str, Any]:
        settings = cls.settings(options)
        saved = context.saved_config if context else None
        if saved:
            return deepcopy(saved)
        if tensors or not settings.from_scratch:
            return cls.sizes_of(tensors, settings)
        if not settings.train_encoder:
            raise ValueError(
                "model.head_options.from_scratch: a random image encoder must train; set train_encoder=true"
            )
        return cls.released(settings.from_scratch, settings.sizes)

    @classmethod
    def released(cls, name: str, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
        """The configuration of a released size. sizes: sections that override it."""
        if name not in cls.RELEASED:
            raise ValueError("model.head_options.from_scratch: " + unknown("released size", name, cls.RELEASED))
        return merge(deepcopy(cls.RELEASED[name]), sizes or {})

    @classmethod
    def starts_random(cls, options: dict[str, Any]) -> bool:
        return cls.settings(options).from_scratch is not None

    def use_cache(self, settings: CacheConfig) -> None:
        self.cache = EmbeddingCache.of(self.encoder, settings)

    def trainable_parts(self, options: dict[str, Any]) -> Iterable[nn.Module | nn.Parameter]:
        return (self.decoder, self.encoder) if self.settings(options).train_encoder else (self.decoder,)

    def adapted_encoder(self, options: dict[str, Any]) -> AdaptedEncoder | None:
        rank = self.settings(options).encoder_lora_rank
        return AdaptedEncoder(self.encoder, self.LORA_LAYERS, rank) if rank else None

    def features(self, batch: Batch, vision: Vision) -> Levels:
        if batch.seg_pixels is None:
            raise ValueError("this mask head needs the mask-side view: the batch has no seg_pixels")
        return self.encode(batch.seg_pixels) if self.cache is None else self.cache(batch.seg_pixels, self.encode)

    def encoding(self) -> AbstractContextManager[Any]:
        """A frozen encoder keeps no graph."""
        trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        return nullcontext() if trains else torch.no_grad()

    def decode(
        self, features: Levels, queries: Tensor, query_image: Tensor, geometry: list[Geometry], full: bool = True
    ) -> Decoded:
        """(Q, K, D) -> B x (N_b, H_b, W_b) float32 logits."""
        queries = queries.to(features[-1].dtype)
        decode = self.chunk_decoder(features)
        logits, *scores = decode_in_chunks(
            decode, queries, query_image, features[-1][0].nbytes, self.checkpoint_decoder
        )
        masks = split_by_image(logits, query_image, geometry, [self.padded_side] * len(geometry), full)
        counts = [len(image_masks) for image_masks in masks]
        return Decoded(masks, list(scores[0].split(counts)) if scores else None)

    def dense_prompt(self, levels: Levels) -> Tensor:
        """(1, D, 1, 1): "no mask"."""
        return self.prompts.no_mask_embed.weight.to(levels[-1].dtype)[:, :, None, None]

    def positions(self, level: Tensor) -> Tensor:
        """(1, D, h, w) of an image embedding."""
        return fourier_positions(self.prompts.shared_embedding, level)


def check_sections(sizes: dict[str, Any], parts: Iterable[str], keys: Iterable[str]) -> None:
    """Raises where `model.head_options.sizes` has a section or a key that no configuration of the head has."""
    for section, values in sizes.items():
        if section not in parts:
            raise ValueError(unknown("section of model.head_options.sizes", section, parts))
        if not isinstance(values, dict):
            raise ValueError(f"model.head_options.sizes.{section} must be a mapping of sizes, got {values!r}")
        if strange := [key for key in values if key not in keys]:
            raise ValueError(unknown(f"size in model.head_options.sizes.{section}", str(strange[0]), keys))


def rename(tensors: dict[str, Tensor], table: Iterable[Pair], head: str) -> dict[str, Tensor]:
    """Weights of a file or folder under the names of the head; a name that is not in its table raises, and the head
    that does have such names is named."""
    names_table = NameTable(table)
    names = {name: names_table.to_model(name) for name in tensors}
    if strange := [name for name, ours in names.items() if ours is None]:
        owner = next((other for other in HEADS if other != head and HEADS[other].owns_file(tensors)), None)
        hint = f"; they are weights of the mask head {owner!r}: set model.mask_head={owner}" if owner else ""
        some = f"{', '.join(strange[:5])}{' ...' if strange[5:] else ''}"
        raise ValueError(f"not {head.upper()} weights: unexpected names {some}{hint}")
    return {ours: tensors[name] for name, ours in names.items() if ours is not None}
