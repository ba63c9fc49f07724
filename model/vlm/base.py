"""What the project asks of a vision-language model, whatever its family.

A backbone is one file beside this one: a `VisionLanguageModel` that says how its images are encoded. Its language side
is `model/vlm/decoder.py`, unless the family needs another. Everything outside `model/vlm` goes through the members
below and never reaches into a backbone's modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from data.types import Geometry
from data.views import LanguageView


@dataclass
class Vision:
    """B encoded images, as the language model and the mask heads read them."""

    states: Tensor  # (B, P, H) image tokens, projected to the language model's width
    layers: tuple[Tensor, ...]  # hidden states of the vision tower, (B, 1 + patches, W), class token first
    attention: Tensor | None = None  # (B, P) bool: image tokens that show some of the image, not padding; None: all


@dataclass
class Generated:
    """Greedy continuations of R rows."""

    ids: list[list[int]]  # new ids per row, up to and including the end token
    states: Tensor  # (R, T, H): the state that predicted each new token


class VisionLanguageModel(nn.Module):
    """Reads images and conversations. Its weights are named `vlm.*` in a SegModel.

    In `ids` (R, L) an image is P consecutive IMAGE_ID, so that ids and hidden states have equal length and no row of
    the vocabulary stands for the image.
    """

    language: PreTrainedModel  # a causal language model: get_input_embeddings(), lm_head
    view: LanguageView  # makes the pixels that `encode_images` takes

    @property
    def image_tokens(self) -> int:
        """P, the positions that an image takes in a row."""
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        """H, the width of the language model."""
        raise NotImplementedError

    @property
    def attention_implementation(self) -> str:
        """Of the language model: sdpa, eager or flash_attention_2."""
        raise NotImplementedError

    @property
    def decoder(self) -> nn.Module:
        """The language model without its output layer: what LoRA and quantisation look for linears in."""
        raise NotImplementedError

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The transformer blocks of `decoder`: what is compiled and checkpointed."""
        raise NotImplementedError

    def vision_parts(self) -> dict[str, list[nn.Module]]:
        """What a recipe may train of the vision side: {"projector": [...], "tower": [...]}."""
        raise NotImplementedError

    def encode_images(self, pixels: Tensor, geometry: Sequence[Geometry] = ()) -> Vision:
        """(B, 3, h, w) pixels of `view` -> Vision; each image once, whatever the number of its rows."""
        raise NotImplementedError

    def forward(self, ids: Tensor, attention: Tensor, vision: Vision, row_image: Tensor) -> Tensor:
        """(R, L) ids, (R, L) bool attention, (R,) image of each row -> (R, L, H) states after the final norm."""
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        raise NotImplementedError

    def generate(
        self, ids: Tensor, attention: Tensor, vision: Vision, row_image: Tensor, *, max_new_tokens: int, eos: int
    ) -> Generated:
        """Greedy continuations of left-padded prompts; each row stops at its own `eos`."""
        raise NotImplementedError

    def set_packing(self, rows: bool, length: int) -> None:
        """rows: the dialogues of an image share their common prefix in training. length: positions up to which images
        share a sequence; 0: none do."""
        raise NotImplementedError

    def checkpoint_gradients(self) -> None:
        """Recomputes the decoder's layers in the backward pass."""
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Computes the tables that no weight file holds, on the device of the weights."""
        raise NotImplementedError
