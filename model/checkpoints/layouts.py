"""Names of weights on disk and in a SegModel: those of the backbone and of the mask head, put together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.checkpoints.name_table import NameTable, Pair, under
from model.projection import PUBLISHED, WEIGHT_NAMES

LORA_WRAPPER = "base_model.model."  # in files of the original programs before merging
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids)")  # tables that are computed
OURS = ("vlm", "head", "project")
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights that are the numbers they stand for

_SAME: list[Pair] = [(f"{part}.*", f"{part}.*") for part in OURS]


@dataclass
class Report:
    """How the weights on disk fit the model."""

    mapped: int = 0
    ignored: list[str] = field(default_factory=list)  # names on disk that no model holds
    unexpected: list[str] = field(default_factory=list)  # names on disk without a place
    missing: list[str] = field(default_factory=list)  # weights of the model that no file gave
    fresh: list[str] = field(default_factory=list)  # initialised, as the recipe expects (a base has no text projection)

    def __str__(self) -> str:
        counts = {"loaded": self.mapped, "new": len(self.fresh), "ignored": len(self.ignored)}
        counts |= {"missing": len(self.missing), "unexpected": len(self.unexpected)}
        return ", ".join(f"{count} weights {name}" for name, count in counts.items() if count)

    def complaint(self, blamed: str) -> str:
        """Of weights that are missing or have no place. blamed: whose they are."""
        parts = [f"{blamed}: the weights do not fit the model"]
        if self.missing:
            parts.append(f"missing: {_shortened(self.missing)}")
        if self.unexpected:
            parts.append(f"unexpected: {_shortened(self.unexpected)}")
        return "; ".join(parts) + " (with model.allow_missing=true, --allow_missing, the missing ones are initialised)"


def reading_table(vlm: Iterable[Pair], head: Iterable[Pair]) -> NameTable:
    """Every layout that can be read. vlm, head: `WEIGHT_NAMES` of the backbone and of the mask head."""
    return NameTable([*vlm, *under(head, "", "head."), *WEIGHT_NAMES, *_SAME])


def folder_table(vlm: Iterable[Pair]) -> NameTable:
    """The project's own folders: the backbone's `FOLDER_NAMES`, with `head.*` and `project.*` added."""
    return NameTable([*vlm, *_SAME])


def published_table(vlm: Iterable[Pair], head: Iterable[Pair]) -> NameTable:
    """The layout of released checkpoints. vlm: the backbone's `published_names`."""
    return NameTable([*vlm, *under(head, "", "head."), PUBLISHED])


def to_model_names(
    tensors: dict[str, Tensor], table: NameTable, report: Report, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Renames; what has no place goes to the report. ignored: patterns of names that a model has no use for."""
    renamed = {}
    unused = NameTable((pattern, pattern) for pattern in ignored)
    for name, tensor in tensors.items():
        plain = name.removeprefix(LORA_WRAPPER)
        ours = table.to_model(plain)
        if IGNORED.fullmatch(plain):
            report.ignored.append(name)
        # a file may hold a weight twice, under the names of two layouts: other numbers have no place
        elif ours and (ours not in renamed or torch.equal(renamed[ours], tensor)):
            renamed[ours] = tensor
        elif unused.to_model(plain):
            report.ignored.append(name)
        else:
            report.unexpected.append(name)
    return renamed


def to_layout_names(tensors: dict[str, Tensor], table: NameTable) -> dict[str, Tensor]:
    """Renames for writing. LoRA must be merged, and no layer quantised: no layout has a place for either."""
    if lora := [name for name in tensors if ".lora_" in name or ".base_layer." in name]:
        raise ValueError(f"merge LoRA before writing a folder: {lora[0]} and {len(lora) - 1} more are not merged")
    if packed := [name for name, tensor in tensors.items() if tensor.dtype not in PLAIN]:
        raise ValueError(
            f"quantised weights are not written, e.g. {packed[0]}: load the model with model.load_in_4bit=false and "
            "load_in_8bit=false"
        )
    renamed = {}
    for name, tensor in tensors.items():
        theirs = table.to_layout(name)
        if theirs is None:
            raise ValueError(f"this layout has no name for the weight {name}")
        renamed[theirs] = tensor
    return renamed


def _shortened(names: list[str]) -> str:
    rest = len(names) - 20
    return ", ".join(names[:20]) + (f" and {rest} more" if rest > 0 else "")
