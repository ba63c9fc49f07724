"""LLaVA from transformers' parts: vision tower, projector, LLaMA. The only file that knows how they meet."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data.types import IMAGE_ID


@dataclass
class Vision:
    """What the language side makes of B pictures."""

    states: Tensor  # (B, P, H) projected patches, as the language model reads them
    layers: tuple[Tensor, ...]  # all hidden states of the tower, (B, 1 + P, W), class token first


@dataclass
class Generated:
    """Greedy continuations of R rows."""

    ids: list[list[int]]  # new ids of each row, up to and including the end token
    states: Tensor  # (R, T, H): the state that predicted each new token


def mlp_projector(width: int, hidden: int, depth: int) -> nn.Sequential:
    """LLaVA's `linear` (depth 1) or `mlpNx_gelu` (depth N)."""
    layers: list[nn.Module] = [nn.Linear(width, hidden)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)


class Llava(nn.Module):
    """Reads a picture and a conversation.

    In `ids` (R, L) every picture is P consecutive IMAGE_ID, so ids and hidden states have equal length and no
    vocabulary row stands for the picture. feature_layer: which of the tower's hidden states is projected.
    """

    def __init__(
        self, tower: CLIPVisionModel, projector: nn.Module, language: LlamaForCausalLM, *, feature_layer: int = -2
    ):
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.language = language
        self.feature_layer = feature_layer

    @classmethod
    def build(
        cls,
        tower: CLIPVisionConfig,
        language: LlamaConfig,
        *,
        projector_depth: int,
        feature_layer: int = -2,
        attention: str = "sdpa",
    ) -> Llava:
        """An uninitialised model of these sizes. `attention` is the language model's; the tower's is never flash."""
        tower._attn_implementation = "eager" if attention == "eager" else "sdpa"
        language._attn_implementation = attention
        projector = mlp_projector(tower.hidden_size, language.hidden_size, projector_depth)
        return cls(CLIPVisionModel(tower), projector, LlamaForCausalLM(language), feature_layer=feature_layer)

    @property
    def image_tokens(self) -> int:
        """P, the positions that a picture takes in a row."""
        return (self.tower.config.image_size // self.tower.config.patch_size) ** 2

    @property
    def hidden_size(self) -> int:
        return self.language.config.hidden_size

    def encode_images(self, pixels: Tensor) -> Vision:
        """(B, 3, h, w) pictures, each encoded once. A frozen tower keeps no graph."""
        trains = any(parameter.requires_grad for parameter in self.tower.parameters())
        with nullcontext() if trains else torch.no_grad():
            layers = self.tower(pixels, output_hidden_states=True).hidden_states
        return Vision(self.projector(layers[self.feature_layer][:, 1:]), layers)

    def forward(self, ids: Tensor, attention: Tensor, image_states: Tensor, row_image: Tensor) -> Tensor:
        """(R, L) ids and attention, (B, P, H) states, (R,) picture of each row -> (R, L, H) after the last norm."""
        embeds = self.embed(ids, image_states, row_image)
        return self.language.model(
            inputs_embeds=embeds, attention_mask=attention.long(), position_ids=_positions(attention), use_cache=False
        ).last_hidden_state

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
        self, ids: Tensor, attention: Tensor, image_states: Tensor, row_image: Tensor, *, max_new_tokens: int, eos: int
    ) -> Generated:
        """Greedy decoding of left-padded prompts with a KV cache; each row stops at its own `eos`."""
        if not bool(attention[:, -1].all()):
            raise ValueError("prompts must be padded on the left: the last position of every row must be a token")
        cache = DynamicCache(config=self.language.config)
        embeds, positions = self.embed(ids, image_states, row_image), _positions(attention)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        tokens, states = [], []
        while len(tokens) < max_new_tokens and not bool(done.all()):
            state = self.language.model(
                inputs_embeds=embeds,
                attention_mask=attention.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            token = self.logits(state).argmax(-1).masked_fill(done, eos)
            states.append(state)
            tokens.append(token)
            done |= token == eos
            embeds = self.language.get_input_embeddings()(token)[:, None]
            attention = torch.cat([attention, attention.new_ones(len(ids), 1)], dim=1)
            positions = positions[:, -1:] + 1
        rows = torch.stack(tokens, dim=1).tolist()
        return Generated([_until(row, eos) for row in rows], torch.stack(states, dim=1))

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


def _positions(attention: Tensor) -> Tensor:
    """0, 1, ... over the real tokens of each row, whichever side is padded."""
    return (attention.long().cumsum(1) - 1).clamp(min=0)


def _until(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row
