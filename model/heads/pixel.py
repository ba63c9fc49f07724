"""A mask head on the vision tower's features (PixelLM): a codebook of tokens per mask, fused by level, and its own
light decoder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamConfig, SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamLayerNorm, SamPositionalEmbedding, SamPromptEncoder

from data.types import Batch, Geometry
from data.views import LanguageView
from model.checkpoints.name_table import Pair, under
from model.checkpoints.size_keys import SizeKeys
from model.heads.base import HEADS, Decoded, HeadContext, MaskHead, decode_in_chunks, fourier_positions, split_by_image
from model.heads.doubling import to_cells
from model.heads.pixel_decoder import PixelDecoder
from model.heads.sam_weights import MLP_NAMES, SAM_NAMES
from model.vlm.base import Vision
from model.vlm.llava import mlp_projector
from utils.config import from_dict

PROJECTOR_DEPTH = 2  # layers
PROJECTOR_GROWTH = 2  # the width between them, in widths of the language model
NAMES: list[Pair] = [
    ("out_mm_projector.#.*", "projector.#.*"),
    ("image_feature_neck.#.*", "neck.#.*"),
    ("mask_decoder.pe1.positional_encoding_gaussian_matrix", "fine_positions.positional_embedding"),
    ("mask_decoder.transformer.#.layers.#.norm#.*", "decoder.transformer.#.layers.#.layer_norm#.*"),
    ("mask_decoder.transformer.#.norm_final_attn.*", "decoder.transformer.#.layer_norm_final_attn.*"),
    ("mask_decoder.upsample_2x.*", "decoder.grow.*"),
    ("mask_decoder.output_upscaling.*", "decoder.upscale.*"),
    *under(MLP_NAMES, "mask_decoder.output_hypernetworks_mlps.#.", "decoder.output_hypernetworks_mlps.#."),
    *under(MLP_NAMES, "mask_decoder.iou_prediction_head.", "decoder.iou_prediction_head."),
    ("mask_decoder.*", "decoder.*"),
    *(pair for pair in SAM_NAMES if pair[0].startswith("prompt_encoder.")),
]


@dataclass(frozen=True)
class Options:
    """`model.head_options` of a recipe. Sizes are for a new head; a finished one has those of its weights."""

    levels: tuple[int, ...] = (-2, -11)  # hidden states of the tower, decoded in this order
    fusion: Literal["released", "trained"] = "released"  # weights of tokens and levels: constants | starting there
    train_neck: bool = True  # and the no-mask embedding; the release leaves both at their random initialisation
    width: int = 256
    mlp_dim: int = 2048
    decoder_heads: int = 8


@HEADS.register("pixel")
class PixelHead(MaskHead):
    """Levels of tower features, each projected, narrowed, and decoded with its own tokens (pixellm.md 1.6, 1.7).

    A mask has L x T tokens, level by level: with two levels of three tokens, the first three query the first level and
    the last three the second. prompts: SAM's prompt encoder, of which only the no-mask embedding and the positions
    take part; the rest is there because weight files have it.
    """

    WEIGHT_NAMES = under(NAMES, "model.", "")
    SIZE_KEYS = SizeKeys(
        widths=frozenset({"width", "mlp_dim", "heads", "tower_width", "language_width", "projector_width"}),
        counts=frozenset({"tokens"}),
        others=frozenset({"levels", "trained_fusion"}),
    )
    NEEDS_WEIGHTS = False
    READS_TOWER = True
    OPTIONAL_WEIGHTS = ("fusion", "balance")
    view = None
    fusion: nn.Parameter | None  # (L, T) weights of tokens
    balance: nn.Parameter | None  # (L,) weights of levels

    def __init__(self, projector: nn.Module, neck: nn.Module, prompts: SamPromptEncoder, decoder: PixelDecoder):
        super().__init__()
        self.projector = projector
        self.neck = neck
        self.prompts = prompts
        self.decoder = decoder
        self.levels: tuple[int, ...] = ()
        self.tokens = 0
        self.fine_positions = _fourier(prompts.hidden_size)
        prompts.shared_embedding = _fourier(prompts.hidden_size)
        self.register_parameter("fusion", None)
        self.register_parameter("balance", None)

    @classmethod
    def config_for(cls, tensors: dict[str, Tensor], options: dict[str, Any], context: HeadContext) -> dict[str, Any]:
        settings = _options(options)
        trained = settings.fusion == "trained" or "fusion" in tensors
        if context.saved_config:
            return {**context.saved_config, "trained_fusion": trained}
        if not all(-context.tower_layers - 1 <= level <= context.tower_layers for level in settings.levels):
            raise ValueError(
                f"model.head_options.levels {settings.levels}: the tower has {context.tower_layers} layers"
            )
        if len(settings.levels) not in (1, 2) or context.tokens % len(settings.levels):
            raise ValueError(
                f"model.head_options.levels must be 1 or 2 that divide {context.tokens} tokens, got {settings.levels}"
            )
        sizes = {"width": settings.width, "mlp_dim": settings.mlp_dim, "tower_width": context.tower_width}
        sizes |= {
            "language_width": context.language_width,
            "projector_width": PROJECTOR_GROWTH * context.language_width,
        }
        return {
            "levels": list(settings.levels),
            "tokens": context.tokens,
            "heads": settings.decoder_heads,
            "trained_fusion": trained,
            **(_sizes(tensors) if tensors else sizes),
        }

    @classmethod
    def build(cls, config: dict[str, Any], attention: str) -> PixelHead:
        """A head as the release initialises it: torch's own distributions, but for the projector's."""
        width, levels = config["width"], len(config["levels"])
        sam = _sam_config(config, attention)
        head = cls(
            mlp_projector(
                config["tower_width"], config["language_width"], PROJECTOR_DEPTH, config["projector_width"]
            ).apply(_small),
            _neck(config["language_width"], width),
            SamPromptEncoder(sam),
            PixelDecoder(cast(SamMaskDecoderConfig, sam.mask_decoder_config), levels),
        )
        head.levels, head.tokens = tuple(config["levels"]), config["tokens"]
        if config["trained_fusion"]:
            head.fusion = nn.Parameter(torch.full((levels, head.tokens // levels), 1 / head.tokens))
            head.balance = nn.Parameter(torch.full((levels,), 1 / levels))
        return head

    @property
    def prompt_dim(self) -> int:
        return self.prompts.hidden_size

    def check_view(self, language_view: LanguageView) -> None:
        if not language_view.shows_all:
            raise ValueError(
                "this mask head decodes in the vision tower's view, which must show the whole image: set "
                "model.tower.pad=true (--pad_train_clip_images), or a square by model.tower.preprocessor"
            )

    def trainable_parts(self, options: dict[str, Any]) -> Iterable[nn.Module | nn.Parameter]:
        parts: list[nn.Module | nn.Parameter] = [self.projector, self.decoder]
        parts.extend(weight for weight in (self.fusion, self.balance) if weight is not None)
        if _options(options).train_neck:
            parts.extend([self.neck, self.prompts.no_mask_embed])
        return parts

    def features(self, batch: Batch, vision: Vision) -> list[Tensor]:
        """(B, C, h, w) of the first level, and (B, C, 2h, 2w) of each further one."""
        # all levels in one batch: projector and neck are shared
        states = torch.cat([self.projector(vision.layers[level]) for level in self.levels])
        side = math.isqrt(states.shape[1])
        narrow = self.neck(states.transpose(1, 2).unflatten(2, (side, side)))
        first, *rest = narrow.chunk(len(self.levels))
        return [first, *map(self.decoder.enlarge, rest)]

    def decode(
        self, features: list[Tensor], queries: Tensor, query_image: Tensor, geometry: list[Geometry], full: bool = True
    ) -> Decoded:
        """(Q, L * T, D) -> B x (N_b, H_b, W_b) float32 logits, without scores."""
        logits = self._low_resolution(features, queries, query_image)
        # a padded view's side is the longer side of the image in it
        return Decoded(split_by_image(logits, query_image, geometry, [max(place.resized) for place in geometry], full))

    def _low_resolution(self, features: list[Tensor], queries: Tensor, query_image: Tensor) -> Tensor:
        """(Q, L * T, D) -> (Q, 4h, 4w) float32 logits."""
        # Weights are read here, not in the checkpointed function: ZeRO-3 has them gathered in the forward pass only.
        dense = self.prompts.no_mask_embed.weight[0]
        embeddings = [self.prompts.shared_embedding, self.fine_positions][: len(features)]
        positions = [to_cells(fourier_positions(*pair)) for pair in zip(embeddings, features, strict=True)]
        balance = self.balance
        if balance is None:
            balance = queries.new_full((len(features),), 1 / len(features))
        sizes = [(level.shape[-2], level.shape[-1]) for level in features]
        decode = partial(self._decode, list(map(to_cells, features)), positions, sizes, dense, balance.float())
        prompts, size = self.fuse_levels(queries), features[-1][0].nbytes
        return decode_in_chunks(decode, prompts, query_image, size, self.checkpoint_decoder)[0]

    def _decode(
        self,
        cells: list[Tensor],
        positions: list[Tensor],
        sizes: list[tuple[int, int]],
        dense: Tensor,
        balance: Tensor,
        prompts: Tensor,
        query_image: Tensor,
    ) -> tuple[Tensor]:
        """(Q, L, D) -> (Q, 4h, 4w) float32 logits: the weighted sum of all levels', resized to the largest. Coarse to
        fine: each level's logits weigh the features of the next."""
        levels: list[Tensor] = []
        for level, prompt in enumerate(prompts.unbind(1)):
            own, previous = cells[level][query_image], levels[-1] if levels else None
            levels.append(self.decoder(level, own, positions[level], sizes[level], dense, prompt, previous))
        size = levels[-1].shape[-2:]
        resized = [F.interpolate(part[:, None].float(), size, mode="bilinear", align_corners=False) for part in levels]
        first, *others = [weight * part for weight, part in zip(balance, resized, strict=True)]
        return (sum(others, start=first)[:, 0],)

    def fuse_levels(self, queries: Tensor) -> Tensor:
        """(Q, L * T, D) -> (Q, L, D): the weighted sum of the tokens of each level.

        As released a weight is 1 / (L * T), so T equal tokens give 1 / L of one: with two levels of three tokens a sum
        of thirds that is halved, which trained weights rely on. Term by term in the dtype of the states, because bf16
        rounds every partial sum and the release sums in this order.
        """
        groups = queries.unflatten(1, (len(self.levels), -1))
        weights = self.fusion
        if weights is None:
            weights = queries.new_full(groups.shape[1:3], 1 / self.tokens)
        terms = (groups * weights.to(queries.dtype)[..., None]).unbind(2)
        return sum(terms[1:], start=terms[0])


