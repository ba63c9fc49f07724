"""Published figures (published.yaml) by suite, with protocol and source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from utils.plain import read_yaml

FILE = Path(__file__).with_suffix(".yaml")
SOURCE_NAMES = {"paper": "the paper's tables", "readme": "the release's README", "quoted": "quoted by a later paper"}


@dataclass(frozen=True)
class Published:
    """One model on one suite. values: metric -> per cent, as printed; for the other fields see published.yaml."""

    model: str
    size: str
    paper: str
    protocol: str
    source: str
    values: dict[str, float]
    note: str = ""


@cache
def published() -> dict[str, list[Published]]:
    """Suite -> the models that have numbers on it, in the order of the file."""
    by_suite: dict[str, list[Published]] = {}
    for entry in read_yaml(FILE):
        for suite, values in entry.pop("values").items():
            by_suite.setdefault(suite, []).append(Published(**entry, values=values))
    return by_suite
