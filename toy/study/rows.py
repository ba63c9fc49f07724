"""The models of the study, one per row of its tables: same base, same rule of when to stop, same batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SYSTEM, ABLATION = "system", "ablation"


@dataclass(frozen=True)
class Row:
    """A toy recipe and its changes (`--set` of train_ds.py); an ablation is evaluated on class lists only.

    judged: suite and figure by which a training is judged while it runs.
    """

    name: str
    recipe: str
    title: str
    judged: tuple[str, str]
    kind: str = SYSTEM
    changes: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        return CONFIGS / self.recipe


@dataclass(frozen=True)
class Trial:
    """A row trained with one seed. name: its folder below that of the study."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}/seed{self.seed}"


def trials(rows: Sequence[Row], seeds: Sequence[int]) -> list[Trial]:
    """Every row with the first seed, then every system with the others; an ablation has one."""
    first, *others = seeds
    return [Trial(row, first) for row in rows] + [
        Trial(row, seed) for seed in others for row in rows if row.kind == SYSTEM
    ]


LISTS = ("ade20k|val", "mIoU")

# All recipes answer every class of the list: an ablation that also left classes out would differ in two ways.
ROWS = (
    Row("lisa", "toy/lisa.yaml", "LISA", ("ReasonSeg|val", "gIoU")),
    Row("lasagna", "toy/lasagna.yaml", "LaSagnA", LISTS),
    Row("gsva", "toy/gsva.yaml", "GSVA", ("grefcoco|unc|val", "gIoU")),
    Row("pixellm", "toy/pixellm.yaml", "PixelLM", ("muse|val", "gIoU")),
    Row("sesame", "toy/sesame.yaml", "SESAME", ("fprefcoco|berkeley_exclude_unified|val", "Segment")),
    Row(
        "lasagna-whole-list",
        "toy/lasagna.yaml",
        "without random lists",
        LISTS,
        ABLATION,
        ("options.random_list=released", "options.min_all_classes=0"),
    ),
    Row(
        "lasagna-present-only",
        "toy/lasagna.yaml",
        "without sequence augmentation",
        LISTS,
        ABLATION,
        ("options.sequence_augmentation=false",),
    ),
    Row(
        "lasagna-any-order",
        "toy/lasagna.yaml",
        "without order following",
        LISTS,
        ABLATION,
        ("options.order_following=false",),
    ),
    Row("unified", "toy/unified.yaml", "unified", ("grefcoco|unc|val", "gIoU")),
)
