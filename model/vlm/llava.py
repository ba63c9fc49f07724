"""LLaVA from transformers' parts: vision tower, projector, LLaMA. The only file that knows how they meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data.types import IMAGE_ID, Geometry
from data.views import ClipView, LanguageView
from model.vlm.prefix_cache import PrefixCache, PrefixSplit, shared_attention, split_prefix
from model.vlm.prefix_packing import MASKED, Packing, pack


@dataclass
class Vision:
    """What the language side makes of B pictures."""

    states: Tensor  # (B, P, H) projected patches, as the language model reads them
    layers: tuple[Tensor, ...]  # all hidden states of the tower, (B, 1 + patches, W), class token first
    attention: Tensor | None = None  # (B, P) bool: image tokens with something of the picture in them; None: all


@dataclass
class Generated:
    """Greedy continuations of R rows."""

    ids: list[list[int]]  # new ids of each row, up to and including the end token
    states: Tensor  # (R, T, H): the state that predicted each new token


def mlp_projector(width: int, out: int, depth: int, between: int | None = None) -> nn.Sequential:
    """LLaVA's `linear` (depth 1) or `mlpNx_gelu` (depth N), `between` (None: `out`) wide inside."""
    widths = [width, *[between or out] * (depth - 1), out]
    layers: list[nn.Module] = [nn.Linear(*widths[:2])]
    for sides in pairwise(widths[1:]):
        layers += [nn.GELU(), nn.Linear(*sides)]
    return nn.Sequential(*layers)


