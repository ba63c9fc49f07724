"""Names of weights on disk and in a SegModel: published assistants, LLaVA in its layouts, the project's own folders."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor

from model.checkpoints.name_table import NameTable, Pair, under

LORA_WRAPPER = "base_model.model."  # in files of the original programs before merging
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids)")  # tables that are computed
TOWER = "vlm.tower.*"
OURS = ("vlm", "head", "project")

_LANGUAGE: list[Pair] = [
    (f"model.{part}.*", f"vlm.language.model.{part}.*") for part in ("embed_tokens", "layers", "norm")
]
_LANGUAGE += [("lm_head.*", "vlm.language.lm_head.*")]
_HUGGING_FACE: list[Pair] = [
    ("language_model.model.*", "vlm.language.model.*"),
    ("language_model.lm_head.*", "vlm.language.lm_head.*"),
    ("vision_tower.vision_model.*", TOWER),
    *((f"multi_modal_projector.linear_{i + 1}.*", f"vlm.projector.{2 * i}.*") for i in range(4)),
]
_VARIANTS: list[Pair] = [  # read, never written: towers in old LLaVA files, newer Hugging Face layouts
    ("model.vision_tower.vision_tower.vision_model.*", TOWER),
    ("model.vision_tower.vision_tower.*", TOWER),
    ("model.vision_tower.vision_model.*", TOWER),
    ("model.vision_tower.*", TOWER),
    ("vision_tower.*", TOWER),
    *((f"model.multi_modal_projector.linear_{i + 1}.*", f"vlm.projector.{2 * i}.*") for i in range(4)),
    ("model.mm_projector.#.*", "vlm.projector.#.*"),
    ("model.mm_projector.*", "vlm.projector.0.*"),
    ("model.language_model.*", "vlm.language.model.*"),
]
_TEXT_MLP: Pair = ("model.text_hidden_fcs.0.#.*", "project.#.*")
_SAME: list[Pair] = [(f"{part}.*", f"{part}.*") for part in OURS]
_TOWER_FILES: list[Pair] = [
    ("vision_model.*", TOWER),
    *((f"{part}.*", f"vlm.tower.{part}.*") for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")),
]
_TOWER_REST = re.compile(r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|.*position_ids")


@dataclass
class Report:
    """How the weights on disk met the model."""

    mapped: int = 0
    ignored: list[str] = field(default_factory=list)  # names on disk that no model holds
    unexpected: list[str] = field(default_factory=list)  # names on disk without a place
    missing: list[str] = field(default_factory=list)  # weights of the model that no file gave
    fresh: list[str] = field(default_factory=list)  # drawn anew, as the recipe expects (a base has no text MLP)

    def __str__(self) -> str:
        counts = {"loaded": self.mapped, "new": len(self.fresh), "ignored": len(self.ignored)}
        counts |= {"missing": len(self.missing), "unexpected": len(self.unexpected)}
        return ", ".join(f"{count} weights {name}" for name, count in counts.items() if count)


def reading_table(head: list[Pair]) -> NameTable:
    """Every layout that can be read. `head`: the mask head's published names below `model.`."""
    return NameTable([*_HUGGING_FACE, *_VARIANTS, *under(head, "model.", "head."), _TEXT_MLP, *_LANGUAGE, *_SAME])


def folder_table() -> NameTable:
    """The project's own folders: Hugging Face's LLaVA layout, with `head.*` and `project.*` beside it."""
    return NameTable([*_HUGGING_FACE, *_SAME])


def published_table(head: list[Pair], projector_depth: int) -> NameTable:
    """The layout of released checkpoints. The vision tower keeps its name in the old LLaVA way."""
    projector = ("model.mm_projector.*", "vlm.projector.0.*") if projector_depth == 1 else _VARIANTS[-3]
    tower = _VARIANTS[0]
    return NameTable([projector, tower, *under(head, "model.", "head."), _TEXT_MLP, *_LANGUAGE])


def to_model_names(tensors: dict[str, Tensor], table: NameTable, report: Report) -> dict[str, Tensor]:
    """Renames; what has no place goes to the report."""
    renamed = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(LORA_WRAPPER)
        if IGNORED.fullmatch(plain):
            report.ignored.append(name)
        elif found := table.to_model(plain):
            renamed[found] = tensor
        else:
            report.unexpected.append(name)
    return renamed


def tower_to_model_names(tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Weights of a CLIP folder; its text side has no place here by nature."""
    rest = {name for name in tensors if _TOWER_REST.fullmatch(name)}
    report.ignored += sorted(rest)
    return to_model_names(
        {name: value for name, value in tensors.items() if name not in rest}, NameTable(_TOWER_FILES), report
    )


def to_layout_names(tensors: dict[str, Tensor], table: NameTable) -> dict[str, Tensor]:
    """Renames for writing. LoRA must be merged: no published layout has a place for it."""
    if lora := [name for name in tensors if ".lora_" in name or ".base_layer." in name]:
        raise ValueError(f"merge LoRA before writing a folder: {lora[0]} and {len(lora) - 1} more are not merged")
    renamed = {}
    for name, tensor in tensors.items():
        theirs = table.to_layout(name)
        if theirs is None:
            raise ValueError(f"this layout has no name for the weight {name}")
        renamed[theirs] = tensor
    return renamed
