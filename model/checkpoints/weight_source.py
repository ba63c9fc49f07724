"""Weights on their way from disk into a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoints.layouts import Report


@dataclass
class WeightSource:
    """Weights under our names. Every step of loading adds to it in place: the mask head's weights, a training file's,
    the parts that a backbone keeps elsewhere."""

    folder: Path
    values: dict[str, Any]  # its config.json
    tensors: dict[str, Tensor]
    report: Report
    finished: bool  # it holds a mask head: an assistant, not a base
    fresh: list[str] = field(default_factory=list)  # weights that no file gives, as expected: they are initialised
    weight: Path | None = None  # the file of model.checkpoint_file, which overrides the folder's own weights

    @property
    def where(self) -> str:
        """The file that gives the sizes, for messages."""
        return str(self.folder / "config.json")

    @property
    def blamed(self) -> str:
        """Whose weights they are, for messages."""
        return f"{self.weight} (model.checkpoint_file, over {self.folder})" if self.weight else str(self.folder)