def _options(values: dict[str, Any]) -> Options:
    return from_dict(Options, values, "model.head_options")


def _sizes(tensors: dict[str, Tensor]) -> dict[str, int]:
    """From the shapes of the weights."""
    try:
        return {
            "width": tensors["decoder.mask_tokens.weight"].shape[1],
            "mlp_dim": tensors["decoder.transformer.0.layers.0.mlp.lin1.weight"].shape[0],
            "tower_width": tensors["projector.0.weight"].shape[1],
            "language_width": tensors["projector.2.weight"].shape[0],
            "projector_width": tensors["projector.0.weight"].shape[0],
        }
    except KeyError as error:
        raise ValueError(f"the mask head's weights are incomplete: there is no {error.args[0]!r}") from None


def _sam_config(config: dict[str, Any], attention: str) -> SamConfig:
    width, heads = config["width"], config["heads"]
    if width % (2 * heads):
        raise ValueError(
            f"model.head_options.decoder_heads={heads} does not divide the decoder's attention width {width // 2}"
        )
    decoder = {"hidden_size": width, "mlp_dim": config["mlp_dim"], "num_attention_heads": heads, "layer_norm_eps": 1e-5}
    sam = SamConfig(prompt_encoder_config={"hidden_size": width}, mask_decoder_config=decoder)
    cast(SamMaskDecoderConfig, sam.mask_decoder_config)._attn_implementation = attention
    return sam


def _neck(width: int, out: int) -> nn.Sequential:
    """SAM's neck: from `width` to `out` channels."""
    return nn.Sequential(
        nn.Conv2d(width, out, 1, bias=False),
        SamLayerNorm(out, eps=1e-6, data_format="channels_first"),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        SamLayerNorm(out, eps=1e-6, data_format="channels_first"),
    )


def _fourier(width: int) -> SamPositionalEmbedding:
    return SamPositionalEmbedding(SimpleNamespace(scale=1.0, num_pos_feats=width // 2))


def _small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
