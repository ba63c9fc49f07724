"""A field of a recipe: its default, its range and its line of help."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
    below: bool = False,
    start: bool = False,
    path: bool = False,
) -> Any:
    """A field of a recipe with its line of help.

    A number must lie in low .. high (None: no bound there; above, below: the bound itself is excluded). This is checked
    when the recipe is read, before anything is loaded, and so are the choices of a field whose type is a `Literal`.
    `dict` as the default stands for an empty mapping, MISSING for a field that must be given. start: the field says how
    a program is started, and is no part of the experiment. path: it is a path of this machine, in which `~` is the home
    folder.
    """
    metadata = {"help": help, "range": (low, high, above, below), "start": start, "path": path}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


MISSING: Any = dataclasses.MISSING
