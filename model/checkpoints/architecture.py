"""The sizes of a model, told by `config.json` and by tensor shapes. `model_type: llava` is parsed here, never by
AutoConfig, which reads published flat files as its own nested ones and silently takes defaults (lisa.md 7.4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerBase

from utils.plain import read_mapping
from utils.registry import unknown

SECTION = "segmentation"  # of our own config.json, beside Hugging Face's LLaVA fields
_TOWER_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
_TOWER_KEYS += ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "projection_dim")
_LANGUAGE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
_LANGUAGE_KEYS += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range")
_LANGUAGE_KEYS += ("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "pretraining_tp")


@dataclass(frozen=True)
class Architecture:
    """All sizes: what `assemble` needs beside the weights."""

    language: dict[str, Any]
    tower: dict[str, Any]
    projector_depth: int
    feature_layer: int
    head: str
    head_config: dict[str, Any]
    projector_width: int | None = None  # between its layers; None: the language model's
    tower_input: dict[str, Any] = field(default_factory=dict)  # of the tower (model/tower.py)
    tower_name: str | None = None  # where the tower came from, for folders that do not hold it

    def to_json(self) -> dict[str, Any]:
        """Our `config.json`: Hugging Face's LLaVA fields (its class can read the folder), ours in one section."""
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": {"model_type": "llama", **self.language},
            "vision_config": {"model_type": "clip_vision_model", **self.tower},
            "vision_feature_layer": self.feature_layer,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            SECTION: {
                "head": self.head,
                "head_config": self.head_config,
                "projector_depth": self.projector_depth,
                "sight": self.tower_input,
                "tower_name": self.tower_name,
            },
        }


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder as plain values."""
    file = folder / "config.json"
    if not file.is_file():
        have = ", ".join(sorted(item.name for item in folder.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json, only {have}")
    values = read_mapping(file)
    for key in (SECTION, "text_config", "vision_config"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"{file}: {key} must be a mapping, got {values[key]!r}")
    return values


def language_sizes(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    """LlamaConfig values from a flat (original) or nested (Hugging Face) `config.json`; token ids from the tokenizer,
    for those of published base files are wrong."""
    text = values.get("text_config", values)
    kind = text.get("model_type", "llama")
    if kind not in ("llama", "llava", "llava_llama"):
        raise ValueError(f"{where}: " + unknown("language model", kind, ["llama"]))
    sizes = {key: text[key] for key in _LANGUAGE_KEYS if text.get(key) is not None}
    sizes["bos_token_id"], sizes["eos_token_id"] = tokenizer.bos_token_id, tokenizer.eos_token_id
    sizes["pad_token_id"], sizes["vocab_size"] = tokenizer.pad_token_id, len(tokenizer)
    return _complete(LlamaConfig(**sizes), (*_LANGUAGE_KEYS, *sizes), drop=("rope_theta", "rope_scaling"))


def tower_sizes(values: dict[str, Any]) -> dict[str, Any]:
    """CLIPVisionConfig values from a CLIP `config.json` (whole or vision side) or a LLaVA `vision_config`."""
    vision = values.get("vision_config", values)
    given = {key: vision[key] for key in _TOWER_KEYS if vision.get(key) is not None}
    return _complete(CLIPVisionConfig(**given), _TOWER_KEYS)


def feature_layer(values: dict[str, Any], where: str) -> int:
    """Which hidden state of the tower is projected; only patch features (no class token) are supported."""
    strategy = values.get("vision_feature_select_strategy") or values.get("mm_vision_select_feature") or "patch"
    if strategy not in ("patch", "default"):
        raise ValueError(f"{where}: " + unknown("vision feature selection", strategy, ["patch", "default"]))
    layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", -2))
    if not isinstance(layer, int):
        raise ValueError(f"{where}: one vision feature layer is supported, got {layer!r}")
    return layer


def projector_depth(tensors: dict[str, Tensor], where: str) -> int:
    """1 for a linear projector, N for mlpNx_gelu; told by the weights, not by a field that may be missing."""
    depth = sum(name.startswith("vlm.projector.") and name.endswith(".weight") for name in tensors)
    if not depth:
        raise ValueError(f"{where} has no projector (model.mm_projector.* or multi_modal_projector.*): not a LLaVA")
    return depth


def projector_width(tensors: dict[str, Tensor]) -> int:
    """Between the projector's layers (of a single one: what it gives)."""
    return len(tensors["vlm.projector.0.weight"])


def tower_name(values: dict[str, Any]) -> str | None:
    """The vision tower that a published or original `config.json` names."""
    section = values.get(SECTION, {})
    name = section.get("tower_name") or values.get("mm_vision_tower") or values.get("vision_tower")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"config.json: the vision tower must be a name, got {name!r}")
    return name


def _complete(config: Any, keys: tuple[str, ...], drop: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of `keys` with the library's defaults written out, so that a saved file stands by itself."""
    values = config.to_dict()
    return {key: values[key] for key in dict.fromkeys(keys) if key not in drop and values.get(key) is not None}
