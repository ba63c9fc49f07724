"""Weight names of SAM: upstream's (`sam_vit_*.pth`, published assistants) and Hugging Face's, to our three parts.

Ours are `encoder`, `prompts` and `decoder`, with the names of transformers inside. Sizes come from the tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoints.name_table import Pair, under
from model.checkpoints.size_keys import SizeKeys
from model.heads.promptable import rename
from utils.plain import read_mapping

SAM_SIZE_KEYS = SizeKeys(
    widths=frozenset(
        {
            "hidden_size",
            "mlp_dim",
            "num_attention_heads",
            "num_channels",
            "output_channels",
            "patch_size",
            "window_size",
            "num_pos_feats",
            "mask_input_channels",
            "iou_head_hidden_dim",
            "attention_downsample_rate",
        }
    ),
    counts=frozenset({"num_hidden_layers", "num_multimask_outputs", "num_point_embeddings"}),
    others=frozenset({"image_size", "global_attn_indexes", "layer_norm_eps"}),
    parts=("vision_config", "prompt_encoder_config", "mask_decoder_config"),
)

_RELEASED = {  # width, layers, heads, layers with global attention
    "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit_b": (768, 12, 12, (2, 5, 8, 11)),
}
SAM_RELEASED: dict[str, dict[str, Any]] = {
    name: {
        "vision_config": {
            "hidden_size": width,
            "mlp_dim": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "global_attn_indexes": list(global_layers),
        }
    }
    for name, (width, layers, heads, global_layers) in _RELEASED.items()
}

MLP_NAMES: list[Pair] = [("layers.0.*", "proj_in.*"), ("layers.1.*", "layers.0.*"), ("layers.2.*", "proj_out.*")]

SAM_NAMES: list[Pair] = [
    ("image_encoder.pos_embed", "encoder.pos_embed"),
    ("image_encoder.patch_embed.proj.*", "encoder.patch_embed.projection.*"),
    ("image_encoder.blocks.#.norm#.*", "encoder.layers.#.layer_norm#.*"),
    ("image_encoder.blocks.*", "encoder.layers.*"),
    ("image_encoder.neck.0.*", "encoder.neck.conv1.*"),
    ("image_encoder.neck.1.*", "encoder.neck.layer_norm1.*"),
    ("image_encoder.neck.2.*", "encoder.neck.conv2.*"),
    ("image_encoder.neck.3.*", "encoder.neck.layer_norm2.*"),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "prompts.shared_embedding.positional_embedding"),
    ("prompt_encoder.point_embeddings.#.*", "prompts.point_embed.#.*"),
    ("prompt_encoder.mask_downscaling.0.*", "prompts.mask_embed.conv1.*"),
    ("prompt_encoder.mask_downscaling.1.*", "prompts.mask_embed.layer_norm1.*"),
    ("prompt_encoder.mask_downscaling.3.*", "prompts.mask_embed.conv2.*"),
    ("prompt_encoder.mask_downscaling.4.*", "prompts.mask_embed.layer_norm2.*"),
    ("prompt_encoder.mask_downscaling.6.*", "prompts.mask_embed.conv3.*"),
    ("prompt_encoder.*", "prompts.*"),
    ("mask_decoder.transformer.layers.#.norm#.*", "decoder.transformer.layers.#.layer_norm#.*"),
    ("mask_decoder.transformer.norm_final_attn.*", "decoder.transformer.layer_norm_final_attn.*"),
    ("mask_decoder.output_upscaling.0.*", "decoder.upscale_conv1.*"),
    ("mask_decoder.output_upscaling.1.*", "decoder.upscale_layer_norm.*"),
    ("mask_decoder.output_upscaling.3.*", "decoder.upscale_conv2.*"),
    *under(MLP_NAMES, "mask_decoder.output_hypernetworks_mlps.#.", "decoder.output_hypernetworks_mlps.#."),
    *under(MLP_NAMES, "mask_decoder.iou_prediction_head.", "decoder.iou_prediction_head."),
    ("mask_decoder.*", "decoder.*"),
]

_HUGGING_FACE = [
    ("shared_image_embedding.positional_embedding", "prompts.shared_embedding.positional_embedding"),
    ("vision_encoder.*", "encoder.*"),
    ("prompt_encoder.*", "prompts.*"),
    ("mask_decoder.*", "decoder.*"),
]


def rename_sam(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a SAM file or folder under our names; a name that is neither layout's raises."""
    hugging_face = any(name.startswith("vision_encoder.") for name in tensors)
    return rename(tensors, _HUGGING_FACE if hugging_face else SAM_NAMES, "sam")


