"""What a recipe needs of a dataset folder: one entry for each source that it trains or evaluates on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.sources import Source, build_source
from evaluation.runner import source_options
from evaluation.suites import find_suites
from utils.config import Recipe

TRAIN, EVAL = "train", "eval"


@dataclass(frozen=True)
class Need:
    """A source by name and options. label: its name in tables and file names, unique in a recipe."""

    role: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def base(self) -> str:
        """The name in SOURCES."""
        return self.source.split("|")[0]

    def open(self, root: Path) -> Source:
        return build_source(self.source, root, **self.options)


def needs_of(recipe: Recipe) -> list[Need]:
    """Training sources with a rate above 0, then the suites of validation and of the final evaluation; each once."""
    needs: list[Need] = []
    for task in recipe.data.mixture:
        for entry in task.sets if task.rate > 0 else ():
            if entry.rate > 0:
                needs.append(Need(TRAIN, entry.source, entry.options, _label(entry.source, entry.options)))
    names = (*recipe.eval.suites, *recipe.eval.final_suites)
    for suite in find_suites(names, recipe.eval.custom) if names else ():
        options = {**source_options(recipe, suite), **suite.options}
        needs.append(Need(EVAL, suite.source or suite.name, options, suite.name))
    return [need for index, need in enumerate(needs) if need not in needs[:index]]


def _label(source: str, options: dict[str, Any]) -> str:
    """The name, with the first file or folder of its options: sets of one's own share the names `coco` and `folder`."""
    own = next((str(options[key]) for key in ("annotations", "file", "folder") if key in options), "")
    return f"{source} {own}".strip()
