"""The sizes of the weights that recipes name, for planning without the weights: LLaMA, CLIP and SAM as released."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from model.checkpoints.architecture import Architecture
from model.checkpoints.config_file import SECTION, read_config
from model.checkpoints.load import choose_head, projection_of
from model.heads import HEADS, HeadContext
from model.vlm.llava_checkpoint import NEW_DEPTH, NEW_GROWTH, LlavaSizes, tower_sizes
from model.vlm.tower import fit_tower, tower_input
from utils.config import ModelConfig

_LANGUAGE = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_TOWER |= {"patch_size": 14, "image_size": 224, "projection_dim": 768}
_SAM = {  # width, layers, heads, layers with global attention
    "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit_b": (768, 12, 12, (2, 5, 8, 11)),
}
VOCABULARY = 32000  # of LLaMA, without added tokens
LINEAR_PROJECTOR = 1  # layers, in LLaVA v1.0 and v1.1
MLP_PROJECTOR = 2  # layers, in LLaVA v1.5
_LANGUAGE_KEYS = (*_LANGUAGE["7b"], "num_key_value_heads", "vocab_size")


def released_architecture(config: ModelConfig, head: str, mask_tokens: int, added: int) -> Architecture:
    """The architecture of a recipe's model: from `config.json` where `version` is a local folder, else from its name.

    head: the system's, in HEADS. mask_tokens: per mask. added: tokens beyond the base's vocabulary. A SAM file that is
    not named vit_b, vit_l or vit_h is read where it is at hand.
    """
    folder = Path(config.version)
    values = read_config(folder) if (folder / "config.json").is_file() else {}
    head = choose_head(values, config, head)
    text = values.get("text_config", values)
    language = {key: text[key] for key in _LANGUAGE_KEYS if text.get(key) is not None}
    language = language or {**_LANGUAGE["13b" if "13b" in config.version.lower() else "7b"], "vocab_size": VOCABULARY}
    language["vocab_size"] += added
    view = tower_input(values, config.tower)
    tower = fit_tower(_tower(values, config), {}, view)
    projection = projection_of(config)
    prompts = mask_tokens * projection.prompts
    context = HeadContext(tower["hidden_size"], tower["num_hidden_layers"], language["hidden_size"], tokens=prompts)
    saved_config = values.get(SECTION, {}).get("head_config")
    if not saved_config and head == "sam":
        saved_config = _sam(config.vision_pretrained, context)
    context = replace(context, saved_config=saved_config)
    if config.tower.new_projector:
        projector_depth = NEW_DEPTH
    else:
        projector_depth = MLP_PROJECTOR if "1.5" in config.version else LINEAR_PROJECTOR
    sizes = LlavaSizes(
        language=language,
        tower=tower,
        projector_depth=projector_depth,
        projector_width=NEW_GROWTH * language["hidden_size"] if config.tower.new_projector else None,
        tower_input=asdict(view),
    )
    head_config = HEADS[head].config_for({}, dict(config.head_options), context)
    return Architecture("llava", asdict(sizes), head, head_config, projection)


def _tower(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Sizes from the folder itself, from a CLIP folder, or of CLIP ViT-L/14 at the resolution in its name."""
    if "vision_config" in values:
        return tower_sizes(values)
    folder = Path(config.vision_tower or "")
    if (folder / "config.json").is_file():
        return tower_sizes(read_config(folder))
    return {**_TOWER, "image_size": 336 if "336" in (config.vision_tower or config.version) else 224}


def _sam(name: str | None, context: HeadContext) -> dict[str, Any]:
    """The configuration of a SAM file: by its name, else from its weights, else that of ViT-H."""
    kind = next((kind for kind in _SAM if kind in str(name)), None)
    if kind is None and name and Path(name).exists():
        tensors, options = HEADS["sam"].read_weights(name, {})
        return HEADS["sam"].config_for(tensors, options, context)
    width, layers, heads, global_layers = _SAM[kind or "vit_h"]
    encoder = {"hidden_size": width, "mlp_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"vision_config": {**encoder, "global_attn_indexes": list(global_layers)}}