def sam_sizes(tensors: dict[str, Tensor], decoder_heads: int) -> dict[str, dict[str, Any]]:
    """`SamConfig`'s three parts for weights under our names, from their shapes; only `decoder_heads` is in none."""
    try:
        vision, prompts = _vision(tensors), _prompts(tensors)
        mlp = tensors["decoder.transformer.layers.0.mlp.lin1.weight"].shape[0]
        # upstream's epsilon; transformers' default is 1e-6
        decoder = mask_decoder_sizes(tensors, decoder_heads, mlp) | {"layer_norm_eps": 1e-5}
    except KeyError as error:
        raise ValueError(f"SAM weights are incomplete: there is no {error.args[0]!r}") from None
    prompts |= {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    return {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}


def folder_decoder_heads(path: str | Path) -> int | None:
    """The decoder's number of heads where the `config.json` of a Hugging Face SAM folder gives it."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    decoder = read_mapping(file).get("mask_decoder_config") or {}
    return decoder.get("num_attention_heads") if isinstance(decoder, dict) else None


def _vision(tensors: dict[str, Tensor]) -> dict[str, Any]:
    patches, grid = tensors["encoder.patch_embed.projection.weight"], tensors["encoder.pos_embed"].shape[1]
    width, _, _, patch = patches.shape
    depth = 1 + max(int(n) for name in tensors for n in re.findall(r"^encoder\.layers\.(\d+)\.", name))
    # a layer's table of relative positions has 2 s - 1 rows for a window of side s; one as wide as the grid is global
    spans = [(tensors[f"encoder.layers.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    return {
        "hidden_size": width,
        "output_channels": tensors["encoder.neck.conv1.weight"].shape[0],
        "num_hidden_layers": depth,
        "num_attention_heads": width // tensors["encoder.layers.0.attn.rel_pos_h"].shape[1],
        "image_size": grid * patch,
        "patch_size": patch,
        "mlp_dim": tensors["encoder.layers.0.mlp.lin1.weight"].shape[0],
        "window_size": min(spans),
        "global_attn_indexes": [i for i, span in enumerate(spans) if span == grid],
        "num_pos_feats": tensors["prompts.shared_embedding.positional_embedding"].shape[1],
    }


def _prompts(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "hidden_size": tensors["prompts.no_mask_embed.weight"].shape[1],
        "mask_input_channels": tensors["prompts.mask_embed.conv2.weight"].shape[0],
        "num_point_embeddings": sum(name.startswith("prompts.point_embed.") for name in tensors),
    }


def mask_decoder_sizes(tensors: dict[str, Tensor], heads: int, mlp: int) -> dict[str, Any]:
    """Of the mask decoder of SAM 1 to 3. heads, mlp: of its attention, the width of its MLP."""
    tokens = tensors["decoder.mask_tokens.weight"]
    # SAM's cross attention runs at a fraction of the width (2 at ViT-H): the ratio is in the shapes, the heads are not
    narrow = tensors["decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight"].shape[0]
    if narrow % heads:
        raise ValueError(
            f"model.head_options.decoder_heads={heads} does not divide the mask decoder's attention width {narrow}"
        )
    layers = {number for name in tensors for number in re.findall(r"^decoder\.transformer\.layers\.(\d+)\.", name)}
    return {
        "hidden_size": tokens.shape[1],
        "mlp_dim": mlp,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "attention_downsample_rate": tokens.shape[1] // narrow,
        "num_multimask_outputs": tokens.shape[0] - 1,
        "iou_head_hidden_dim": tensors["decoder.iou_prediction_head.proj_in.weight"].shape[0],
    }
