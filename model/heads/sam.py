"""SAM as the mask head: frozen encoder, K text prompts a mask as the only sparse embeddings, one mask a query."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder, SamVisionEncoder

from data.types import Batch, Geometry
from model.checkpoints.files import read_tensors
from model.checkpoints.name_table import under
from model.heads.base import HEADS, HeadContext, decode_in_chunks, fourier_positions, split_by_image
from model.heads.chunked_attention import use_chunked_attention
from model.heads.embedding_cache import EmbeddingCache
from model.heads.folded_attention import use_folded_attention
from model.heads.sam_weights import SAM_NAMES, folder_decoder_heads, rename_sam, sam_sizes
from model.vlm.llava import Vision
from utils.config import from_dict


@dataclass(frozen=True)
class Options:
    """`model.head` of a recipe."""

    decoder_heads: int = 8
    train_encoder: bool = False  # the picture encoder, too; as published it is frozen


@HEADS.register("sam")
class SamHead(nn.Module):
    """Segment Anything with a text prompt (lisa.md 1.6). As published only its decoder trains."""

    NAMES = under(SAM_NAMES, "visual_model.", "")
    PRETRAINED, CHOSEN = True, ()
    tokens = 1  # any number will do: each is a prompt of its own

    def __init__(self, encoder: SamVisionEncoder, prompts: SamPromptEncoder, decoder: SamMaskDecoder):
        super().__init__()
        self.encoder = encoder
        self.prompts = prompts
        self.decoder = decoder
        self.redraw = False
        self.cache: EmbeddingCache | None = None  # of a frozen encoder's embeddings

    @classmethod
    def plan(
        cls, tensors: dict[str, Tensor], options: dict[str, Any], host: HeadContext | None = None
    ) -> dict[str, Any]:
        chosen = from_dict(Options, options, "model.head")
        return (host and host.saved_config) or sam_sizes(tensors, chosen.decoder_heads)

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> SamHead:
        sam = SamConfig(**config)
        for part in (sam, sam.vision_config, sam.mask_decoder_config):
            part._attn_implementation = attention
        encoder = use_chunked_attention(SamVisionEncoder(sam.vision_config))
        decoder = SamMaskDecoder(sam.mask_decoder_config)
        use_folded_attention(decoder.transformer)
        return cls(encoder, SamPromptEncoder(sam), decoder)

    @staticmethod
    def read(path: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights of a SAM file or folder under our names, and what the folder tells beside them."""
        heads = folder_decoder_heads(path)
        return rename_sam(read_tensors(path)), {**options, **({"decoder_heads": heads} if heads else {})}

    @property
    def prompt_dim(self) -> int:
        return self.decoder.hidden_size

    @property
    def view_size(self) -> int:
        return self.encoder.config.image_size

    def trained(self, options: dict[str, Any]) -> Iterable[nn.Module]:
        whole = from_dict(Options, options, "model.head").train_encoder
        return (self.decoder, self.encoder) if whole else (self.decoder,)

    def features(self, batch: Batch, vision: Vision) -> Tensor:
        """(B, 3, S, S) pictures to (B, C, h, w) embeddings; a frozen encoder keeps no graph."""
        if batch.seg_pixels is None:
            raise ValueError("this mask head needs the mask-side view: the batch has no seg_pixels")
        trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with nullcontext() if trains else torch.no_grad():
            return self.cache(batch.seg_pixels, self._encode) if self.cache else self._encode(batch.seg_pixels)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).last_hidden_state

    def decode(
        self, features: Tensor, queries: Tensor, query_image: Tensor, geometry: list[Geometry], full: bool = True
    ) -> list[Tensor]:
        """(Q, K, D) to B x (N_b, H_b, W_b) float32 logits."""
        # weights are read here, not where masks are drawn again: ZeRO-3 has them whole in the forward pass alone
        dense = self.prompts.no_mask_embed.weight.to(features.dtype)[:, :, None, None]  # (1, D, 1, 1)
        draw = partial(self._low_resolution, features, dense, self._positions(features))
        logits = decode_in_chunks(draw, queries.to(features.dtype), query_image, self.redraw)
        return split_by_image(logits, query_image, geometry, [self.view_size] * len(geometry), full)

    def _low_resolution(
        self, features: Tensor, dense: Tensor, positions: Tensor, queries: Tensor, query_image: Tensor
    ) -> Tensor:
        """(Q, K, D) to (Q, 4h, 4w) logits: each query with its own copy of its picture's embedding."""
        logits, _ = self.decoder(
            image_embeddings=features[query_image],
            image_positional_embeddings=positions.expand(len(queries), -1, -1, -1),
            sparse_prompt_embeddings=queries[:, None],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return logits[:, 0, 0]

    def _positions(self, features: Tensor) -> Tensor:
        return fourier_positions(self.prompts.shared_embedding, features)
