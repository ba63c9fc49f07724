"""The models of the study, one per row of its tables: same base, same number of steps, same batch size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SYSTEM, ABLATION = "system", "ablation"


@dataclass(frozen=True)
class Row:
    """A toy recipe and its changes (`--set` of train_ds.py); an ablation is evaluated on class lists only."""

    name: str
    recipe: str
    title: str
    kind: str = SYSTEM
    changes: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        return CONFIGS / self.recipe


# All recipes answer every class of the list: an ablation that also left classes out would differ in two ways.
ROWS = (
    Row("lisa", "toy/lisa.yaml", "LISA"),
    Row("lasagna", "toy/lasagna.yaml", "LaSagnA"),
    Row("gsva", "toy/gsva.yaml", "GSVA"),
    Row("pixellm", "toy/pixellm.yaml", "PixelLM"),
    Row("sesame", "toy/sesame.yaml", "SESAME"),
    Row(
        "lasagna-whole-list",
        "toy/lasagna.yaml",
        "without random lists",
        ABLATION,
        ("options.random_list=released", "options.min_all_classes=0"),
    ),
    Row(
        "lasagna-present-only",
        "toy/lasagna.yaml",
        "without sequence augmentation",
        ABLATION,
        ("options.sequence_augmentation=false",),
    ),
    Row(
        "lasagna-any-order",
        "toy/lasagna.yaml",
        "without order following",
        ABLATION,
        ("options.order_following=false",),
    ),
    Row("unified", "toy/unified.yaml", "unified"),
)
