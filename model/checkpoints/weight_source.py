"""Weights on their way from disk into a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoints.layouts import PLAIN, Report


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

    def check_numbers(self) -> None:
        """Raises for quantised weights: without their scales they would be taken for other numbers."""
        packed = {name: tensor.dtype for name, tensor in self.tensors.items() if tensor.dtype not in PLAIN}
        if packed:
            name, kind = next(iter(packed.items()))
            raise ValueError(
                f"{self.blamed}: {len(packed)} weights are quantised ({name} is {kind}); take the model in 16 or 32 "
                "bits: model.load_in_4bit and load_in_8bit quantise it here"
            )


def untie(tensors: dict[str, Tensor], values: dict[str, Any], embedding: str, lm_head: str) -> None:
    """Makes two matrices of the one that files of a tied model hold, under one name or, in a pickle, under both.
    values: the folder's `config.json`."""
    # a Hugging Face folder of two parts may say it for the whole or for the language model
    tied = any(part.get("tie_word_embeddings") for part in (values, values.get("text_config") or {}))
    if tied and embedding in tensors and lm_head not in tensors:
        tensors[lm_head] = tensors[embedding].clone()  # ours are separate: new rows train apart
    elif {embedding, lm_head} <= tensors.keys() and tensors[embedding].data_ptr() == tensors[lm_head].data_ptr():
        tensors[lm_head] = tensors[lm_head].clone()
