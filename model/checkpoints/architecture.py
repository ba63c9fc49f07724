"""What a model is made of: the backbone and the mask head by name, each with its own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.checkpoints.config_file import SECTION
from model.projection import Projection
from model.vlm import VLMS


@dataclass(frozen=True)
class Architecture:
    """All that `assemble` needs in addition to the weights. The configurations are plain values; what is in them, only
    the class of that name knows."""

    vlm: str  # in VLMS
    vlm_config: dict[str, Any]
    head: str  # in HEADS
    head_config: dict[str, Any]
    projection: Projection = Projection()

    def to_json(self) -> dict[str, Any]:
        """Our `config.json`: the fields of the backbone's Hugging Face class, which can therefore read the folder, and
        one section of our own."""
        fields, own = VLMS[self.vlm].config_json(self.vlm_config)
        return {**fields, SECTION: {"head": self.head, "head_config": self.head_config, **own}}
