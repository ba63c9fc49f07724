"""SAM as the mask head: frozen encoder, K text prompts per mask as the only sparse embeddings, one mask per query."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import SamConfig, SamMaskDecoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder, SamVisionEncoder

from data.views import SamView
from model.checkpoints.files import read_tensors
from model.checkpoints.name_table import under
from model.heads.base import HEADS
from model.heads.doubling import to_cells
from model.heads.promptable import Levels, Options, PromptableHead
from model.heads.sam_attention import use_chunked_attention
from model.heads.sam_decoder import SamCellDecoder, of_queries
from model.heads.sam_weights import SAM_NAMES, SAM_RELEASED, SAM_SIZE_KEYS, folder_decoder_heads, rename_sam, sam_sizes


@HEADS.register("sam")
class SamHead(PromptableHead):
    """Segment Anything with a text prompt (lisa.md 1.6). As published only its decoder trains."""

    LICENCE = "SAM: Apache-2.0"
    WEIGHT_NAMES = under(SAM_NAMES, "model.visual_model.", "")
    FILE_SIGNS = ("image_encoder.blocks.*", "vision_encoder.layers.*")
    SIZE_KEYS = SAM_SIZE_KEYS
    RELEASED = SAM_RELEASED
    LORA_LAYERS = ("qkv",)
    encoder: SamVisionEncoder
    prompts: SamPromptEncoder
    decoder: SamCellDecoder

    def __init__(self, encoder: SamVisionEncoder, prompts: SamPromptEncoder, decoder: SamCellDecoder):
        super().__init__()
        self.encoder = encoder
        self.prompts = prompts
        self.decoder = decoder

    @classmethod
    def sizes_of(cls, tensors: dict[str, Tensor], settings: Options) -> dict[str, Any]:
        return sam_sizes(tensors, settings.decoder_heads)

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> SamHead:
        sam = SamConfig(**config)
        vision = cast(SamVisionConfig, sam.vision_config)
        mask_decoder = cast(SamMaskDecoderConfig, sam.mask_decoder_config)
        for part in (sam, vision, mask_decoder):
            part._attn_implementation = attention
        encoder = use_chunked_attention(SamVisionEncoder(vision))
        decoder = SamCellDecoder(SamMaskDecoder(mask_decoder))
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

    @property
    def padded_side(self) -> int:
        return self.view.size

    def encode(self, pixels: Tensor) -> Levels:
        with self.encoding():
            return (self.encoder(pixels).last_hidden_state,)

    def chunk_decoder(self, levels: Levels) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        (features,) = levels
        cells, positions = to_cells(features + self.dense_prompt(levels)), to_cells(self.positions(features))
        return partial(self._low_resolution, cells, positions, (features.shape[-2], features.shape[-1]))

    def _low_resolution(
        self, cells: Tensor, positions: Tensor, size: tuple[int, int], queries: Tensor, query_image: Tensor
    ) -> tuple[Tensor]:
        """(Q, K, D) -> (Q, 4h, 4w) logits: each query with its own copy of its image's embedding. No scores: LISA's
        family never trains SAM's estimate of the IoU, and text prompts are strange to it."""
        return (self.decoder(of_queries(cells, query_image), positions, queries, size),)
