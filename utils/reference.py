"""The reference of all recipe fields, docs/configuration.md, made from the dataclasses of utils.recipe."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml

from utils.config import Recipe, bounds_text, without_none
from utils.renamed import RENAMED


def reference() -> str:
    """All fields of a recipe as a page of Markdown."""
    parts = [
        "# Configuration",
        "All fields of a recipe, printed by `python -m utils.config` and `python train_ds.py --help_config`. A field "
        "is set in a YAML file (`section: {field: value}`) or by `--set section.field=value`. Precedence: default < "
        "`base:` < `--config` < flag ([flags.md](flags.md)) < `--set`. An unknown field, a value that is no choice and "
        "a number out of range are refused when the recipe is read. Fields marked *start* say how a program is "
        "started, and are no part of the experiment.",
    ]
    for section, cls in sections(Recipe, ""):
        title = f"`{section}`" if section else "At the top"
        rows = [_row(entry, kind) for entry, kind in _plain_fields(cls)]
        table = ["| field | type and choices | default | what |", "| --- | --- | --- | --- |", *rows]
        text = (cls.__doc__ or "").strip().replace("\n    ", "\n")
        parts += [f"## {title}", text, "\n".join(table)]
    renamed = [f"| `{entry.old}` | `{entry.new}` | {_values_text(entry.values)} |" for entry in RENAMED]
    parts += [
        "## Fields of earlier recipes",
        "Recipes, run folders and merged folders with these fields are read as before, with a message for each.",
        "\n".join(["| then | now | values |", "| --- | --- | --- |", *renamed]),
    ]
    return "\n\n".join(parts) + "\n"


def sections(cls: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The dotted name and class of a section, and of those inside it, depth first; [] stands for an entry of a list."""
    yield where, cls
    for entry, kind in _typed_fields(cls):
        inner, name = without_none(kind), f"{where}.{entry.name}".lstrip(".")
        if typing.get_origin(inner) is tuple:
            inner, name = typing.get_args(inner)[0], f"{name}[]"
        if dataclasses.is_dataclass(inner):
            yield from sections(inner, name)


def _plain_fields(cls: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """The fields that are no sections, which have a table of their own."""
    return (pair for pair in _typed_fields(cls) if not dataclasses.is_dataclass(pair[1]))


def _typed_fields(cls: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    return ((entry, hints[entry.name]) for entry in dataclasses.fields(cls))


def _row(entry: dataclasses.Field, kind: Any) -> str:
    default = entry.default
    if entry.default_factory is not dataclasses.MISSING:
        default = entry.default_factory()
    if default is dataclasses.MISSING:
        shown = "required"
    else:
        plain = list(default) if isinstance(default, tuple) else default
        shown = f"`{yaml.safe_dump(plain, default_flow_style=True).split(chr(10))[0]}`"
    mark = "*start*: " if entry.metadata["start"] else ""
    cells = [f"`{entry.name}`", _type_text(kind, entry.metadata["range"]), shown, mark + entry.metadata["help"]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type_text(kind: Any, bounds: tuple[float | None, float | None, bool, bool]) -> str:
    inner = without_none(kind)
    origin = typing.get_origin(inner)
    if origin is Literal:
        text = ", ".join(f"`{choice}`" for choice in typing.get_args(inner))
    elif origin is tuple:
        item = typing.get_args(inner)[0]
        text = f"list of {getattr(item, '__name__', item)}"
    elif origin is dict:
        text = "mapping"
    else:
        text = inner.__name__
        if ends := bounds_text(*bounds):
            text += f", {ends}"
    return text if inner is kind else f"{text}, `null`"


def _values_text(values: dict[Any, Any]) -> str:
    spelled = [(yaml.safe_dump(one).split("\n")[0], yaml.safe_dump(now).split("\n")[0]) for one, now in values.items()]
    return ", ".join(f"`{one}`: `{now}`" for one, now in spelled)
