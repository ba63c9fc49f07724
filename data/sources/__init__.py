"""Datasets by name. A source is a pure map from index to `Record`: facts, without wording, tensors or randomness."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args, get_type_hints

from data.sources import (
    coco,
    false_premise,
    folder,
    grefer,
    jsonl,
    label_maps,
    llava_instruct,
    muse,
    openimages,
    parts,
    pascal,
    reason,
    refer,
    vqa,
)
from data.sources.base import SOURCES, Rows, Source, locate, name_of
from utils.registry import unknown

# importing a family registers its sources
FAMILIES = (
    *(coco, false_premise, folder, grefer, jsonl, label_maps, llava_instruct, muse, openimages, parts, pascal),
    *(reason, refer, vqa),
)

__all__ = ["FAMILIES", "SOURCES", "Rows", "Source", "build_source", "locate"]


def build_source(name: str, root: str | Path, **options: Any) -> Source:
    """The source called `name` below the dataset folder `root`.

    `name` is a name in SOURCES, alone or as published flags write it: `ReasonSeg|train`, `refcoco|unc|testA`.
    Unknown names, unknown or missing options and two different splits raise with the choices there are.
    """
    base, *parts = name.split("|")
    if len(parts) > 2:
        raise ValueError(f"{name!r}: expected name, name|split or name|split_by|split")
    factory = SOURCES[base]
    for key, value in zip(("split",) if len(parts) == 1 else ("split_by", "split"), parts, strict=False):
        if options.get(key, value) != value:
            raise ValueError(f"{name!r} says {key} {value!r}, the options say {options[key]!r}")
        options[key] = value
    choices = {key: value for key, value in inspect.signature(factory).parameters.items() if key != "root"}
    for key in options:
        if key not in choices:
            raise ValueError(f"source {base!r}: {unknown('option', key, choices)}")
    for key, value in choices.items():
        if value.default is value.empty and key not in options:
            raise ValueError(f"source {base!r} needs the option {key!r}; it has {', '.join(choices)}")
    kinds = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    checked = {key: _option(value, kinds.get(key), f"source {base!r}: option {key}") for key, value in options.items()}
    return factory(Path(root), **checked)


def _option(value: Any, kind: Any, where: str) -> Any:
    """An option as its source declares it, for YAML turns a bare yes into true and 2017 into a number.

    Text is read from whole numbers, too; a bool or a number where the other is declared raises ValueError.
    """
    choices = get_args(kind) or (kind,)
    if value is None and type(None) in choices:
        return None
    plain = [choice for choice in choices if choice in (str, int, bool)]
    if len(plain) != 1 or len([choice for choice in choices if choice is not type(None)]) > 1:
        return value  # lists of names and the like, which the source checks
    if plain == [str]:
        return name_of(value, "it", where) if not isinstance(value, Path) else str(value)
    if not isinstance(value, plain[0]) or (plain == [int] and isinstance(value, bool)):
        what = {int: "a whole number", bool: "true or false"}[plain[0]]
        raise ValueError(f"{where} must be {what}, got {value!r}")
    return value
