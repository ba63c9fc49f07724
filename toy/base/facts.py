"""What the dialogues need to know of a scene, and place words: one word per cell of a grid that matches the patches."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from toy.base.dense import owner_map
from toy.base.sizes import GRID, SCENE_SIDE
from toy.world.expressions import Expression, expressions
from toy.world.knowledge import Implicit, implicit
from toy.world.scene import Scene, Thing
from toy.world.talk import captions, dialogues
from toy.world.words import by_class

LETTERS = "BCDFGHJKLMNPQRST"  # no vowels, so that no place word reads as an English one
# The word of column c and row r is CELLS[c * GRID + r]: "Bb" is the top left cell, "Bc" below it, "Cb" to its right.
CELLS = tuple(column + row.lower() for column in LETTERS for row in LETTERS)
CELL_SIDE = SCENE_SIDE // GRID


def cell_at(x: float, y: float) -> str:
    """The word of the cell around pixel (x, y)."""
    return CELLS[int(x) // CELL_SIDE * GRID + int(y) // CELL_SIDE]


@dataclass(frozen=True, eq=False)
class Facts:
    """A scene and what the dialogues ask about it, computed on first use."""

    scene: Scene
    rng: np.random.Generator

    @cached_property
    def implicit(self) -> list[Implicit]:
        """Implicit queries that fit one class of the scene."""
        return implicit(self.scene, self.rng)

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Plain questions and answers."""
        return [pair for dialogue in dialogues(self.scene, self.rng) for pair in dialogue]

    @cached_property
    def captions(self) -> list[str]:
        return captions(self.scene, self.rng)

    @cached_property
    def groups(self) -> dict[str, list[Thing]]:
        """Things of each class in view, from left to right."""
        things = self.scene.things
        return {
            name: sorted((things[i] for i in ids), key=lambda thing: thing.box)
            for name, ids in by_class(self.scene).items()
        }

    @cached_property
    def owner(self) -> np.ndarray:
        return owner_map(self.scene)

    @cached_property
    def expressions(self) -> dict[str, list[Expression]]:
        """Referring expressions by kind."""
        by_kind: dict[str, list[Expression]] = {}
        for item in expressions(self.scene):
            by_kind.setdefault(item.kind, []).append(item)
        return by_kind

    def thing_at(self, x: int, y: int) -> Thing:
        return self.scene.things[self.owner[y, x]]


def spot(mask: np.ndarray) -> str:
    """The cell of the mask pixel nearest to the centroid, which itself may lie outside a concave or divided mask."""
    rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return cell_at(columns[nearest], rows[nearest])


def corners(mask: np.ndarray) -> str:
    """The words of the mask's box: top left and bottom right cell."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return f"{cell_at(columns[0], rows[0])} {cell_at(columns[-1], rows[-1])}"


def union(things: list[Thing]) -> np.ndarray:
    return np.logical_or.reduce([thing.mask for thing in things])
