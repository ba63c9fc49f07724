"""Names of earlier recipes: renamed fields, and recipe files that moved. Both still work, with a message."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger("assistant")  # utils.log configures it, and imports utils.config


@dataclass(frozen=True)
class Renamed:
    """A field of earlier recipes, and its name of today. values: old value -> new value, where they differ."""

    old: str
    new: str
    values: dict[Any, Any] = field(default_factory=dict)


RENAMED = (
    Renamed("options.blank_after_list", "options.blanks", {True: "all", False: "released"}),
    Renamed("model.decoder_heads", "model.head_options.decoder_heads"),
    Renamed("model.head", "model.head_options"),
    Renamed("model.weight", "model.checkpoint_file"),
    Renamed("model.tower.positions", "model.tower.position_resize"),
    Renamed("data.sampling", "data.sampling", {"once": "epoch"}),
    Renamed("loss.alpha", "loss.overlap_weight"),
    Renamed("loss.refinement", "loss.overlap_refinement"),
    Renamed("loss.refused", "loss.count_refused", {"excluded": False, "counted": True}),
    Renamed("train.clip", "train.grad_clip"),
    Renamed("eval.pictures", "eval.num_examples"),
    Renamed("eval.no_eval", "eval.validate", {True: False, False: True}),
)
OLD_HEADS = 8  # default of model.decoder_heads, and of the heads' own option
MOVED = {  # recipes that once lay directly in configs/
    **{f"{name}.yaml": f"released/{name}.yaml" for name in ("lisa", "lasagna", "gsva", "pixellm", "sesame")},
    **{f"toy_{name}.yaml": f"toy/{name}.yaml" for name in ("lisa", "lasagna", "gsva", "pixellm", "sesame", "unified")},
    "preprocessor_448.json": "released/preprocessor_448.json",
}


def with_new_names(values: dict[str, Any], *, complete: bool = False) -> dict[str, Any]:
    """The values of a recipe with every field under its name of today, and a message for each that has another.

    What is given under an old name replaces what is given under the new one: defaults stand there under the new names.
    complete: nothing lies below these values, so that a default that is stated can be left out.
    """
    for entry in RENAMED:
        *outer, name = entry.old.split(".")
        section = _section(values, outer)
        if section is None or name not in section:
            continue
        value = section[name]
        if entry.old == entry.new and not _has_key(entry.values, value):
            continue
        announce(f"the recipe field {_old_spelling(entry, value)}")
        rest = _with(values, outer, {key: item for key, item in section.items() if key != name})
        value = entry.values[value] if _has_key(entry.values, value) else value
        if entry.old == "model.decoder_heads":
            # The head's own option counted before this field, whose default every saved recipe states.
            own = section.get("head")
            if (isinstance(own, dict) and "decoder_heads" in own) or (complete and value == OLD_HEADS):
                values = rest
                continue
        *outer, name = entry.new.split(".")
        present = (_section(rest, outer) or {}).get(name)
        if isinstance(value, dict) and isinstance(present, dict):
            value = {**present, **value}
        values = _with(rest, [*outer, name], value)
    return values


def new_name(dotted: str) -> str:
    """The name of today of a dotted field, which may be one of earlier recipes."""
    for entry in RENAMED:
        if dotted == entry.old or dotted.startswith(f"{entry.old}."):
            return entry.new + dotted.removeprefix(entry.old)
    return dotted


def _old_spelling(entry: Renamed, value: Any) -> str:
    if not _has_key(entry.values, value):
        return f"{entry.old} is now {entry.new}"
    spelled = [yaml.safe_dump(one).split("\n")[0] for one in (value, entry.values[value])]
    return f"{entry.old}: {spelled[0]} is now {entry.new}: {spelled[1]}"


def _has_key(values: dict[Any, Any], value: Any) -> bool:
    """Whether a plain value is a key; 1 is not True."""
    return any(type(value) is type(key) and value == key for key in values)


@functools.cache
def announce(message: str) -> None:
    """A warning, once per message, from the main process."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", message)


def _section(values: Any, keys: list[str]) -> dict[str, Any] | None:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


def find_config(path: str | Path) -> Path:
    """The path, or where the file of `configs/` lies today that once lay there."""
    path = Path(path)
    if not path.exists() and path.name in MOVED and (moved := path.parent / MOVED[path.name]).is_file():
        announce(f"{path} is now {moved}")
        return moved
    return path


def _with(values: Any, keys: list[str], value: Any) -> Any:
    """The mappings with a value at a place inside them; what is no mapping on the way is replaced by one."""
    if not keys:
        return value
    inner = values if isinstance(values, dict) else {}
    return {**inner, keys[0]: _with(inner.get(keys[0]), keys[1:], value)}
