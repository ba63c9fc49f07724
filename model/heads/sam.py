"""SAM as the mask head: frozen encoder, K text prompts per mask as the only sparse embeddings, one mask per query."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder, SamVisionEncoder

from data.types import Batch, Geometry
from data.views import SamView
from model.checkpoints.files import read_tensors
from model.checkpoints.name_table import under
from model.heads.base import HEADS, Decoded, HeadContext, MaskHead, decode_in_chunks, fourier_positions, split_by_image
from model.heads.embedding_cache import EmbeddingCache
from model.heads.sam_attention import use_chunked_attention, use_folded_attention
from model.heads.sam_weights import SAM_NAMES, SAM_SIZE_KEYS, folder_decoder_heads, rename_sam, sam_sizes
from model.vlm.base import Vision
from utils.config import CacheConfig, from_dict


@dataclass(frozen=True)
class Options:
    """`model.head_options` of a recipe."""

    decoder_heads: int = 8
    train_encoder: bool = False  # the image encoder, too; as published it is frozen


@HEADS.register("sam")
class SamHead(MaskHead):
    """Segment Anything with a text prompt (lisa.md 1.6). As published only its decoder trains."""

    WEIGHT_NAMES = under(SAM_NAMES, "model.visual_model.", "")
    SIZE_KEYS = SAM_SIZE_KEYS
    NEEDS_WEIGHTS = True
    tokens = 1  # of a dummy query; any number of tokens is a mask, each a sparse prompt of its own

    def __init__(self, encoder: SamVisionEncoder, prompts: SamPromptEncoder, decoder: SamMaskDecoder):
        super().__init__()
        self.encoder = encoder
        self.prompts = prompts
        self.decoder = decoder
        self.cache: EmbeddingCache | None = None

    @classmethod
    def config_for(
        cls, tensors: dict[str, Tensor], options: dict[str, Any], context: HeadContext | None = None
    ) -> dict[str, Any]:
        heads = from_dict(Options, options, "model.head_options").decoder_heads
        saved = context.saved_config if context else None
        return saved or sam_sizes(tensors, heads)

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> SamHead:
        sam = SamConfig(**config)
        vision = cast(SamVisionConfig, sam.vision_config)
        mask_decoder = cast(SamMaskDecoderConfig, sam.mask_decoder_config)
        for part in (sam, vision, mask_decoder):
            part._attn_implementation = attention
        encoder = use_chunked_attention(SamVisionEncoder(vision))
        decoder = SamMaskDecoder(mask_decoder)
        use_folded_attention(decoder.transformer)
        return cls(encoder, SamPromptEncoder(sam), decoder)

    @staticmethod
    def read_weights(path: str | Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights of a SAM file or folder under our names; a folder's config also gives the number of heads."""
        heads = folder_decoder_heads(path)
        if heads:
            options = {**options, "decoder_heads": heads}
        return rename_sam(read_tensors(path)), options

    @property
    def prompt_dim(self) -> int:
        return self.decoder.hidden_size

    @property
    def view(self) -> SamView:
        return SamView(self.encoder.config.image_size)

    def use_cache(self, settings: CacheConfig) -> None:
        self.cache = EmbeddingCache.of(self.encoder, settings)

    def trainable_parts(self, options: dict[str, Any]) -> Iterable[nn.Module]:
        train_encoder = from_dict(Options, options, "model.head_options").train_encoder
        return (self.decoder, self.encoder) if train_encoder else (self.decoder,)

    def features(self, batch: Batch, vision: Vision) -> Tensor:
        """(B, 3, S, S) pixels -> (B, C, h, w) embeddings; a frozen encoder keeps no graph."""
        if batch.seg_pixels is None:
            raise ValueError("this mask head needs the mask-side view: the batch has no seg_pixels")
        trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with nullcontext() if trains else torch.no_grad():
            if self.cache is None:
                return self._encode(batch.seg_pixels)
            return self.cache(batch.seg_pixels, lambda pixels: (self._encode(pixels),))[0]

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).last_hidden_state

    def decode(
        self, features: Tensor, queries: Tensor, query_image: Tensor, geometry: list[Geometry], full: bool = True
    ) -> Decoded:
        """(Q, K, D) -> B x (N_b, H_b, W_b) float32 logits, without scores: LISA's family never trains SAM's estimate of
        the IoU, which its prompts are therefore strange to."""
        # Weights are read here, not in the checkpointed function: ZeRO-3 has them gathered in the forward pass only.
        dense = self.prompts.no_mask_embed.weight.to(features.dtype)[:, :, None, None]  # (1, D, 1, 1)
        decode = partial(self._low_resolution, features, dense, self._positions(features))
        (logits,) = decode_in_chunks(decode, queries.to(features.dtype), query_image, self.checkpoint_decoder)
        return Decoded(split_by_image(logits, query_image, geometry, [self.view.size] * len(geometry), full))

    def _low_resolution(
        self, features: Tensor, dense: Tensor, positions: Tensor, queries: Tensor, query_image: Tensor
    ) -> tuple[Tensor]:
        """(Q, K, D) -> (Q, 4h, 4w) logits: each query with its own copy of its image's embedding."""
        # Of SAM's four mask tokens the first: the single-mask output, as released. The IoU estimate is not used.
        logits, _ = self.decoder(
            image_embeddings=features[query_image],
            image_positional_embeddings=positions.expand(len(queries), -1, -1, -1),
            sparse_prompt_embeddings=queries[:, None],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return (logits[:, 0, 0],)

    def _positions(self, features: Tensor) -> Tensor:
        return fourier_positions(self.prompts.shared_embedding, features)
