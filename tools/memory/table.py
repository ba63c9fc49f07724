"""The table of docs/memory.md: planned memory of recipes by system, backbone and mask head.

python -m tools.memory.table                    # all rows, in Markdown: minutes
python -m tools.memory.table lisa_qwen3_2b      # those of this recipe
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from systems.assistant import system_of
from tools.memory.__main__ import parse
from tools.memory.plan import GIB, StepMemory, largest_batch, measure_step, recipe_memory, workload
from utils.config import Recipe, from_dict, load_yaml, with_overrides

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SYSTEMS = ("lisa", "lasagna", "unified")
BACKBONES = ("qwen3_2b", "qwen3_4b", "qwen2_5_3b", "qwen2_5_7b", "llava_7b_sam2")
SAM3 = ("model.mask_head=sam3", "model.vision_pretrained=sam3")
GPUS, SIZES = 8, (24, 48, 80)
QLORA = ("model.load_in_4bit=true", "model.train_vocabulary=new_tokens", "train.zero_stage=0")
USUAL = parse(["recipe"])  # the defaults of the planner: batch, reserve
HEADINGS = ("system", "backbone", "mask head", "recipe", "weights, of which train", "GiB planned")
HEADINGS += (*(f"{size} GB" for size in SIZES), f"QLoRA, one GPU of {SIZES[0]} GB")


@dataclass(frozen=True)
class Row:
    """A recipe of configs/ and the fields that are changed in it."""

    recipe: str
    changes: tuple[str, ...] = ()

    def load(self, *more: str) -> Recipe:
        values = load_yaml(CONFIGS / f"{self.recipe}.yaml")
        return from_dict(Recipe, with_overrides(values, [*self.changes, *more]))


ROWS = (
    *(Row(f"{system}_{backbone}") for system in SYSTEMS for backbone in BACKBONES),
    Row("lisa_internvl3_2b"),
    Row("lisa_7b"),
    Row("lisa_qwen3_4b", SAM3),
    Row("pixellm_7b"),
)


def lines(rows: Sequence[Row] = ROWS) -> Iterator[str]:
    """The table in Markdown, one line after another."""
    yield line(HEADINGS)
    yield line("---" for _ in HEADINGS)
    yield from map(planned, rows)


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def planned(row: Row) -> str:
    """The line of one recipe: as it is, on GPUS devices, and with QLORA on one."""
    recipe, memory = measured(row.load())
    here = recipe_memory(recipe, memory, recipe.train.zero_stage, GPUS)
    small, adapters = measured(row.load(*QLORA))
    alone = recipe_memory(small, adapters, 0, 1)
    counts = memory.counts
    name = f"`{row.recipe}`"
    return line(
        (
            recipe.system,
            recipe.model.version.rpartition("/")[2],
            recipe.model.mask_head or system_of(recipe).head,
            f"{name} with `{row.changes[0]}`" if row.changes else name,
            f"{(counts.trained + counts.frozen) / 1e9:.1f} B, {counts.trained / 1e9:.2f} B",
            f"{here.peak(memory.activations(recipe.train.batch_size)) / GIB:.1f} ({recipe.train.batch_size})",
            *(images(largest_batch(here, memory, room(size))) for size in SIZES),
            images(largest_batch(alone, adapters, room(SIZES[0]))),
        )
    )


def measured(recipe: Recipe) -> tuple[Recipe, StepMemory]:
    return recipe, measure_step(recipe, workload(recipe, USUAL))


def room(size: int) -> int:
    """Bytes of a device of `size` GB, without what the planner keeps free."""
    return int((size - USUAL.reserve) * GIB)


def images(count: int) -> str:
    return str(count) if count else "-"


def main(argv: Sequence[str] | None = None) -> int:
    names = sys.argv[1:] if argv is None else argv
    for text in lines([row for row in ROWS if not names or row.recipe in names]):
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
