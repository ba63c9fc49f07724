"""Weight names of SAM 2.0 and 2.1: upstream's (`sam2*.pt`, published assistants) and Hugging Face's, to our parts.

Ours are `encoder`, `prompts`, `decoder` and `no_memory_embedding`, with the names of transformers inside. Sizes come
from the tensors; heads, windows and global attention of the encoder are in no shape and come from the released sizes,
from a folder's `config.json`, or from `model.head_options.sizes`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from model.checkpoints.name_table import NameTable, Pair, under
from model.checkpoints.size_keys import SizeKeys
from model.heads.sam_weights import MLP_NAMES, mask_decoder_sizes
from utils.config import merge

DECODING = "decoding"  # a section of the configuration: sam2.Decoding
TRUNK, NECK, PROMPTS, DECODER = "backbone_config", "vision_config", "prompt_encoder_config", "mask_decoder_config"
_HIERA = {  # width, blocks per stage, heads of the first stage, blocks with global attention, windows, background
    "hiera_large": (144, (2, 6, 36, 4), 2, (23, 33, 43), (8, 4, 16, 8), 7),
    "hiera_base_plus": (112, (2, 3, 16, 3), 2, (12, 16, 20), (8, 4, 14, 7), 14),
    "hiera_small": (96, (1, 2, 11, 2), 1, (7, 10, 13), (8, 4, 14, 7), 7),
    "hiera_tiny": (96, (1, 2, 7, 2), 1, (5, 7, 9), (8, 4, 14, 7), 7),
}
_STAGES = 4
_MLP_RATIO = 4
_PROMPT_PATCH = 16  # pixels per cell of the coarsest level

SAM2_SIZE_KEYS = SizeKeys(
    widths=frozenset(
        {
            "hidden_size",
            "embed_dim_per_stage",
            "num_attention_heads_per_stage",
            "window_size_per_stage",
            "window_positional_embedding_background_size",
            "fpn_hidden_size",
            "mask_input_channels",
            "mlp_dim",
            "num_attention_heads",
            "attention_downsample_rate",
            "iou_head_hidden_dim",
            "patch_size",
        }
    ),
    counts=frozenset({"blocks_per_stage", "num_hidden_layers", "num_multimask_outputs", "num_point_embeddings"}),
    others=frozenset(
        {"image_size", "global_attention_blocks", "masks", "not_a_point_tokens", "resize", "resample", "reject"}
    ),
    parts=(TRUNK, NECK, PROMPTS, DECODER, DECODING),
)

PROMPT_NAMES: list[Pair] = [
    (
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompts.shared_embedding.positional_embedding",
    ),
    ("sam_prompt_encoder.point_embeddings.#.*", "prompts.point_embed.#.*"),
    ("sam_prompt_encoder.mask_downscaling.0.*", "prompts.mask_embed.conv1.*"),
    ("sam_prompt_encoder.mask_downscaling.1.*", "prompts.mask_embed.layer_norm1.*"),
    ("sam_prompt_encoder.mask_downscaling.3.*", "prompts.mask_embed.conv2.*"),
    ("sam_prompt_encoder.mask_downscaling.4.*", "prompts.mask_embed.layer_norm2.*"),
    ("sam_prompt_encoder.mask_downscaling.6.*", "prompts.mask_embed.conv3.*"),
    ("sam_prompt_encoder.*", "prompts.*"),
]
DECODER_NAMES: list[Pair] = [
    ("sam_mask_decoder.transformer.layers.#.norm#.*", "decoder.transformer.layers.#.layer_norm#.*"),
    ("sam_mask_decoder.transformer.layers.#.mlp.layers.0.*", "decoder.transformer.layers.#.mlp.proj_in.*"),
    ("sam_mask_decoder.transformer.layers.#.mlp.layers.1.*", "decoder.transformer.layers.#.mlp.proj_out.*"),
    ("sam_mask_decoder.transformer.norm_final_attn.*", "decoder.transformer.layer_norm_final_attn.*"),
    *(
        (f"sam_mask_decoder.transformer.{place}.out_proj.*", f"decoder.transformer.{place}.o_proj.*")
        for place in (
            "layers.#.self_attn",
            "layers.#.cross_attn_token_to_image",
            "layers.#.cross_attn_image_to_token",
            "final_attn_token_to_image",
        )
    ),
    ("sam_mask_decoder.output_upscaling.0.*", "decoder.upscale_conv1.*"),
    ("sam_mask_decoder.output_upscaling.1.*", "decoder.upscale_layer_norm.*"),
    ("sam_mask_decoder.output_upscaling.3.*", "decoder.upscale_conv2.*"),
    *under(MLP_NAMES, "sam_mask_decoder.output_hypernetworks_mlps.#.", "decoder.output_hypernetworks_mlps.#."),
    *under(MLP_NAMES, "sam_mask_decoder.iou_prediction_head.", "decoder.iou_prediction_head."),
    *under(MLP_NAMES, "sam_mask_decoder.pred_obj_score_head.", "decoder.pred_obj_score_head."),
    ("sam_mask_decoder.*", "decoder.*"),
]
SAM2_NAMES: list[Pair] = [
    ("image_encoder.trunk.patch_embed.proj.*", "encoder.backbone.patch_embed.projection.*"),
    ("image_encoder.trunk.blocks.#.norm#.*", "encoder.backbone.blocks.#.layer_norm#.*"),
    ("image_encoder.trunk.blocks.#.mlp.layers.0.*", "encoder.backbone.blocks.#.mlp.proj_in.*"),
    ("image_encoder.trunk.blocks.#.mlp.layers.1.*", "encoder.backbone.blocks.#.mlp.proj_out.*"),
    ("image_encoder.trunk.*", "encoder.backbone.*"),
    ("image_encoder.neck.convs.#.conv.*", "encoder.neck.convs.#.*"),
    ("no_mem_embed", "no_memory_embedding"),
    *PROMPT_NAMES,
    *DECODER_NAMES,
]
SAM2_MEMORY = (  # of videos, in the names of upstream, then of Hugging Face
    *("memory_attention.*", "memory_encoder.*", "mask_downsample.*", "maskmem_tpos_enc", "no_mem_pos_enc"),
    *("no_obj_ptr", "obj_ptr_proj.*", "obj_ptr_tpos_proj.*", "no_obj_embed_spatial"),
    *("memory_temporal_positional_encoding", "no_memory_positional_encoding", "no_object_pointer"),
    *("object_pointer_proj.*", "temporal_positional_encoding_projection_layer.*"),
    "occlusion_spatial_embedding_parameter",
)
SAM2_HUGGING_FACE: list[Pair] = [
    ("vision_encoder.backbone.patch_embed.*", "encoder.backbone.patch_embed.*"),
    ("vision_encoder.backbone.blocks.*", "encoder.backbone.blocks.*"),
    ("vision_encoder.backbone.pos_embed", "encoder.backbone.pos_embed"),
    ("vision_encoder.backbone.pos_embed_window", "encoder.backbone.pos_embed_window"),
    ("vision_encoder.neck.convs.*", "encoder.neck.convs.*"),
]
SHARED_HUGGING_FACE: list[Pair] = [
    ("shared_image_embedding.positional_embedding", "prompts.shared_embedding.positional_embedding"),
    ("prompt_encoder.*", "prompts.*"),
    ("mask_decoder.*", "decoder.*"),
    ("no_memory_embedding", "no_memory_embedding"),
]


def released_sizes() -> dict[str, dict[str, Any]]:
    """The four released sizes, the largest first."""
    return {
        name: {
            TRUNK: {
                "hidden_size": width,
                "blocks_per_stage": list(blocks),
                "embed_dim_per_stage": [width * 2**stage for stage in range(_STAGES)],
                "num_attention_heads_per_stage": [heads * 2**stage for stage in range(_STAGES)],
                "window_size_per_stage": list(windows),
                "global_attention_blocks": list(global_blocks),
                "window_positional_embedding_background_size": [background, background],
            },
            NECK: {"fpn_hidden_size": 256},
            PROMPTS: {"hidden_size": 256, "image_size": 1024, "patch_size": _PROMPT_PATCH},
            DECODER: {"hidden_size": 256},
        }
        for name, (width, blocks, heads, global_blocks, windows, background) in _HIERA.items()
    }


def without(tensors: dict[str, Tensor], patterns: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors whose names match none of the patterns."""
    unused = NameTable((pattern, pattern) for pattern in patterns)
    return {name: tensor for name, tensor in tensors.items() if unused.to_model(name) is None}


