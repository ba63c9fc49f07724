"""The language side of a vision-language model: embedding, teacher forcing, greedy generation, prefix sharing.

Everything here holds for any decoder-only transformer of transformers whose attention takes a mask; a backbone
(`model/vlm/llava.py`) adds how its images are encoded.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from data.types import IMAGE_ID
from model.vlm.base import Generated, States, Vision, VisionLanguageModel
from model.vlm.prefix_cache import PrefixCache, PrefixSplit, shared_attention, split_prefix
from model.vlm.prefix_packing import MASKED, Packing, pack


class DecoderVLM(VisionLanguageModel):
    """A causal language model whose embeddings of IMAGE_ID are replaced by encoded images.

    A backbone's constructor sets `tower`, `projector`, `language` in this order: new weights are initialised in the
    order of the state dict, and a seed must keep its meaning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pack_rows = False
        self.pack_length = 0

    @property
    def hidden_size(self) -> int:
        return self.language.config.hidden_size

    @property
    def attention_implementation(self) -> str:
        return self.language.config._attn_implementation

    @property
    def decoder(self) -> nn.Module:
        return self.language.model

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.language.model.layers

    def set_packing(self, rows: bool, length: int) -> None:
        self.pack_rows, self.pack_length = rows, length

    def logits(self, states: Tensor) -> Tensor:
        return self.language.lm_head(states)

    def positions(self, ids: Tensor, attention: Tensor) -> Tensor:
        """(R, L) rotary positions: 0, 1, ... over the real tokens of each row, whichever side is padded."""
        return (attention.long().cumsum(1) - 1).clamp(min=0)

    def embed(self, ids: Tensor, vision: Vision, row_image: Tensor) -> Tensor:
        """(R, L, H): token embeddings, with the image tokens of each row's image in their place."""
        is_image = ids == IMAGE_ID
        # IMAGE_ID is negative and has no row: look up any id there, the result is overwritten
        embeds = self.language.get_input_embeddings()(ids.masked_fill(is_image, 0))
        per_row, tokens = is_image.sum(1), vision.states.shape[1]
        if not bool(((per_row == 0) | (per_row == tokens)).all()):
            raise ValueError(f"rows hold {per_row.tolist()} image positions, the tower gives {tokens}")
        image_tokens = vision.states[row_image[per_row > 0]].to(embeds.dtype)
        return embeds.masked_scatter(is_image[..., None], image_tokens)

    def forward(self, ids: Tensor, attention: Tensor, vision: Vision, row_image: Tensor) -> States:
        embeds, positions = self.embed(ids, vision, row_image), self.positions(ids, attention)
        visible = _without_padding(attention, ids, vision.attention, row_image)
        packing = self._packing(ids, attention, row_image, image_padding=vision.attention is not None)
        if packing is None:
            mask = visible.long()
        else:
            embeds, positions = packing.gather(embeds), packing.gather_positions(positions)
            kind = self.attention_implementation
            # flash attention takes no mask: it infers the boundaries between rows from positions that start at 0 again
            mask = packing.mask(visible, kind, embeds.dtype) if kind in MASKED else None
        states = self._states(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        return states if packing is None else states.map(packing.scatter)

    def _states(self, **inputs: Any) -> States:
        """One pass of the decoder. What its final norm is given is seen by a hook, so that no part of it runs twice;
        `hidden_states` of the library would not do: what the last of them is differs between families and releases
        (sa2va.md 2.3)."""
        if not self.read_unnormed:
            final = self.decoder(**inputs).last_hidden_state
            return States(final, final)
        given: list[Tensor] = []
        with cast(nn.Module, self.decoder.norm).register_forward_pre_hook(lambda _, args: given.append(args[0])):
            final = self.decoder(**inputs).last_hidden_state
        (read,) = given
        return States(final, read)

    def _packing(self, ids: Tensor, attention: Tensor, row_image: Tensor, *, image_padding: bool) -> Packing | None:
        """Packing with shared prefixes where the attention takes a mask. Flash attention does not: rows are laid end to
        end, each in full, unless image tokens must be hidden from it, which needs a mask."""
        if not self.pack_rows:
            return None
        if self.attention_implementation in MASKED:
            return pack(ids, attention, row_image, most=self.pack_length)
        return None if image_padding else pack(ids, attention, row_image, most=ids.numel(), share=False)

    @torch.no_grad()
    def generate(
        self, ids: Tensor, attention: Tensor, vision: Vision, row_image: Tensor, *, max_new_tokens: int, eos: int
    ) -> Generated:
        """Greedy decoding with a KV cache. The common prefix of an image's prompts, above all the image itself, is
        prefilled once; rows that have finished leave the batch."""
        if not bool(attention[:, -1].all()):
            raise ValueError("prompts must be padded on the left: the last position of every row must be a token")
        cache = DynamicCache(config=self.language.config)
        embeds, positions = self.embed(ids, vision, row_image), self.positions(ids, attention)
        visible = _without_padding(attention, ids, vision.attention, row_image)
        split, prefix = split_prefix(ids, attention, row_image), None
        if split is not None:
            prefix, embeds, visible, positions = self._prefill_prefix(split, embeds, visible, positions)
        tokens = ids.new_full((len(ids), max_new_tokens), eos)
        states = embeds.new_zeros(len(ids), max_new_tokens, embeds.shape[-1])
        rows = torch.arange(len(ids), device=ids.device)  # those that are not finished
        done = torch.zeros_like(rows, dtype=torch.bool)
        step = 0
        while step < max_new_tokens and not bool(done.all()):
            if 2 * int(done.sum()) >= len(rows):  # dropping rows copies the cache: worth it for half of them
                running = (~done).nonzero()[:, 0]
                cache.batch_select_indices(running)
                prefix = None if prefix is None else prefix[running]
                rows, done, embeds = rows[running], done[running], embeds[running]
                visible, positions = visible[running], positions[running]
            state = self._extend(embeds, visible, positions, cache, prefix).map(lambda states: states[:, -1])
            token = self.logits(state.final).argmax(-1).masked_fill(done, eos)
            # the state that predicts token k is the state of step k: no second pass is needed to read mask prompts
            states[rows, step], tokens[rows, step] = state.read, token
            done = done | (token == eos)
            embeds = self.language.get_input_embeddings()(token)[:, None]
            visible = torch.cat([visible, visible.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
            step += 1
        return Generated([_until(row, eos) for row in tokens[:, :step].tolist()], states[:, :step])

    def _prefill_prefix(
        self, split: PrefixSplit, embeds: Tensor, visible: Tensor, positions: Tensor
    ) -> tuple[PrefixCache, Tensor, Tensor, Tensor]:
        """Reads the common prefixes. Returns their cache, and of the rows' suffixes the embeddings, what they may
        attend to (prefix, then suffix), and the positions."""
        row, columns = split.first_row, split.columns
        prefix_visible = visible[row[:, None], columns] & split.real
        cache = DynamicCache(config=self.language.config)
        self._extend(embeds[row[:, None], columns], prefix_visible, positions[row[:, None], columns], cache)
        width = split.suffix.shape[1]
        suffix_visible = visible[:, -width:] & split.suffix
        both = torch.cat([prefix_visible[split.of_row], suffix_visible], dim=1)
        return PrefixCache.of(cache, split.of_row), embeds[:, -width:], both, positions[:, -width:]

    def _extend(
        self, embeds: Tensor, visible: Tensor, positions: Tensor, cache: DynamicCache, prefix: PrefixCache | None = None
    ) -> States:
        """(R, L, H) states of the next L positions; `visible` (R, prefix + cached + L): positions that are keys."""
        inputs = {"inputs_embeds": embeds, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        if prefix is None:
            return self._states(attention_mask=visible.long(), **inputs)
        length, keys = embeds.shape[1], visible.shape[1]
        causal = visible.new_ones(length, keys).tril(keys - length)
        with shared_attention(self.language.config):
            mask = (visible[:, None] & causal)[:, None]
            return self._states(attention_mask=mask, prefix=prefix, **inputs)

    def checkpoint_gradients(self) -> None:
        """Recomputes layers in the backward pass; inputs need gradients for it when the embeddings are frozen."""
        self.language.gradient_checkpointing_enable({"use_reentrant": False})
        self.language.config.use_cache = False
        self.language.enable_input_require_grads()

    def _apply(self, fn, recurse: bool = True):
        """Casts take the rotary frequencies along; bf16 ones turn far positions by whole radians: keep float32."""
        super()._apply(fn, recurse)
        if self.language.lm_head.weight.device.type != "meta":
            self.reset_buffers()
        return self


def _without_padding(attention: Tensor, ids: Tensor, image_attention: Tensor | None, row_image: Tensor) -> Tensor:
    """(R, L) attention without the image positions that show only padding."""
    if image_attention is None:
        return attention
    is_image = ids == IMAGE_ID
    return attention.masked_scatter(is_image, image_attention[row_image[is_image.any(1)]])


def _until(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row