class Llava(nn.Module):
    """Reads a picture and a conversation.

    In `ids` (R, L) every picture is P consecutive IMAGE_ID, so ids and hidden states have equal length and no
    vocabulary row stands for the picture. feature_layer: which of the tower's hidden states is projected. pool: so many
    patches a side are averaged to one image token. Patches on the padding of `view` are no keys in the tower, nor are
    their tokens in the language model, though they keep their positions.
    """

    def __init__(
        self,
        tower: CLIPVisionModel,
        projector: nn.Module,
        language: LlamaForCausalLM,
        *,
        feature_layer: int = -2,
        pool: int = 1,
    ):
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.language = language
        self.feature_layer = feature_layer
        self.pool = pool
        self.view: LanguageView = ClipView(tower.config.image_size)
        self.pack_rows = False  # rows of one picture share what they begin with
        self.pack_length = 0  # positions up to which pictures share a sequence

    @classmethod
    def build(
        cls,
        tower: CLIPVisionConfig,
        language: LlamaConfig,
        *,
        projector_depth: int,
        projector_width: int | None = None,
        feature_layer: int = -2,
        pool: int = 1,
        attention: str = "sdpa",
    ) -> Llava:
        """An uninitialised model of these sizes. `attention` is the language model's; the tower's is never flash."""
        tower._attn_implementation = "eager" if attention == "eager" else "sdpa"
        language._attn_implementation = attention
        projector = mlp_projector(tower.hidden_size, language.hidden_size, projector_depth, projector_width)
        parts = CLIPVisionModel(tower), projector, LlamaForCausalLM(language)
        return cls(*parts, feature_layer=feature_layer, pool=pool)

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.tower.config.image_size // self.tower.config.patch_size

    @property
    def image_tokens(self) -> int:
        """P, the positions that a picture takes in a row."""
        return (self.grid // self.pool) ** 2

    @property
    def hidden_size(self) -> int:
        return self.language.config.hidden_size

    def used_tower(self) -> list[nn.Module]:
        """The parts of the tower that the projected features come from; the layers above them are carried only."""
        layers = self.tower.encoder.layers
        used = layers[: self.feature_layer if self.feature_layer >= 0 else len(layers) + 1 + self.feature_layer]
        return [self.tower.embeddings, self.tower.pre_layrnorm, used]

    def encode_images(self, pixels: Tensor, geometry: Sequence[Geometry] = ()) -> Vision:
        """(B, 3, h, w) pictures, each encoded once. A frozen tower keeps no graph.

        geometry: of the B pictures, for their original sizes tell a padded view what is padding.
        """
        seen = self._seen(geometry, pixels.device)
        mask = None if seen is None else _key_mask(F.pad(seen.flatten(1), (1, 0), value=True), pixels.dtype)
        trains = any(parameter.requires_grad for parameter in self.tower.parameters())
        with nullcontext() if trains else torch.no_grad():
            layers = self.tower(pixels, output_hidden_states=True, attention_mask=mask).hidden_states
        patches = self._pooled(layers[self.feature_layer][:, 1:])
        # a token counts as seen by its first patch (as released), so its others may be padding
        attention = None if seen is None else seen[:, :: self.pool, :: self.pool].flatten(1)
        return Vision(self.projector(patches), layers, attention)

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        image_states: Tensor,
        row_image: Tensor,
        image_attention: Tensor | None = None,
    ) -> Tensor:
        """(R, L) ids and attention, (B, P, H) states and their (B, P) attention (None: all), (R,) picture of each row
        -> (R, L, H) after the last norm."""
        embeds, positions = self.embed(ids, image_states, row_image), _positions(attention)
        attended = _with_images(attention, ids, image_attention, row_image)
        kind = self.language.config._attn_implementation
        packing = self._packing(ids, attention, row_image, hidden=image_attention is not None)
        if packing:
            embeds, positions = packing.gather(embeds), packing.positions
            attended = packing.mask(attended, kind, embeds.dtype) if kind in MASKED else None  # told by the positions
        states = self.language.model(
            inputs_embeds=embeds,
            attention_mask=attended if packing else attended.long(),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return packing.scatter(states) if packing else states

    def _packing(self, ids: Tensor, attention: Tensor, row_image: Tensor, *, hidden: bool) -> Packing | None:
        """By a mask where the attention takes one; else all rows end to end, unless image tokens are `hidden`."""
        if not self.pack_rows:
            return None
        if self.language.config._attn_implementation in MASKED:
            return pack(ids, attention, row_image, most=self.pack_length)
        return None if hidden else pack(ids, attention, row_image, most=ids.numel(), share=False)

    def logits(self, states: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        return self.language.lm_head(states)

    def embed(self, ids: Tensor, image_states: Tensor, row_image: Tensor) -> Tensor:
        """Token embeddings with the picture of each row in its place, (R, L, H)."""
        is_image = ids == IMAGE_ID
        embeds = self.language.get_input_embeddings()(ids.masked_fill(is_image, 0))
        per_row = is_image.sum(1)
        if not bool(((per_row == 0) | (per_row == image_states.shape[1])).all()):
            raise ValueError(f"rows hold {per_row.tolist()} image positions, the tower gives {image_states.shape[1]}")
        patches = image_states[row_image[per_row > 0]].to(embeds.dtype)
        return embeds.masked_scatter(is_image[..., None], patches)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        attention: Tensor,
        image_states: Tensor,
        row_image: Tensor,
        image_attention: Tensor | None = None,
        *,
        max_new_tokens: int,
        eos: int,
    ) -> Generated:
        """Greedy decoding of left-padded prompts with a KV cache; each row stops at its own `eos`.

        What the rows of a picture begin with, above all the picture, is read once; finished rows leave the batch.
        """
        if not bool(attention[:, -1].all()):
            raise ValueError("prompts must be padded on the left: the last position of every row must be a token")
        cache = DynamicCache(config=self.language.config)
        embeds, positions = self.embed(ids, image_states, row_image), _positions(attention)
        seen = _with_images(attention, ids, image_attention, row_image)
        split, begun = split_prefix(ids, attention, row_image), None
        if split is not None:
            begun, embeds, seen, positions = self._read_shared(split, embeds, seen, positions)
        tokens = ids.new_full((len(ids), max_new_tokens), eos)
        states = embeds.new_zeros(len(ids), max_new_tokens, embeds.shape[-1])
        rows = torch.arange(len(ids), device=ids.device)  # those still writing
        done = torch.zeros_like(rows, dtype=torch.bool)
        step = 0
        while step < max_new_tokens and not bool(done.all()):
            if 2 * int(done.sum()) >= len(rows):  # a smaller cache is worth the copy
                kept = (~done).nonzero()[:, 0]
                cache.batch_select_indices(kept)
                begun = begun and begun[kept]
                rows, done, embeds = rows[kept], done[kept], embeds[kept]
                seen, positions = seen[kept], positions[kept]
            state = self._continue(embeds, seen, positions, cache, begun)[:, -1]
            token = self.logits(state).argmax(-1).masked_fill(done, eos)
            states[rows, step], tokens[rows, step] = state, token
            done = done | (token == eos)
            embeds = self.language.get_input_embeddings()(token)[:, None]
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
            step += 1
        return Generated([_until(row, eos) for row in tokens[:, :step].tolist()], states[:, :step])

    def _read_shared(
        self, split: PrefixSplit, embeds: Tensor, seen: Tensor, positions: Tensor
    ) -> tuple[PrefixCache, Tensor, Tensor, Tensor]:
        """Reads the shared beginnings; returns them with embeddings and positions of what is left of the rows, and
        what they see of both."""
        lead, columns = split.first_row, split.columns
        visible = seen[lead[:, None], columns] & split.real
        cache = DynamicCache(config=self.language.config)
        self._continue(embeds[lead[:, None], columns], visible, positions[lead[:, None], columns], cache)
        width = split.suffix.shape[1]
        own = seen[:, -width:] & split.suffix
        both = torch.cat([visible[split.of_row], own], dim=1)
        return PrefixCache.of(cache, split.of_row), embeds[:, -width:], both, positions[:, -width:]

    def _continue(
        self, embeds: Tensor, seen: Tensor, positions: Tensor, cache: DynamicCache, begun: PrefixCache | None = None
    ) -> Tensor:
        """(R, L, H) states of the next L positions; `seen` (R, begun + cached + L) says which positions are keys."""
        given = {"inputs_embeds": embeds, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        if begun is None:
            return self.language.model(attention_mask=seen.long(), **given).last_hidden_state
        length, keys = embeds.shape[1], seen.shape[1]
        causal = seen.new_ones(length, keys).tril(keys - length)
        with shared_attention(self.language.config):
            mask = (seen[:, None] & causal)[:, None]
            return self.language.model(attention_mask=mask, beginnings=begun, **given).last_hidden_state

    def _seen(self, geometry: Sequence[Geometry], device: torch.device) -> Tensor | None:
        """(B, g, g) bool: patches with something of the picture, which begins at the top left, in them; None: all."""
        patch, grid = self.tower.config.patch_size, self.grid
        sizes = [self.view.geometry(*place.original).resized for place in geometry]
        if all(side > (grid - 1) * patch for size in sizes for side in size):
            return None
        covered = torch.tensor([[math.ceil(side / patch) for side in size] for size in sizes], device=device)
        steps = torch.arange(grid, device=device)
        rows, columns = (steps < covered[:, axis, None] for axis in (0, 1))  # (B, g)
        return rows[:, :, None] & columns[:, None, :]

    def _pooled(self, patches: Tensor) -> Tensor:
        """(B, g * g, W) to (B, P, W): means of squares of patches, in float32."""
        if self.pool == 1:
            return patches
        square = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid)).float()
        return F.avg_pool2d(square, self.pool).flatten(2).transpose(1, 2).to(patches.dtype)

    def checkpoint_gradients(self) -> None:
        """Recomputes layers in the backward pass; inputs need gradients for it when the embeddings are frozen."""
        self.language.gradient_checkpointing_enable({"use_reentrant": False})
        self.language.config.use_cache = False
        self.language.enable_input_require_grads()

    def reset_buffers(self) -> None:
        """Position tables that no weight file holds, on the device of the weights."""
        device = self.language.lm_head.weight.device
        self.language.model.rotary_emb = LlamaRotaryEmbedding(self.language.config).to(device)
        embeddings = self.tower.embeddings
        positions = torch.arange(embeddings.num_positions, device=device)[None]
        embeddings.register_buffer("position_ids", positions, persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """Casts take the rotary frequencies along; bf16 ones turn far positions by whole radians: keep float32."""
        super()._apply(fn, recurse)
        if self.language.lm_head.weight.device.type != "meta":
            self.reset_buffers()
        return self


def _key_mask(attend: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, K) bool to the (B, 1, 1, K) that is added to attention scores."""
    scores = torch.zeros(attend.shape, dtype=dtype, device=attend.device)
    return scores.masked_fill(~attend, torch.finfo(dtype).min)[:, None, None]


def _with_images(attention: Tensor, ids: Tensor, image_attention: Tensor | None, row_image: Tensor) -> Tensor:
    """(R, L) attention without the image positions that show nothing."""
    if image_attention is None:
        return attention
    is_image = ids == IMAGE_ID
    return attention.masked_scatter(is_image, image_attention[row_image[is_image.any(1)]])


def _positions(attention: Tensor) -> Tensor:
    """0, 1, ... over the real tokens of each row, whichever side is padded."""
    return (attention.long().cumsum(1) - 1).clamp(min=0)


def _until(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row
