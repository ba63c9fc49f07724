"""The language side of a vision-language model: embedding, teacher forcing, greedy generation, prefix sharing.

Everything here holds for any decoder-only transformer of transformers whose attention takes a mask; a backbone
(`model/vlm/llava.py`) adds how its images are encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig

from model.vlm.base import Generated, States, Vision, VisionLanguageModel
from model.vlm.draft import Writing
from model.vlm.past import Past
from model.vlm.prefix_cache import PrefixCache, PrefixSplit, shared_attention, split_prefix
from model.vlm.prefix_packing import MASKED, Packing, pack


class DecoderVLM(VisionLanguageModel):
    """A causal language model whose embeddings of IMAGE_ID are replaced by encoded images.

    A backbone's constructor sets `tower`, `projector`, `language` in this order: new weights are initialised in the
    order of the state dict, and a seed must keep its meaning.
    """

    tower: Any  # each family's own class

    def __init__(self) -> None:
        super().__init__()
        self.pack_rows = False
        self.pack_length = 0

    @property
    def hidden_size(self) -> int:
        return self.language.config.hidden_size

    @property
    def most_positions(self) -> int:
        return self.language.config.max_position_embeddings

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
        self.pack_rows, self.pack_length = rows and self.packs, length

    def logits(self, states: Tensor) -> Tensor:
        return self.language.lm_head(states)

    def embed(self, ids: Tensor, vision: Vision, token: Tensor) -> Tensor:
        """(R, L, H): token embeddings, with image tokens in their place. token: of `Vision.index`."""
        is_image = token >= 0
        # IMAGE_ID is negative and has no row: look up any id there, the result is overwritten
        embeds = self.language.get_input_embeddings()(ids.masked_fill(is_image, 0))
        # the rows of an image share its tokens: a lookup sums their gradients in a fixed order, indexing does not
        image_tokens = F.embedding(token[is_image], vision.states.to(embeds.dtype))
        return embeds.masked_scatter(is_image[..., None], image_tokens)

    def image_inputs(self, vision: Vision, token: Tensor) -> dict[str, Any]:
        """What else the decoder takes of the images at these positions: `token` (R, L) of `Vision.index`."""
        return {}

    def forward(self, ids: Tensor, attention: Tensor, vision: Vision, row_image: Tensor) -> States:
        token = vision.index(ids, row_image)
        embeds, positions = self.embed(ids, vision, token), rotary_positions(attention, vision, token)
        visible = _without_padding(attention, vision, token)
        packing = self._packing(ids, attention, row_image, image_padding=vision.attention is not None)
        if packing is None:
            mask = visible.long()
        else:
            embeds = packing.gather(embeds)
            positions, token = packing.gather_each(positions), packing.gather_each(token)
            kind = self.attention_implementation
            # flash attention takes no mask: it infers the boundaries between rows from positions that start at 0 again
            mask = packing.mask(visible, kind, embeds.dtype) if kind in MASKED else None
        states = self._states(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            **self.image_inputs(vision, token),
        )
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
        self,
        ids: Tensor,
        attention: Tensor,
        vision: Vision,
        row_image: Tensor,
        *,
        max_new_tokens: int,
        eos: int,
        past: Past | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Generated:
        """Greedy decoding with a KV cache. The common prefix of an image's prompts, above all the image itself, is
        prefilled once; rows that have finished leave the batch; drafts let a pass write several tokens."""
        if not bool(attention[:, -1].all()):
            raise ValueError("prompts must be padded on the left: the last position of every row must be a token")
        if (past or on_token) and not bool(attention.all() and len(ids) == 1):
            raise ValueError(f"a conversation is one row without padding, not {len(ids)} rows")
        cache, known = DynamicCache(config=self.language.config), 0
        if past is not None:
            cache, known = past.resume(ids[0].tolist(), cache)
        token = vision.index(ids, row_image)
        fed = _Stretch(self.embed(ids, vision, token), rotary_positions(attention, vision, token), token)
        fed = fed.of(slice(None), slice(known, None))
        visible = _without_padding(attention, vision, token)
        split, prefix = split_prefix(ids, attention, row_image) if self.packs else None, None
        if split is not None:
            prefix, fed, visible = self._prefill_prefix(split, fed, visible, vision)
        most = self._most_drafted(len(ids), cache, shared=prefix is not None)
        prompts = [row[real].tolist() for row, real in zip(ids, attention, strict=True)]
        # beyond the positions that the model was made for it writes nonsense
        room = [max(0, min(max_new_tokens, self.most_positions - len(prompt))) for prompt in prompts]
        answers = [Writing(prompt, limit, eos, most) for prompt, limit in zip(prompts, room, strict=True)]
        states = fed.embeds.new_zeros(len(ids), max_new_tokens, fed.embeds.shape[-1])
        rows = list(range(len(ids)))  # those in the batch, of which some may have finished
        width = 1  # at the end of what is fed, positions that may write: the last token, then what is drafted after it
        while running := [at for at, row in enumerate(rows) if not answers[row].done]:
            if 2 * len(running) <= len(rows):  # dropping rows copies the cache: worth it for half of them
                kept = torch.tensor(running, device=ids.device)
                cache.batch_select_indices(kept)
                prefix = None if prefix is None else prefix[kept]
                rows, fed, visible = [rows[at] for at in running], fed.of(kept), visible[kept]
            state = self._extend(fed, visible, vision, cache, prefix).map(lambda states: states[:, -width:])  # noqa: B023
            chosen = self.logits(state.final).argmax(-1).tolist()
            written = [answers[row].write(tokens) for row, tokens in zip(rows, chosen, strict=True)]
            for at, (row, new) in enumerate(zip(rows, written, strict=True)):
                # the state that predicts a token is that of the position before it: no second pass is needed to read
                # mask prompts, and where a draft was right it is the state of writing token by token
                end = len(answers[row].ids)
                states[row, end - len(new) : end] = state.read[at, : len(new)]
            right = torch.tensor([max(1, len(new)) for new in written], device=ids.device)
            wrong = width - int(right.max())
            if wrong:
                cache.crop(-wrong)
            if past is not None:
                past.ids = prompts[0] + answers[0].ids[:-1]
            if on_token is not None:
                for token in written[0]:
                    on_token(token)
            # the next pass: where only some rows were right, the others keep keys that they do not see
            visible = torch.cat([visible[:, :-width], _first(right, width - wrong)], dim=1)
            start = fed.positions[..., -width] + right
            reading = [answers[row].reading for row in rows]
            width = max(map(len, reading))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in reading], device=ids.device)
            fed = _Stretch(
                self.language.get_input_embeddings()(tokens),
                start[..., None] + torch.arange(width, device=ids.device),
                torch.full_like(tokens, -1),
            )
            lengths = torch.tensor([len(row) for row in reading], device=ids.device)
            visible = torch.cat([visible, _first(lengths, width)], dim=1)
        longest = max(len(answer.ids) for answer in answers)
        return Generated([answer.ids for answer in answers], states[:, :longest])

    def _most_drafted(self, rows: int, cache: DynamicCache, *, shared: bool) -> int:
        """Drafts need keys that can be dropped again, and where rows differ in how many, a mask."""
        masked = shared or rows == 1 or self.attention_implementation in MASKED
        return self.draft_tokens if masked and cache.is_croppable else 0

    def _prefill_prefix(
        self, split: PrefixSplit, fed: _Stretch, visible: Tensor, vision: Vision
    ) -> tuple[PrefixCache, _Stretch, Tensor]:
        """Reads the common prefixes. Returns their cache, the rows' suffixes, and what these may attend to (prefix,
        then suffix)."""
        row = split.first_row[:, None]
        prefix_visible = visible[row, split.columns] & split.real
        cache = DynamicCache(config=self.language.config)
        self._extend(fed.of(row, split.columns), prefix_visible, vision, cache)
        width = split.suffix.shape[1]
        suffix_visible = visible[:, -width:] & split.suffix
        both = torch.cat([prefix_visible[split.of_row], suffix_visible], dim=1)
        return PrefixCache.of(cache, split.of_row), fed.of(slice(None), slice(-width, None)), both

    def _extend(
        self, fed: _Stretch, visible: Tensor, vision: Vision, cache: DynamicCache, prefix: PrefixCache | None = None
    ) -> States:
        """(R, L, H) states of the next L positions; `visible` (R, prefix + cached + L): positions that are keys."""
        inputs: dict[str, Any] = {"inputs_embeds": fed.embeds, "position_ids": fed.positions, "past_key_values": cache}
        inputs |= {"use_cache": True, **self.image_inputs(vision, fed.token)}
        if prefix is None:
            return self._states(attention_mask=visible.long(), **inputs)
        length, keys = fed.embeds.shape[1], visible.shape[1]
        causal = visible.new_ones(length, keys).tril(keys - length)
        with shared_attention(self.language.config):
            mask = (visible[:, None] & causal)[:, None]
            return self._states(attention_mask=mask, prefix=prefix, **inputs)

    def checkpoint_gradients(self) -> None:
        """Recomputes layers in the backward pass; inputs need gradients for it when the embeddings are frozen."""
        self.language.gradient_checkpointing_enable({"use_reentrant": False})
        self.language.config.use_cache = False
        self.language.enable_input_require_grads()

    def _checkpoint_tower(self) -> None:
        """The same for a tower that trains, where the family's can."""
        if any(parameter.requires_grad for parameter in self.tower.parameters()):
            self.tower.gradient_checkpointing_enable({"use_reentrant": False})

    def _apply(self, fn, recurse: bool = True):
        """Casts take the rotary frequencies along; bf16 ones turn far positions by whole radians: keep float32."""
        super()._apply(fn, recurse)
        if self.language.lm_head.weight.device.type != "meta":
            self.reset_buffers()
        return self


