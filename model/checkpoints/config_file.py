"""Reading a folder's `config.json`, which says what its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.plain import read_mapping

SECTION = (
    "segmentation"  # our own section of config.json; the other fields are those of the family's Hugging Face class
)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder as plain values. A missing file raises a FileNotFoundError."""
    file = folder / "config.json"
    if not file.is_file():
        have = ", ".join(sorted(item.name for item in folder.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json, only {have}")
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
