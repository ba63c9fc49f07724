"""Qwen2.5-VL and Qwen3-VL from transformers' parts: vision tower with its mergers, text model, output layer. What their
files look like: qwen_vl_checkpoint.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from data.patch_view import PatchView
from data.types import Geometry
from data.views import CLIP_MEAN, CLIP_STD, LanguageView
from model.vlm.base import VLMS, Vision
from model.vlm.causal_strips import of_language
from model.vlm.decoder import DecoderVLM, sees_all
from model.vlm.prefix_packing import MASKED
from model.vlm.qwen_vl_checkpoint import QwenSizes, QwenVLFiles
from model.vlm.qwen_vl_released import QWEN2_5_VL, QWEN3_VL


class TextModel(PreTrainedModel):
    """A text model with its output layer. The library has the two together only with a vision tower between them."""

    config: PreTrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig, model: type[PreTrainedModel]):
        super().__init__(config)
        self.model = model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class QwenVL(QwenVLFiles, DecoderVLM):
    """Vision tower -> merger -> text model with rotary positions on three axes (M-RoPE): time, rows, columns.

    The mergers, which make one image token of 2 x 2 patches, are modules of the tower; in a recipe they count as the
    projector.
    """

    TOWER: ClassVar[type[PreTrainedModel]]
    TEXT: ClassVar[type[PreTrainedModel]]

    def __init__(self, tower: PreTrainedModel, language: TextModel, view: PatchView):
        super().__init__()
        self.tower = tower
        self.language = language
        self.view = view
        self.packs = self.packs and sees_all(language.config)

    @classmethod
    def build(cls, config: dict[str, Any], attention: str = "sdpa", view: LanguageView | None = None) -> QwenVL:
        """An uninitialised model of QwenSizes; `attention` is also the tower's."""
        sizes = QwenSizes(**config)
        text, vision = cls.TEXT_CONFIG(**sizes.text), cls.VISION_CONFIG(**sizes.vision)
        text._attn_implementation, vision._attn_implementation = of_language(attention), attention
        shown = cast(PatchView, view or cls.usual_view(sizes))  # no other is ever given to a Qwen-VL
        return cls(cls.TOWER(vision), TextModel(text, cls.TEXT), shown)

    def vision_parts(self) -> dict[str, list[nn.Module]]:
        parts = dict(self.tower.named_children())
        mergers = [parts.pop(name) for name in ("merger", "deepstack_merger_list") if name in parts]
        return {"projector": mergers, "tower": list(parts.values())}

    def encode_images(self, pixels: Tensor, geometry: Sequence[Geometry] = ()) -> Vision:
        """(n, C) patches of B images one after another -> Vision. Frozen weights keep no graph.

        geometry: of the B images; their original sizes say how many patches each has.
        """
        patch, merge = self.tower.config.patch_size, self.tower.config.spatial_merge_size
        resized = [self.view.geometry(*place.original).resized for place in geometry]
        grids = torch.tensor([(1, height // patch, width // patch) for height, width in resized], device="cpu")
        seen = self.tower(pixels, grid_thw=grids, **self._places(grids, pixels.device))
        tokens = (grids // torch.tensor([1, merge, merge], device="cpu")).tolist()
        offsets = torch.cat([_offsets(rows, columns, pixels.device) for _, rows, columns in tokens], dim=1)
        counts = [rows * columns for _, rows, columns in tokens]
        return Vision(
            seen.pooler_output, counts, offsets=offsets, deepstack=tuple(getattr(seen, "deepstack_features", ()))
        )

    def _places(self, grids: Tensor, device: torch.device) -> dict[str, Tensor]:
        """What the tower would compute by itself of the grids (B, 3): frames, rows and columns of patches. Computed
        ahead, on the CPU, it costs no wait for the GPU in every layer, and the grids need no device, as where memory
        is planned."""
        merge = self.tower.config.spatial_merge_size
        places = {"position_ids": get_vision_position_ids(grids, merge).to(device)}
        return places | {"cu_seqlens": self._bounds(get_vision_cu_seqlens(grids), device)}

    def _bounds(self, bounds: Tensor, device: torch.device) -> Tensor:
        """Where stretches of patches that attend to one another begin: what takes a mask splits its input there, on the
        host; flash attention reads them on the device."""
        return bounds if self.tower.config._attn_implementation in MASKED else bounds.to(device)

    def checkpoint_gradients(self) -> None:
        super().checkpoint_gradients()
        self._checkpoint_tower()

    def reset_buffers(self) -> None:
        """Rotary frequencies of the text model and of the tower, in float32."""
        device = self.language.lm_head.weight.device
        for owner, name in ((self.language.model, "rotary_emb"), (self.tower, "rotary_pos_emb")):
            table = getattr(owner, name)
            setattr(owner, name, type(table)(table.config).to(device))


@VLMS.register("qwen2_5_vl")
class Qwen25VL(QwenVL):
    """Windowed attention in most layers of the tower."""

    NAME = "qwen2_5_vl"
    LICENCE = "Qwen2.5-VL: Apache-2.0 (7B, 32B), Qwen Research License (3B) or Qwen License (72B)"
    STOCK = "Qwen2_5_VLForConditionalGeneration"
    LIGER = "apply_liger_kernel_to_qwen2_5_vl"
    TOWER, TEXT = Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLTextModel
    VISION_CONFIG, TEXT_CONFIG = Qwen2_5_VLVisionConfig, Qwen2_5_VLTextConfig
    STATS, LEAST_TOKENS = (CLIP_MEAN, CLIP_STD), 4
    RELEASED = QWEN2_5_VL

    def _places(self, grids: Tensor, device: torch.device) -> dict[str, Tensor]:
        config = self.tower.config
        order, bounds = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)
        places = super()._places(grids, device)
        return places | {"window_index": order.to(device), "cu_window_seqlens": self._bounds(bounds, device)}


@VLMS.register("qwen3_vl")
class Qwen3VL(QwenVL):
    """A learned table of positions, and image features of inner layers of the tower, which are added to the states of
    the image's tokens after the first layers of the text model (deepstack)."""

    NAME = "qwen3_vl"
    LICENCE = "Qwen3-VL: Apache-2.0"
    STOCK = "Qwen3VLForConditionalGeneration"
    LIGER = "apply_liger_kernel_to_qwen3_vl"
    TOWER, TEXT = Qwen3VLVisionModel, Qwen3VLTextModel
    VISION_CONFIG, TEXT_CONFIG = Qwen3VLVisionConfig, Qwen3VLTextConfig
    STATS, LEAST_TOKENS = ((0.5,) * 3, (0.5,) * 3), 64
    RELEASED = QWEN3_VL

    def _places(self, grids: Tensor, device: torch.device) -> dict[str, Tensor]:
        tower = self.tower
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            tower.num_grid_per_side,
            tower.interpolation_mode,
            tower.interpolation_align_corners,
            tower.spatial_merge_size,
        )
        places = super()._places(grids, device)
        return places | {"interp_indices": indices.to(device), "interp_weights": weights.to(device)}

    def image_inputs(self, vision: Vision, token: Tensor) -> dict[str, Any]:
        shown = token >= 0
        if not vision.deepstack or not bool(shown.any()):
            return {}
        # looked up as the tokens themselves are, see `embed`
        features = [F.embedding(token[shown], layer) for layer in vision.deepstack]
        return {"visual_pos_masks": shown, "deepstack_visual_embeds": features}


def _offsets(rows: int, columns: int, device: torch.device) -> Tensor:
    """(3, rows * columns): time, row and column of each token of an image."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column]).flatten(1)