def split_points(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Hugging Face's names (below `prefix`) with upstream's layout of point embeddings, one tensor each, and without
    the second copy of the positions' frequencies."""
    tensors = dict(tensors)
    if f"{prefix}shared_image_embedding.positional_embedding" in tensors:
        tensors.pop(f"{prefix}prompt_encoder.shared_embedding.positional_embedding", None)
    points = tensors.pop(f"{prefix}prompt_encoder.point_embed.weight", None)
    if points is not None:
        rows = enumerate(points.clone())
        tensors |= {f"{prefix}prompt_encoder.point_embed.{index}.weight": row[None] for index, row in rows}
    return tensors


def sam2_sizes(tensors: dict[str, Tensor], sizes: dict[str, Any], decoder_heads: int) -> dict[str, Any]:
    """The configuration of weights under our names. sizes: sections that say what no shape shows."""
    try:
        trunk, neck = _trunk(tensors), {"fpn_hidden_size": tensors["encoder.neck.convs.0.weight"].shape[0]}
        found = {TRUNK: trunk, NECK: neck, **prompt_and_decoder_sizes(tensors, sizes, decoder_heads)}
    except KeyError as error:
        raise ValueError(f"SAM2 weights are incomplete: there is no {error.args[0]!r}") from None
    found[PROMPTS] |= {"image_size": 1024, "patch_size": _PROMPT_PATCH}
    released = (size[TRUNK] for size in released_sizes().values())
    same = ("hidden_size", "blocks_per_stage")
    known = next((size for size in released if all(size[key] == trunk[key] for key in same)), {})
    config = merge({**found, TRUNK: {**known, **trunk}}, sizes)
    hidden = ("num_attention_heads_per_stage", "window_size_per_stage", "global_attention_blocks")
    if missing := [key for key in hidden if key not in config[TRUNK]]:
        raise ValueError(
            f"SAM2 has no released size with a trunk of width {trunk['hidden_size']} and "
            f"{'-'.join(map(str, trunk['blocks_per_stage']))} blocks, and no shape shows {', '.join(missing)}: "
            f"give them in model.head_options.sizes.{TRUNK}"
        )
    return config


def prompt_and_decoder_sizes(tensors: dict[str, Tensor], sizes: dict[str, Any], heads: int) -> dict[str, Any]:
    """The sections of prompt encoder and mask decoder, which SAM 2 and SAM 3 share."""
    heads = sizes.get(DECODER, {}).get("num_attention_heads", heads)
    prompts = {
        "hidden_size": tensors["prompts.no_mask_embed.weight"].shape[1],
        "mask_input_channels": tensors["prompts.mask_embed.conv2.weight"].shape[0],
        "num_point_embeddings": sum(name.startswith("prompts.point_embed.") for name in tensors),
    }
    layer = "decoder.transformer.layers.0."
    decoder = mask_decoder_sizes(tensors, heads, tensors[f"{layer}mlp.proj_in.weight"].shape[0])
    return {PROMPTS: prompts, DECODER: decoder}


def _trunk(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the shapes say: a stage begins where a block has a projection of its input to another width."""
    count = 1 + max(
        (int(n) for name in tensors for n in re.findall(r"^encoder\.backbone\.blocks\.(\d+)\.", name)), default=0
    )
    widths = [tensors[f"encoder.backbone.blocks.{block}.attn.proj.weight"].shape[0] for block in range(count)]
    stages = list(dict.fromkeys(widths))
    background = tensors["encoder.backbone.pos_embed"].shape[2:]
    return {
        "hidden_size": widths[0],
        "blocks_per_stage": [widths.count(width) for width in stages],
        "embed_dim_per_stage": stages,
        "window_positional_embedding_background_size": list(background),
    }
