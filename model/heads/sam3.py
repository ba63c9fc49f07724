"""SAM 3's tracker as the mask head: SAM 2's decoder on a plain vision transformer, in views of 1008 pixels."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.models.sam3.configuration_sam3 import Sam3VisionConfig, Sam3ViTConfig
from transformers.models.sam3.modeling_sam3 import Sam3VisionModel, Sam3ViTRotaryEmbedding
from transformers.models.sam3_tracker.configuration_sam3_tracker import (
    Sam3TrackerMaskDecoderConfig,
    Sam3TrackerPromptEncoderConfig,
)
from transformers.models.sam3_tracker.modeling_sam3_tracker import Sam3TrackerMaskDecoder, Sam3TrackerPromptEncoder

from model.checkpoints.files import read_tensors
from model.checkpoints.name_table import Pair, under
from model.checkpoints.size_keys import SizeKeys
from model.heads.base import HEADS
from model.heads.promptable import rename
from model.heads.sam2 import Sam2Head, Sam2Options, report_unused, with_attention, with_folder_sizes
from model.heads.sam2_weights import (
    DECODER,
    NECK,
    PROMPTS,
    SAM2_MEMORY,
    SAM2_SIZE_KEYS,
    SHARED_HUGGING_FACE,
    TRUNK,
    prompt_and_decoder_sizes,
    split_points,
    without,
)
from utils.config import merge

SCALES = (4.0, 2.0, 1.0)  # of the neck's levels; a fourth in the files, 0.5, is the detector's
RELEASED = {
    "sam3": {
        TRUNK: {
            "hidden_size": 1024,
            "intermediate_size": 4736,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "pretrain_image_size": 336,
            "window_size": 24,
            "global_attn_indexes": [7, 15, 23, 31],
        },
        NECK: {"fpn_hidden_size": 256},
        PROMPTS: {"hidden_size": 256, "image_size": 1008, "patch_size": 14},
        DECODER: {"hidden_size": 256},
    }
}
_ENCODER: list[Pair] = [
    *((f"backbone.{part}.*", f"encoder.backbone.{part}.*") for part in ("embeddings", "layer_norm", "layers")),
]
_FOLDER: list[Pair] = [  # facebook/sam3, the detector and the tracker in one
    *under(_ENCODER, "detector_model.vision_encoder.", ""),
    ("tracker_neck.fpn_layers.*", "encoder.neck.fpn_layers.*"),
    *under(SHARED_HUGGING_FACE, "tracker_model.", ""),
    # as `Sam3TrackerModel.save_pretrained` of transformers 5.17 writes them
    *under(_ENCODER, "tracker_model.detector_model.vision_encoder.", ""),
    ("tracker_model.tracker_neck.fpn_layers.*", "encoder.neck.fpn_layers.*"),
]
_TRACKER: list[Pair] = [  # the tracker alone
    *under(_ENCODER, "vision_encoder.", ""),
    ("vision_encoder.neck.fpn_layers.*", "encoder.neck.fpn_layers.*"),
    *SHARED_HUGGING_FACE,
]
_FOURTH = f"fpn_layers.{len(SCALES)}.*"


@HEADS.register("sam3")
class Sam3Head(Sam2Head):
    """The tracker of SAM 3, which takes visual prompts, not its text-driven detector.

    The stock `Sam3TrackerModel` adds the no-memory embedding to the last level of its neck. With a neck of four levels
    that is one that no mask sees; here, as in the stock video model, the fourth is dropped first.
    """

    LICENCE = "SAM 3: SAM License"
    WEIGHT_NAMES = _FOLDER
    IGNORED = ("detector_model.*", f"tracker_neck.{_FOURTH}", *(f"tracker_model.{name}" for name in SAM2_MEMORY))
    FILE_SIGNS = ("detector_model.*", "tracker_model.*", "vision_encoder.backbone.layers.*")
    SIZE_KEYS = SizeKeys(
        widths=SAM2_SIZE_KEYS.widths | {"intermediate_size", "window_size"},
        counts=SAM2_SIZE_KEYS.counts,
        others=SAM2_SIZE_KEYS.others | {"global_attn_indexes", "pretrain_image_size"},
        parts=SAM2_SIZE_KEYS.parts,
    )
    RELEASED = RELEASED
    LORA_LAYERS = ("q_proj", "v_proj")
    MEAN = STD = (0.5, 0.5, 0.5)
    STRIDE = 14
    PROMPT_PARTS = (Sam3TrackerPromptEncoderConfig, Sam3TrackerPromptEncoder)
    DECODER_PARTS = (Sam3TrackerMaskDecoderConfig, Sam3TrackerMaskDecoder)

    @classmethod
    def sizes_of(cls, tensors: dict[str, Tensor], settings: Sam2Options) -> dict[str, Any]:
        """Heads and windows of the encoder are in no shape: those of the released size, unless `sizes` says."""
        try:
            trunk = _trunk(tensors)
            neck = {"fpn_hidden_size": tensors["encoder.neck.fpn_layers.0.proj1.weight"].shape[0]}
            shared = prompt_and_decoder_sizes(tensors, settings.sizes, settings.decoder_heads)
        except KeyError as error:
            raise ValueError(f"SAM3 weights are incomplete: there is no {error.args[0]!r}") from None
        released = RELEASED["sam3"][TRUNK]
        hidden = ("num_attention_heads", "window_size", "global_attn_indexes")
        if all(trunk[key] == released[key] for key in ("hidden_size", "num_hidden_layers")):
            trunk |= {key: released[key] for key in hidden}
        shared[PROMPTS] |= {"image_size": 72 * trunk["patch_size"], "patch_size": trunk["patch_size"]}
        config = merge({TRUNK: trunk, NECK: neck, **shared}, settings.sizes)
        if missing := [key for key in hidden if key not in config[TRUNK]]:
            raise ValueError(
                f"SAM3 has no released size of width {trunk['hidden_size']} and {trunk['num_hidden_layers']} layers, "
                f"and no shape shows {', '.join(missing)}: give them in model.head_options.sizes.{TRUNK}"
            )
        return config

    @classmethod
    def build_encoder(cls, config: dict[str, Any], side: int, attention: str) -> nn.Module:
        trunk = config[TRUNK]
        if side % trunk["patch_size"]:
            raise ValueError(
                f"model.image_size {side} must be a multiple of the encoder's patch, {trunk['patch_size']}"
            )
        backbone = Sam3ViTConfig(**trunk, image_size=side)
        neck = Sam3VisionConfig(backbone_config=backbone, scale_factors=list(SCALES), **config[NECK])
        return Sam3VisionModel(with_attention(neck, backbone, attention))

    @classmethod
    def read_weights(cls, path: str | Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tracker's weights of a Hugging Face folder under our names, alone or with the detector."""
        tensors = read_tensors(path)
        whole = any(name.startswith("tracker_model.") for name in tensors)
        kept = {name: tensor for name, tensor in tensors.items() if not whole or not _of_detector(name)}
        kept = without(kept, (*SAM2_MEMORY, *(f"tracker_model.{name}" for name in SAM2_MEMORY), f"*{_FOURTH}"))
        report_unused(path, tensors, kept)
        renamed = rename(split_points(kept, "tracker_model." if whole else ""), _FOLDER if whole else _TRACKER, "sam3")
        keys = ("num_attention_heads", "window_size", "global_attn_indexes")
        sizes = {TRUNK: keys, DECODER: ("num_attention_heads",)}
        return renamed, with_folder_sizes(path, options, sizes, inner="tracker_config")

    def reset_buffers(self) -> None:
        """Positions and frequencies of the rotary embeddings."""
        config, device = self.encoder.config.backbone_config, self.no_memory_embedding.device
        for layer in self.encoder.backbone.layers:
            layer.rotary_emb = Sam3ViTRotaryEmbedding(config).to(device)
            layer.position_ids = layer.precompute_positions(config, layer.window_size).to(device)


def _trunk(tensors: dict[str, Tensor]) -> dict[str, Any]:
    width, _, _, patch = tensors["encoder.backbone.embeddings.patch_embeddings.projection.weight"].shape
    cells = tensors["encoder.backbone.embeddings.position_embeddings"].shape[1]
    layers = {number for name in tensors for number in re.findall(r"^encoder\.backbone\.layers\.(\d+)\.", name)}
    return {
        "hidden_size": width,
        "intermediate_size": tensors["encoder.backbone.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "patch_size": patch,
        "pretrain_image_size": math.isqrt(cells) * patch,
    }


def _of_detector(name: str) -> bool:
    return name.startswith("detector_model.") and not name.startswith("detector_model.vision_encoder.backbone.")
