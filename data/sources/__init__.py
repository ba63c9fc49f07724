"""Datasets by name. A source is a pure map from index to `Record`: facts, no wording, no tensors, no chance."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from data.sources import (
    coco,
    false_premise,
    folder,
    grefer,
    jsonl,
    label_maps,
    muse,
    openimages,
    parts,
    pascal,
    reason,
    refer,
    short_answers,
    vqa,
)
from data.sources.base import SOURCES, Rows, Source, locate
from utils.registry import unknown

# importing a family registers its sources
FAMILIES = (
    *(coco, false_premise, folder, grefer, jsonl, label_maps, muse, openimages, parts, pascal),
    *(reason, refer, short_answers, vqa),
)

__all__ = ["FAMILIES", "SOURCES", "Rows", "Source", "build_source", "locate"]


def build_source(name: str, root: str | Path, **options: Any) -> Source:
    """The source called `name` below the dataset folder `root`.

    `name` is a name in SOURCES, alone or as published flags write it: `ReasonSeg|train`, `refcoco|unc|testA`. Unknown
    names, unknown options and a split given twice raise with the choices there are.
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
    return factory(Path(root), **options)
