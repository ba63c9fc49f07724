"""SAM as the mask head: frozen encoder, K text prompts a mask as the only sparse embeddings, one mask a query."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder, SamVisionEncoder

from data.types import Batch, Geometry
from model.heads.base import HEADS, split_by_image, to_original
from model.heads.sam_keys import SAM_NAMES, folder_decoder_heads, rename_sam, sam_sizes
from model.names import under
from model.vlm.llava import Vision
from model.weights import read_tensors

QUERIES_AT_ONCE = 64  # in inference; each costs about a dozen copies of a picture embedding


@HEADS.register("sam")
class SamHead(nn.Module):
    """Segment Anything with a text prompt (lisa.md 1.6). Picture and prompt encoder are frozen."""

    NAMES = under(SAM_NAMES, "visual_model.", "")

    def __init__(self, encoder: SamVisionEncoder, prompts: SamPromptEncoder, decoder: SamMaskDecoder):
        super().__init__()
        self.encoder = encoder
        self.prompts = prompts
        self.decoder = decoder

    @classmethod
    def plan(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        return sam_sizes(tensors, options.get("decoder_heads", 8))

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> SamHead:
        sam = SamConfig(**config)
        for part in (sam, sam.vision_config, sam.mask_decoder_config):
            part._attn_implementation = attention
        return cls(SamVisionEncoder(sam.vision_config), SamPromptEncoder(sam), SamMaskDecoder(sam.mask_decoder_config))

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

    def trained(self) -> Iterable[nn.Module]:
        return (self.decoder,)

    def features(self, batch: Batch, vision: Vision) -> Tensor:
        """(B, 3, S, S) pictures to (B, C, h, w) embeddings; no gradient ever enters the encoder."""
        if batch.seg_pixels is None:
            raise ValueError("this mask head needs the mask-side view: the batch has no seg_pixels")
        with torch.no_grad():
            return self.encoder(batch.seg_pixels).last_hidden_state

    def decode(self, features: Tensor, queries: Tensor, query_image: Tensor, geometry: list[Geometry]) -> list[Tensor]:
        """All queries of the batch in one pass (without gradients: so many at once). (Q, K, D) to
        B x (N_b, H_b, W_b) float32 logits."""
        size = len(queries) if torch.is_grad_enabled() else QUERIES_AT_ONCE
        pieces = zip(queries.split(size), query_image.split(size), strict=True)
        logits = torch.cat([self._low_resolution(features, piece, image) for piece, image in pieces])
        by_image = split_by_image(logits, query_image, len(geometry))
        return [to_original(piece, place, self.view_size) for piece, place in zip(by_image, geometry, strict=True)]

    def _low_resolution(self, features: Tensor, queries: Tensor, query_image: Tensor) -> Tensor:
        """(Q, K, D) to (Q, 4h, 4w) logits: each query with its own copy of its picture's embedding."""
        dtype = features.dtype
        dense = self.prompts.no_mask_embed.weight.to(dtype)[:, :, None, None]  # (1, D, 1, 1)
        logits, _ = self.decoder(
            image_embeddings=features[query_image],
            image_positional_embeddings=self._positions(features).expand(len(queries), -1, -1, -1),
            sparse_prompt_embeddings=queries[:, None].to(dtype),
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return logits[:, 0, 0]

    def _positions(self, features: Tensor) -> Tensor:
        """(1, C, h, w) random-Fourier encoding of the patch centres."""
        height, width = features.shape[-2:]
        rows = (torch.arange(height, device=features.device) + 0.5) / height
        columns = (torch.arange(width, device=features.device) + 0.5) / width
        centres = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)], dim=-1)  # (h, w, xy)
        return self.prompts.shared_embedding(centres).permute(2, 0, 1)[None].to(features.dtype)
