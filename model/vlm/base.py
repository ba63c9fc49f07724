"""What the project asks of a vision-language model, whatever its family.

A backbone is a `VisionLanguageModel` in a file next to this one, registered in `VLMS` under the values that
`model_type` has in its `config.json`. The instance says how images are encoded; the class says what its files look
like: weight names, sizes, parts that lie elsewhere. Its language side is `model/vlm/decoder.py`, unless the family
needs another. Everything outside `model/vlm` goes through the members below and never into a backbone's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.tokenizer_family import TokenizerFamily
from data.types import IMAGE_ID, Geometry
from data.views import LanguageView
from model.checkpoints.name_table import Pair
from model.checkpoints.size_keys import SizeKeys
from model.checkpoints.weight_source import WeightSource
from model.vlm.past import Past
from utils.config import CacheConfig, ModelConfig
from utils.registry import Registry

VLMS: Registry[type[VisionLanguageModel]] = Registry("vision-language model")  # model_type of config.json -> class


@dataclass(frozen=True)
class BackboneSizes:
    """What other parts of the model must know about a backbone before it is built."""

    tower_width: int
    tower_layers: int
    language_width: int
    vocabulary: int  # rows of the embedding


@dataclass
class Vision:
    """B encoded images of P image tokens in all, as the language model and the mask heads read them."""

    states: Tensor  # (P, H) the tokens of all images one after another, in the language model's width
    counts: list[int]  # tokens of each image
    # hidden states of a tower that sees every image in the same size: (B, patches, W) row by row, no class token; of a
    # tower with a cache only those that are read
    layers: Sequence[Tensor] | Mapping[int, Tensor] = ()
    attention: Tensor | None = None  # (P,) bool: tokens that show some of their image, not padding; None: all
    # (A, P) rotary positions on A axes, counted from the image's first token; None: one axis, in the order of tokens
    offsets: Tensor | None = None
    # (P, H) each: what the language model adds to the states of image tokens after its first layers (deepstack)
    deepstack: tuple[Tensor, ...] = ()

    def index(self, ids: Tensor, row_image: Tensor) -> Tensor:
        """(R, L) ids, (R,) image of each row -> (R, L): which image token stands at a position, -1 for none.

        Raises a ValueError where a row has another number of image positions than its image has tokens.
        """
        is_image = ids == IMAGE_ID
        per_row = is_image.sum(1)
        counts = torch.tensor(self.counts, device=ids.device)
        wanted = counts[row_image]
        if not bool(((per_row == 0) | (per_row == wanted)).all()):
            raise ValueError(f"rows hold {per_row.tolist()} image positions, their images have {wanted.tolist()}")
        start = (counts.cumsum(0) - counts)[row_image]
        return (start[:, None] + is_image.cumsum(1) - 1).masked_fill(~is_image, -1)


@dataclass
class States:
    """(..., H) states of the language model: those after its final norm, which logits are made of, and those that mask
    prompts are read from, which are the same unless `read_unnormed`."""

    final: Tensor
    read: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> States:
        final = change(self.final)
        return States(final, final if self.read is self.final else change(self.read))


@dataclass
class Generated:
    """Greedy continuations of R rows."""

    ids: list[list[int]]  # new ids per row, up to and including the end token
    states: Tensor  # (R, T, H): the state (`States.read`) that predicted each new token


class VisionLanguageModel(nn.Module):
    """Reads images and conversations. Its weights are named `vlm.*` in a SegModel.

    In `ids` (R, L) an image is P consecutive IMAGE_ID, so that ids and hidden states have equal length and no row of
    the vocabulary stands for the image.
    """

    NAME: ClassVar[str]  # the class's own name in VLMS
    LICENCE: ClassVar[str] = "as the weights that it started from say"  # usual of the family's weights, for model cards
    WEIGHT_NAMES: ClassVar[list[Pair]]  # names on disk, in every layout that can be read, and ours (`vlm.*`)
    FOLDER_NAMES: ClassVar[list[Pair]]  # the one of these layouts in which the project writes its own folders
    EMBEDDING: ClassVar[str]  # our name of the embedding, one row per token
    LM_HEAD: ClassVar[str]  # and of the output layer, if its rows are separate
    SIZE_KEYS: ClassVar[SizeKeys]  # of `size_sections`
    TOWER_FIELDS: ClassVar[frozenset[str]]  # fields of `model.tower` in a recipe that it reads; others are refused
    KEEPS_LAYERS: ClassVar[bool] = True  # `Vision.layers` is there, for mask heads that have no encoder of their own
    FAMILY: ClassVar[TokenizerFamily]  # of the bases' tokenizers, where their files are not at hand (planning)
    RELEASED: ClassVar[dict[str, dict[str, Any]]] = {}  # part of a base's name -> sizes as in its `config.json`
    LIGER: ClassVar[str | None] = None  # Liger's function that replaces kernels of `language`, if it has one

    language: PreTrainedModel  # a causal language model: get_input_embeddings(), lm_head
    view: LanguageView  # makes the pixels that `encode_images` takes
    # Whether a mask alone decides which earlier positions are visible to a token, so that rows can share a sequence or
    # a prefix; not so with linear attention or sliding windows
    packs: bool = True
    draft_tokens: int = 32  # of an answer, drafted and verified in one pass, at most (model/vlm/draft.py); 0: none
    read_unnormed: bool = False  # mask prompts are read from the states before the final norm (TokenSpec.norm)

    @classmethod
    def config_for(
        cls, source: WeightSource, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Any], LanguageView]:
        """The configuration (plain values, see `build`) of the model that `source` holds, and its view.

        Completes `source` in place: reads parts that lie in folders of their own, drops what `config` replaces, and
        lists in `source.fresh` what is to be initialised instead. Raises a ValueError that names the file where
        `config.json` does not describe a model of this family.
        """
        raise NotImplementedError

    @classmethod
    def build(
        cls, config: dict[str, Any], attention: str = "sdpa", view: LanguageView | None = None
    ) -> VisionLanguageModel:
        """An uninitialised model of that configuration. attention: of the language model. view: None for the usual
        one of these sizes."""
        raise NotImplementedError

    @classmethod
    def sizes(cls, config: dict[str, Any]) -> BackboneSizes:
        raise NotImplementedError

    @classmethod
    def size_sections(cls, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The sizes in a configuration, by the section of `config.json` that gives them; `bounds` compares them with
        the weights before a model is built."""
        raise NotImplementedError

    @classmethod
    def check_config(cls, config: dict[str, Any], where: str) -> None:
        """Raises a ValueError that names `where` if a configuration contradicts itself."""

    @classmethod
    def config_json(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of our `config.json`, and what the backbone adds to the project's section of it."""
        raise NotImplementedError

    @classmethod
    def view_of(cls, values: dict[str, Any], config: ModelConfig) -> LanguageView:
        """The view from `config.json` and a recipe alone, without weights: its tokens count, its statistics may be the
        usual ones. Raises an OSError, ValueError or KeyError where they do not say."""
        raise NotImplementedError

    @classmethod
    def planned(
        cls, values: dict[str, Any], config: ModelConfig, added: int
    ) -> tuple[dict[str, Any], LanguageView | None]:
        """The configuration of a base without its weights, and its view (None: the usual one), to plan its memory:
        from its `config.json`, of which `RELEASED` stands in, or, where `values` is empty, from `config.version`.

        added: tokens beyond the base's vocabulary."""
        raise NotImplementedError

    @classmethod
    def published_names(cls, config: dict[str, Any]) -> list[Pair]:
        """Names in the layout of released checkpoints, and ours."""
        raise NotImplementedError

    @classmethod
    def check_published(cls, config: dict[str, Any]) -> None:
        """Raises a ValueError if released checkpoints have no fields for what this configuration says."""

    @classmethod
    def published_json(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The fields of a released `config.json` that give sizes."""
        raise NotImplementedError

    def write_published_parts(self, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """Takes from `tensors` (published names) what a released checkpoint keeps outside its weight files, and writes
        it where the checkpoint will look for it. Returns the fields of `config.json` that say where."""
        return {}

    def licences(self) -> list[str]:
        """Of its parts, as LICENCE."""
        return [self.LICENCE]

    def write_view(self, folder: Path) -> None:
        """Writes the file from which `config_for` and transformers read `view`."""
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        """H, the width of the language model."""
        raise NotImplementedError

    @property
    def attention_implementation(self) -> str:
        """Of the language model: eager, flash_attention_2, or sdpa (`causal_strips` where a CPU takes it in strips)."""
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
        """Pixels of `view`, joined as in `Batch.pixels` -> Vision; each image once, whatever the number of its rows.

        geometry: of the B images; their original sizes say how `view` shows them."""
        raise NotImplementedError

    def forward(self, ids: Tensor, attention: Tensor, vision: Vision, row_image: Tensor) -> States:
        """(R, L) ids, (R, L) bool attention, (R,) image of each row -> (R, L, H) states."""
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        raise NotImplementedError

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
        """Greedy continuations of left-padded prompts; each row stops at its own `eos`.

        past: of a single row, which resumes from it and adds to it what it reads: the prompt, and all new tokens but
        the last. It stays valid whatever interrupts the generation. on_token: called with each new token of a single
        row as soon as it is there.
        """
        raise NotImplementedError

    @property
    def most_positions(self) -> int:
        """Positions, those of the image included, that the language model was made for."""
        raise NotImplementedError

    def use_cache(self, settings: CacheConfig, levels: Sequence[int]) -> None:
        """Keeps what is read of a frozen tower on disk: `levels` of `Vision.layers`, for the mask head, and what the
        image tokens are made of. The weights must be final and on their device. Only where KEEPS_LAYERS."""
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
