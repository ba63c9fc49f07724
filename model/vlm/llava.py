"""LLaVA from transformers' parts: vision tower, projector, LLaMA. What its files look like: llava_checkpoint.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data.types import Geometry
from data.views import LanguageView, PaddedView
from model.embedding_cache import EmbeddingCache
from model.vlm.base import VLMS, Vision
from model.vlm.causal_strips import of_language
from model.vlm.decoder import DecoderVLM
from model.vlm.llava_checkpoint import LlavaFiles, LlavaSizes, family_of
from model.vlm.llava_released import released_sizes
from model.vlm.tower import OwnView, TowerInput
from model.vlm.towers import TOWERS
from utils.config import CacheConfig, ModelConfig


def mlp_projector(width: int, out: int, depth: int, between: int | None = None) -> nn.Sequential:
    """LLaVA's `linear` (depth 1) or `mlpNx_gelu` (depth N), `between` (None: `out`) wide inside."""
    widths = [width, *[between or out] * (depth - 1), out]
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for wide, next_wide in pairwise(widths[1:]):
        layers.extend([nn.GELU(), nn.Linear(wide, next_wide)])
    return nn.Sequential(*layers)


@VLMS.register("llava", "llava_llama", "llama")
class Llava(LlavaFiles, DecoderVLM):
    """Vision tower -> projector -> LLaMA.

    feature_layer: which of the tower's hidden states is projected. pool: pool x pool patches are averaged to one image
    token. Patches that show only the padding of `view` are no keys in the tower, nor are their tokens in the language
    model, though they keep their positions.
    """

    LICENCE = "LLaVA: that of its language model (LLaMA: non-commercial; Llama 2 and its Vicuna: its community licence)"

    def __init__(
        self,
        tower: PreTrainedModel,
        projector: nn.Module,
        language: LlamaForCausalLM,
        *,
        feature_layer: int = -2,
        pool: int = 1,
        view: LanguageView | None = None,
    ):
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.language = language
        self.feature_layer = feature_layer
        self.pool = pool
        self.cache: EmbeddingCache | None = None
        self.cached_layers: tuple[int, ...] = ()
        self.family = TOWERS[tower.config.model_type]
        shown = cast(OwnView | PaddedView, view or self.family.usual_view(self.side))  # no other is ever given to it
        self.view = replace(shown, cell=self.patch * pool)

    def licences(self) -> list[str]:
        return [self.LICENCE, self.family.LICENCE]

    @classmethod
    def build(cls, config: dict[str, Any], attention: str = "sdpa", view: LanguageView | None = None) -> Llava:
        """An uninitialised model of LlavaSizes. `attention` is the language model's; the tower's is never flash."""
        sizes = LlavaSizes(**config)
        shown = TowerInput(**sizes.tower_input)
        tower = family_of(config).build(sizes.tower, "eager" if attention == "eager" else "sdpa")
        language = LlamaConfig(**sizes.language)
        language._attn_implementation = of_language(attention)
        width, depth = language.hidden_size, sizes.projector_depth
        return cls(
            tower,
            mlp_projector(tower.config.hidden_size, width, depth, sizes.projector_width),
            LlamaForCausalLM(language),
            feature_layer=sizes.feature_layer,
            pool=shown.pool,
            view=view or (PaddedView(tower.config.image_size) if shown.pad else None),
        )

    @classmethod
    def planned(
        cls, values: dict[str, Any], config: ModelConfig, added: int
    ) -> tuple[dict[str, Any], LanguageView | None]:
        return asdict(released_sizes(values, config, added)), None

    @property
    def side(self) -> int:
        """Of the tower's square input, in pixels."""
        return cast(int, self.tower.config.image_size)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return cast(int, self.tower.config.patch_size)

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.side // self.patch

    def vision_parts(self) -> dict[str, list[nn.Module]]:
        """The projector, and of the tower what its features come from."""
        return {"projector": [self.projector], "tower": self.family.used_parts(self.tower, self.feature_layer)}

    def encode_images(self, pixels: Tensor, geometry: Sequence[Geometry] = ()) -> Vision:
        """(B, 3, h, w) -> Vision. A frozen tower keeps no graph.

        geometry: of the B images; from their original sizes a padded view knows what is padding.
        """
        visible = self._visible_patches(geometry, pixels.device)
        mask = None
        if visible is not None:
            first = self.family.prefix(self.tower.config)
            keys = F.pad(visible.flatten(1), (first, 0), value=True)  # tokens before the patches always count
            mask = _key_mask(keys, pixels.dtype)
        trains = any(parameter.requires_grad for parameter in self.tower.parameters())
        with nullcontext() if trains else torch.no_grad():
            layers = self._layers(pixels, mask)
        patches = self._pooled(layers[self.feature_layer])
        # a token counts as visible by its first patch (as released), so its others may be padding
        attention = None if visible is None else visible[:, :: self.pool, :: self.pool].flatten(1)
        states = self.projector(patches)
        counts = [states.shape[1]] * len(states)
        return Vision(states.flatten(0, 1), counts, layers, None if attention is None else attention.flatten())

    def use_cache(self, settings: CacheConfig, levels: Sequence[int]) -> None:
        self.cached_layers = tuple(dict.fromkeys([self.feature_layer, *levels]))
        self.cache = EmbeddingCache.of(self.tower, settings, *self.cached_layers)

    def _layers(self, pixels: Tensor, mask: Tensor | None) -> Sequence[Tensor] | Mapping[int, Tensor]:
        """Hidden states of the tower by their number: all of them, or those that are kept on disk."""
        if self.cache is None:
            return self.family.layers(self.tower, pixels, mask)

        def encode(pixels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
            layers = self.family.layers(self.tower, pixels, mask)
            return tuple(layers[number] for number in self.cached_layers)

        return dict(zip(self.cached_layers, self.cache(pixels, encode, *([] if mask is None else [mask])), strict=True))

    def _visible_patches(self, geometry: Sequence[Geometry], device: torch.device) -> Tensor | None:
        """(B, g, g) bool: patches that show some of the image, which begins at the top left; None: all do."""
        patch, grid = self.patch, self.grid
        sizes = [self.view.geometry(*place.original).resized for place in geometry]
        # the usual case, always with a view without padding: no mask at all keeps the fast attention kernels
        if all(side > (grid - 1) * patch for size in sizes for side in size):
            return None
        covered = torch.tensor([[math.ceil(side / patch) for side in size] for size in sizes], device=device)
        steps = torch.arange(grid, device=device)
        rows, columns = (steps < covered[:, axis, None] for axis in (0, 1))  # (B, g)
        return rows[:, :, None] & columns[:, None, :]

    def _pooled(self, patches: Tensor) -> Tensor:
        """(B, g * g, W) -> (B, P, W): means over squares of patches, in float32. For pool = 2 this equals the bilinear
        halving of the release (pixellm.md 1.2)."""
        if self.pool == 1:
            return patches
        square = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid)).float()
        return F.avg_pool2d(square, self.pool).flatten(2).transpose(1, 2).to(patches.dtype)

    def reset_buffers(self) -> None:
        """Rotary frequencies, and the tables of the tower."""
        device = self.language.lm_head.weight.device
        self.language.model.rotary_emb = LlamaRotaryEmbedding(self.language.config).to(device)
        self.family.reset_buffers(self.tower)


def _key_mask(attend: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, K) bool -> (B, 1, 1, K), to be added to attention scores."""
    scores = torch.zeros(attend.shape, dtype=dtype, device=attend.device)
    return scores.masked_fill(~attend, torch.finfo(dtype).min)[:, None, None]
