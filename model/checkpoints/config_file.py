"""Reading a folder's `config.json`, which says what its weights are."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from model.checkpoints.files import whole_model_hint
from utils.plain import read_mapping
from utils.renamed import find_config

SECTION = (
    "segmentation"  # our own section of config.json; the other fields are those of the family's Hugging Face class
)

QWEN_TEXT_KEYS = (  # of the configuration of a Qwen's text model, whatever stands around it
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("attention_bias", "attention_dropout", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder as plain values. A missing file raises a FileNotFoundError."""
    file = folder / "config.json"
    if not file.is_file():
        have = ", ".join(sorted(item.name for item in folder.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"{folder} is no model folder: it has no config.json, only {have}{whole_model_hint(folder)}"
        )
    values = read_mapping(file)
    for key in (SECTION, "text_config", "vision_config"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"{file}: {key} must be a mapping, got {values[key]!r}")
    return values


def saved_head(values: dict[str, Any]) -> str | None:
    """The mask head of a finished folder that the project wrote; None for a base or a published folder."""
    name = values.get(SECTION, {}).get("head")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"config.json: {SECTION}.head must be the name of a mask head, got {name!r}")
    return name


def class_names(values: dict[str, Any]) -> set[str]:
    """The classes that a `config.json` names for its weights, of some releases in `text_config` or in `auto_map` alone.
    They are names: no code of a folder is ever run."""
    places = [values.get("architectures"), values.get("text_config", {}).get("architectures")]
    mapped = values.get("auto_map")
    if isinstance(mapped, dict):
        places.append([str(name).rpartition(".")[2] for name in mapped.values()])
    return {name for names in places if isinstance(names, list) for name in names if isinstance(name, str)}


def image_settings(folder: Path, preprocessor: str | None) -> Path:
    """The recipe's image-processor file (`model.tower.preprocessor`), which must exist, else the folder."""
    place = find_config(preprocessor) if preprocessor else folder
    if preprocessor and not place.exists():
        raise FileNotFoundError(f"model.tower.preprocessor: no file {place}; expected an image-processor JSON")
    return place


def complete(kind: type[PreTrainedConfig], values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of `keys` that a configuration class knows, its defaults written out: the next release of the library
    may have other ones. Older spellings of the rotation (rope_theta, rope_scaling) become `rope_parameters`."""
    # the class completes the mapping of the rotation in place
    given: dict[str, Any] = {key: values[key] for key in keys if values.get(key) is not None}
    known = kind(**deepcopy(given)).to_dict()
    return {key: known[key] for key in keys if known.get(key) is not None and key not in ("rope_theta", "rope_scaling")}


def whole(value: Any, name: str) -> int:
    """The value of the field `name`; a ValueError unless it is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name} must be a whole number above 0, got {str(value)[:60]}")
    return value


def check_layer_types(text: dict[str, Any], where: str) -> None:
    """Raises where a Qwen language model's sizes name another number of kinds of layers than there are layers."""
    types = text.get("layer_types")
    if types is not None and len(types) != text["num_hidden_layers"]:
        raise ValueError(f"{where}: layer_types has {len(types)} entries for {text['num_hidden_layers']} layers")