@dataclass(frozen=True)
class _Stretch:
    """Positions that are fed to the decoder: R rows of L."""

    embeds: Tensor  # (R, L, H)
    positions: Tensor  # of `rotary_positions`
    token: Tensor  # (R, L) of `Vision.index`

    def of(self, rows: Tensor | slice, columns: Tensor | slice = slice(None)) -> _Stretch:
        return _Stretch(self.embeds[rows, columns], self.positions[..., rows, columns], self.token[rows, columns])


def rotary_positions(attention: Tensor, vision: Vision, token: Tensor) -> Tensor:
    """(R, L) rotary positions: 0, 1, ... over the real tokens of each row, whichever side is padded.

    Where images have `offsets` of their own, (1 + A, R, L): these, and then A axes on which a text token counts on from
    what stands before it, equally on all; an image's token stands at its offset from where the image begins, and the
    text continues after its farthest token, on whichever axis that is (M-RoPE). From the first, transformers' models
    see where rows begin that lie end to end. token: (R, L) of `Vision.index`; one image per row.
    """
    plain = (attention.long().cumsum(1) - 1).clamp(min=0)
    if vision.offsets is None:
        return plain
    is_image = token >= 0
    offset = vision.offsets[:, token.clamp(min=0)].masked_fill(~is_image, 0)  # (A, R, L)
    span = (offset.amax(dim=(0, 2)) + 1) * is_image.any(1)  # (R,) positions that a row's image takes
    text_before = (attention & ~is_image).long().cumsum(1)
    behind = (is_image.flip(1).cumsum(1).flip(1) == 0) & is_image.any(1, keepdim=True)
    start = text_before - (~is_image).long() + behind * span[:, None]
    return torch.cat([plain[None], (start + offset).clamp(min=0)])


def sees_all(config: PreTrainedConfig) -> bool:
    """Whether no window hides far positions from a token, so that a prefix can be kept anywhere. config: of a language
    model."""
    return "sliding_attention" not in (getattr(config, "layer_types", None) or ())


def _without_padding(attention: Tensor, vision: Vision, token: Tensor) -> Tensor:
    """(R, L) attention without the image positions that show only padding. token: of `Vision.index`."""
    if vision.attention is None:
        return attention
    return attention & (vision.attention[token.clamp(min=0)] | (token < 0))


def _first(lengths: Tensor, width: int) -> Tensor:
    """(R,) -> (R, width) bool: the first positions of each row."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
