"""SAM 2 as the mask head: three levels of a Hiera encoder, K text prompts per mask, scores of each mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Sam2VisionConfig, Sam2VisionModel
from transformers.models.sam2.configuration_sam2 import (
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2PromptEncoderConfig,
)
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder, Sam2PromptEncoder

from data.views import IMAGENET_MEAN, IMAGENET_STD, Resample, SquareView
from model.checkpoints.files import read_tensors
from model.checkpoints.name_table import Pair, under
from model.embedding_cache import EmbeddingCache
from model.heads.base import HEADS, HeadContext
from model.heads.doubling import to_cells
from model.heads.promptable import Levels, Options, PromptableHead, rename
from model.heads.sam2_weights import (
    DECODER,
    DECODING,
    NECK,
    PROMPTS,
    SAM2_HUGGING_FACE,
    SAM2_MEMORY,
    SAM2_NAMES,
    SAM2_SIZE_KEYS,
    SHARED_HUGGING_FACE,
    TRUNK,
    released_sizes,
    sam2_sizes,
    split_points,
    without,
)
from model.heads.sam_decoder import Sam2CellDecoder, of_queries
from utils.config import CacheConfig, from_dict, merge
from utils.log import log
from utils.plain import read_mapping

MOST_POINTS = 16
REJECTED = -1024.0  # the logit everywhere in a rejected mask
PUBLISHED = (
    "grounding_encoder.sam2_model.",
    "sam2.",
)  # where Sa2VA and UniPixel keep SAM 2 (sa2va.md 2.2, unipixel.md 1)

# UniPixel's prompts of regions and frames next to it, which no question about an image uses (unipixel.md 1)
PUBLISHED_REGIONS = tuple(
    f"{part}.*"
    for part in (
        "ref_encoder",
        "ref_proj",
        "ref_proj_single",
        "ref_proj_double",
        "msk_proj",
        "tem_pe",
        "tem_emb",
        "tem_proj",
    )
)


@dataclass(frozen=True)
class Decoding:
    """How masks are decoded: part of the configuration of a finished head; a recipe's options override it."""

    # Mask tokens: the first; or of the three others the one with the highest IoU estimate (sa2va.md 2.4, unipixel.md 4)
    masks: Literal["single", "best_of_three"] = "single"
    not_a_point_tokens: int = 0  # "not a point" embeddings before the text prompt (Sa2VA and UniPixel: 2)
    # of logits: to the image, or first to the side of the view (Sa2VA)
    resize: Literal["one_step", "two_step"] = "one_step"
    resample: Resample = "bilinear"  # of the view: SAM 2's own and UniPixel's, or pil_bicubic (Sa2VA)
    # object: in evaluation a mask is empty if its object score is not positive (UniPixel; Sa2VA ignores the score)
    reject: Literal["none", "object"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.not_a_point_tokens <= MOST_POINTS:
            raise ValueError(f"not_a_point_tokens must be 0 to {MOST_POINTS}, got {self.not_a_point_tokens}")


@dataclass(frozen=True)
class Sam2Options(Options, Decoding):
    """`model.head_options` of a recipe. The side of the view is `model.image_size`."""

    train_convs: bool = True  # conv_s0 and conv_s1 of the decoder, whose outputs an embedding cache keeps


@HEADS.register("sam2")
class Sam2Head(PromptableHead):
    """SAM 2.0 and 2.1. As published only its decoder trains.

    The stability fallback of the stock decoder is off: it would replace the single mask in evaluation alone, and Sa2VA
    never runs it (sa2va.md 2.4). Memory parts, which videos need, are left out.
    """

    LICENCE = "SAM 2: Apache-2.0"
    WEIGHT_NAMES: ClassVar[list[Pair]] = [pair for prefix in PUBLISHED for pair in under(SAM2_NAMES, prefix, "")]
    IGNORED = (*(prefix + name for prefix in PUBLISHED for name in SAM2_MEMORY), *PUBLISHED_REGIONS)
    FILE_SIGNS = ("image_encoder.trunk.*", "vision_encoder.backbone.blocks.*")
    SIZE_KEYS = SAM2_SIZE_KEYS
    RELEASED = released_sizes()
    OPTIONS = Sam2Options
    LORA_LAYERS = ("qkv",)
    MEAN: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    STD: ClassVar[tuple[float, ...]] = IMAGENET_STD
    STRIDE: ClassVar[int] = 32  # the side of a view is a multiple of it
    PROMPT_PARTS: ClassVar[tuple[Any, Any]] = (Sam2PromptEncoderConfig, Sam2PromptEncoder)
    DECODER_PARTS: ClassVar[tuple[Any, Any]] = (Sam2MaskDecoderConfig, Sam2MaskDecoder)

    def __init__(self, encoder: Any, prompts: Any, decoder: Any, side: int, decoding: Decoding):
        super().__init__()
        self.encoder = encoder
        self.prompts = prompts
        self.decoder = decoder
        # of the first frame of a video, which an image is: added to the coarsest level
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, 1, prompts.hidden_size))
        self.side = side
        self.decoding = decoding

    @classmethod
    def check_options(cls, options: dict[str, Any], side: int | None) -> None:
        super().check_options(options, side)
        if side is not None and side % cls.STRIDE:
            raise ValueError(f"model.image_size {side} must be a multiple of {cls.STRIDE} for this mask head")

    @classmethod
    def sizes_of(cls, tensors: dict[str, Tensor], settings: Sam2Options) -> dict[str, Any]:
        return sam2_sizes(tensors, settings.sizes, settings.decoder_heads)

    @classmethod
    def config_for(
        cls, tensors: dict[str, Tensor], options: dict[str, Any], context: HeadContext | None = None
    ) -> dict[str, Any]:
        config = super().config_for(tensors, options, context)
        decoding = {entry.name: options[entry.name] for entry in fields(Decoding) if entry.name in options}
        config[DECODING] = {**config.get(DECODING, {}), **decoding}
        from_dict(Decoding, config[DECODING], f"head_config.{DECODING}")
        if context and context.side:
            config[PROMPTS] = {**config[PROMPTS], "image_size": context.side}
        return config

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> Sam2Head:
        config = deepcopy(config)
        side = config[PROMPTS]["image_size"]
        decoding = from_dict(Decoding, config.get(DECODING, {}), f"head_config.{DECODING}")
        prompt_config = cls.PROMPT_PARTS[0](**config[PROMPTS])
        decoder_config = cls.DECODER_PARTS[0](**config[DECODER], dynamic_multimask_via_stability=False)
        decoder_config._attn_implementation = attention
        prompts = cls.PROMPT_PARTS[1](prompt_config)
        # one tensor each, as upstream's files have them; a text prompt uses none
        width = prompts.hidden_size
        prompts.point_embed = nn.ModuleList(nn.Embedding(1, width) for _ in range(prompt_config.num_point_embeddings))
        decoder = Sam2CellDecoder(cls.DECODER_PARTS[1](decoder_config))
        return cls(cls.build_encoder(config, side, attention), prompts, decoder, side, decoding)

    @classmethod
    def build_encoder(cls, config: dict[str, Any], side: int, attention: str) -> nn.Module:
        trunk = config[TRUNK]
        cells, window = side // 4, trunk["window_size_per_stage"][0]
        if side % cls.STRIDE or cells % window:
            raise ValueError(
                f"model.image_size {side} does not fit this encoder: it must be a multiple of {cls.STRIDE}, and "
                f"a quarter of it of the first window, {window}"
            )
        backbone = Sam2HieraDetConfig(**trunk, image_size=[side, side])
        neck = Sam2VisionConfig(
            backbone_config=backbone, backbone_channel_list=trunk["embed_dim_per_stage"][::-1], **config[NECK]
        )
        return Sam2VisionModel(with_attention(neck, backbone, attention))

    @classmethod
    def read_weights(cls, path: str | Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights of a `sam2*.pt` file or a Hugging Face folder under our names, without those for videos; a folder's
        config also gives what no shape shows."""
        tensors = read_tensors(path)
        kept = without(tensors, SAM2_MEMORY)
        report_unused(path, tensors, kept)
        hugging_face = any(name.startswith("vision_encoder.") for name in kept)
        kept = split_points(kept) if hugging_face else kept
        renamed = rename(kept, SAM2_HUGGING_FACE + SHARED_HUGGING_FACE if hugging_face else SAM2_NAMES, "sam2")
        keys = ("num_attention_heads_per_stage", "window_size_per_stage", "global_attention_blocks")
        return renamed, with_folder_sizes(path, options, {TRUNK: keys, DECODER: ("num_attention_heads",)})

    @property
    def prompt_dim(self) -> int:
        return self.prompts.hidden_size

    @property
    def view(self) -> SquareView:
        return SquareView(self.side, self.MEAN, self.STD, self.decoding.resample)

    @property
    def padded_side(self) -> int | None:
        return self.side if self.decoding.resize == "two_step" else None

    def use_cache(self, settings: CacheConfig) -> None:
        convs = [self.decoder.conv_s0, self.decoder.conv_s1]
        if any(weight.requires_grad for conv in convs for weight in conv.parameters()):
            raise ValueError(
                "model.embedding_cache keeps the outputs of the mask decoder's conv_s0 and conv_s1, which train; set "
                "model.head_options.train_convs=false"
            )
        self.cache = EmbeddingCache.of(nn.ModuleList([self.encoder, *convs]), settings)

    def trainable_parts(self, options: dict[str, Any]) -> Iterable[nn.Module | nn.Parameter]:
        settings = self.settings(options)
        fine = (self.decoder.conv_s0, self.decoder.conv_s1)
        yield from (part for part in self.decoder.children() if settings.train_convs or part not in fine)
        if settings.train_encoder:
            yield from (self.encoder, self.no_memory_embedding)

    def encode(self, pixels: Tensor) -> Levels:
        """Strides 4 and 8, narrowed by the decoder's convolutions, and 16."""
        with self.encoding():
            fine, middle, coarse = self.encoder(pixels).fpn_hidden_states[:3]
        return self.decoder.conv_s0(fine), self.decoder.conv_s1(middle), coarse

    def chunk_decoder(self, levels: Levels) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        finest, middle, coarse = levels
        coarse = coarse + self.no_memory_embedding.to(coarse.dtype).reshape(1, -1, 1, 1)
        points = self.prompts.not_a_point_embed.weight.to(coarse.dtype).expand(self.decoding.not_a_point_tokens, -1)
        cells, positions = to_cells(coarse + self.dense_prompt(levels)), to_cells(self.positions(coarse))
        fine = [to_cells(middle, 1), to_cells(finest, 2)]
        return partial(self._low_resolution, cells, positions, (coarse.shape[-2], coarse.shape[-1]), fine, points)

    def _low_resolution(
        self,
        cells: Tensor,
        positions: Tensor,
        size: tuple[int, int],
        fine: list[Tensor],
        points: Tensor,
        queries: Tensor,
        query_image: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(Q, K, D) -> (Q, 4h, 4w) logits of the coarsest level's h and w, and (Q,) scores: the IoU estimate times the
        probability that the object is there. Each query has its own copy of its image's levels."""
        prompts = torch.cat([points.expand(len(queries), -1, -1), queries], dim=1)
        logits, iou, presence = self.decoder(
            of_queries(cells, query_image),
            positions,
            prompts,
            size,
            several=self.decoding.masks == "best_of_three",
            fine=[of_queries(level, query_image) for level in fine],
        )  # (Q, M, 4h, 4w), (Q, M), (Q,)
        chosen = (torch.arange(len(iou), device=iou.device), iou.argmax(-1))
        logits, scores = logits[chosen], iou[chosen].float() * presence.float().sigmoid()
        if self.decoding.reject == "object" and not self.training:
            logits = logits.masked_fill((presence <= 0)[:, None, None], REJECTED)
        return logits, scores


def with_attention(neck: PretrainedConfig, backbone: PretrainedConfig, attention: str) -> Any:
    """An encoder's configuration with this attention in all its parts."""
    neck._attn_implementation = backbone._attn_implementation = attention
    return neck


def with_folder_sizes(
    path: str | Path, options: dict[str, Any], keys: dict[str, tuple[str, ...]], inner: str = ""
) -> dict[str, Any]:
    """The options, with what the `config.json` of a Hugging Face folder says of `keys`, by section, below the sizes
    that are given in them. inner: the part of the file that is about the head."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return options
    values = read_mapping(file)
    values = values.get(inner) or values
    vision = values.get(NECK)
    sections = {TRUNK: vision.get(TRUNK) if isinstance(vision, dict) else None, DECODER: values.get(DECODER)}
    found = {
        section: {key: given[key] for key in wanted if key in given}
        for section, wanted in keys.items()
        if isinstance(given := sections[section], dict)
    }
    return {**options, "sizes": merge(found, options.get("sizes") or {})}


def report_unused(path: str | Path, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    if unused := len(tensors) - len(kept):
        log.info("%s: %d weights are not of the image side, e.g. the memory of videos; they are left out", path, unused)
