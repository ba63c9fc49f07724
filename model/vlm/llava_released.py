"""The sizes of LLaVAs that recipes name, for planning without the weights: LLaMA and CLIP as released."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.checkpoints.config_file import read_config
from model.vlm.llava_checkpoint import NEW_DEPTH, NEW_GROWTH, LlavaSizes
from model.vlm.tower import fit_tower, own_view, tower_input
from model.vlm.towers import TOWERS, tower_family
from utils.config import ModelConfig

_LANGUAGE = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
_TOWER: dict[str, Any] = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
_TOWER |= {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}
VOCABULARY = 32000  # of LLaMA, without added tokens
LINEAR_PROJECTOR = 1  # layers, in LLaVA v1.0 and v1.1
MLP_PROJECTOR = 2  # layers, in LLaVA v1.5
_LANGUAGE_KEYS = (*_LANGUAGE["7b"], "num_key_value_heads", "vocab_size")


def released_sizes(values: dict[str, Any], config: ModelConfig, added: int) -> LlavaSizes:
    """From the `config.json` of a base, or from its name where that is not at hand (`values` is empty).

    added: tokens beyond the base's vocabulary.
    """
    text = values.get("text_config", values)
    language = {key: text[key] for key in _LANGUAGE_KEYS if text.get(key) is not None}
    language = language or {**_LANGUAGE[size_in(config.version) or "7b"], "vocab_size": VOCABULARY}
    language["vocab_size"] += added
    place, built = _tower(values, config)
    view = tower_input(values, config.tower, TOWERS[built["model_type"]])
    tower = fit_tower(built, {}, view, own_view(place, built, config.tower.preprocessor))
    if config.tower.new_projector:
        projector_depth = NEW_DEPTH
    else:
        projector_depth = MLP_PROJECTOR if "1.5" in config.version else LINEAR_PROJECTOR
    return LlavaSizes(
        language=language,
        tower=tower,
        projector_depth=projector_depth,
        projector_width=NEW_GROWTH * language["hidden_size"] if config.tower.new_projector else None,
        tower_input=asdict(view),
    )


def _tower(values: dict[str, Any], config: ModelConfig) -> tuple[Path, dict[str, Any]]:
    """The folder, and sizes from it or of CLIP ViT-L/14 at the resolution in its name: the base's, or the tower's."""
    folder = Path(config.version if "vision_config" in values else config.vision_tower or "").expanduser()
    if "vision_config" in values or (folder / "config.json").is_file():
        tower = values if "vision_config" in values else read_config(folder)
        return folder, tower_family(tower, str(folder / "config.json")).sizes(tower)
    return folder, {**_TOWER, "image_size": 336 if "336" in (config.vision_tower or config.version) else 224}


def size_in(name: str) -> str | None:
    """The released size of a language model that a base is called by: 7b or 13b."""
    return next((size for size in _LANGUAGE if size in name.lower()), None)
