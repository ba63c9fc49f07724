"""Rows for the LLaVA stage: one image and several dialogues about it in the llava_v1 layout, answers supervised.

The dialogues of a row do not attend to each other, and each has the positions that it would have alone (`group` and
`place` below): otherwise answers could be copied from earlier answers, and the model would hardly learn to look at the
image. A row with an opening of 100 tokens and dialogues of 20 and 30:

    tokens   opening    dialogue 1    dialogue 2    padding
    group    0 ... 0    1 ... 1       2 ... 2       -1
    place    0 ... 99   100 ... 119   100 ... 129   0
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from toy.base.dense import read_spots
from toy.base.facts import CELLS, Facts
from toy.base.pictures import Sample, tower_view
from toy.base.sizes import GRID
from toy.base.turns import MENU, Turn, TurnBuilder
from toy.base.vocabulary import IMAGE_END, IMAGE_PATCH, IMAGE_START, SYSTEM, added_ids, load_vocabulary
from toy.world.scene import Scene

LENGTH = 576
NO_SYSTEM_SHARE = 0.1  # of rows, which start without the system prompt
FOLLOW_UP_SHARE = 0.1  # of turns, which continue the dialogue before them instead of starting one
BOS, EOS, PAD, IGNORED = 1, 2, 0, -100


class RowWriter:
    """Writes the dialogues about a scene as token ids."""

    def __init__(self, folder: Path):
        self.folder, self.pieces = folder, load_vocabulary(folder)
        self.images = added_ids(self.pieces)
        self.encode = lru_cache(maxsize=1 << 15)(self.pieces.encode)

    def __reduce__(self):  # for the worker process, which loads the vocabulary itself: the cache does not pickle
        return RowWriter, (self.folder,)

    def word(self, text: str) -> int:
        """The id of a one-piece word."""
        return self.pieces.encode(text)[-1]

    def cell_table(self) -> np.ndarray:
        """(vocabulary,) index into CELLS of each id, -1 for all others."""
        table = np.full(self.pieces.get_piece_size() + len(self.images), -1)
        table[[self.word(cell) for cell in CELLS]] = np.arange(len(CELLS))
        return table

    def opening(self, rng: np.random.Generator) -> list[int]:
        """<s>, system prompt, USER: and the wrapped image positions."""
        text = "USER:" if rng.random() < NO_SYSTEM_SHARE else f"{SYSTEM} USER:"
        patches = [self.images[IMAGE_PATCH]] * (GRID * GRID)
        return [BOS, *self.encode(text), self.images[IMAGE_START], *patches, self.images[IMAGE_END]]

    def write(self, scene: Scene, rng: np.random.Generator, menu: dict[TurnBuilder, float]) -> dict[str, np.ndarray]:
        """A row of as many turns from `menu` as fit; every array is (LENGTH,) int64.

        ids, labels; group: 0 for the opening, else the number of the dialogue; place: position in its dialogue.
        """
        facts = Facts(scene, rng)
        builders, weights = list(menu), np.array(list(menu.values()))
        choices = rng.choice(len(builders), size=60, p=weights / weights.sum())  # more than ever fit
        turns = (builders[choice](facts, rng) for choice in choices)
        return self.fill(self.opening(rng), (turn for turn in turns if turn is not None), rng)

    def fill(self, ids: list[int], turns: Iterable[Turn], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A row as `write` returns it: what comes before the first turn, then as many turns as fit."""
        opening = len(ids)
        labels = [IGNORED] * opening
        group = [0] * opening
        place = list(range(opening))
        for turn in turns:
            follow_up = group[-1] > 0 and rng.random() < FOLLOW_UP_SHARE
            question, answer = self._encode_turn(turn, first=not follow_up)
            if len(ids) + len(question) + len(answer) > LENGTH:
                break
            start = place[-1] + 1 if follow_up else opening
            group += [group[-1] if follow_up else group[-1] + 1] * len(question + answer)
            place += range(start, start + len(question + answer))
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        columns = {"ids": (ids, PAD), "labels": (labels, IGNORED), "group": (group, -1), "place": (place, 0)}
        rest = LENGTH - len(ids)
        return {name: np.array(values + [filler] * rest) for name, (values, filler) in columns.items()}

    def _encode_turn(self, turn: Turn, *, first: bool) -> tuple[list[int], list[int]]:
        question, answer = turn
        user = "" if first else "USER: "  # that of the first turn is in the opening
        return self.pieces.encode(f"{user}{question} ASSISTANT:"), [*self.pieces.encode(answer), EOS]


class RowBuilder:
    """Makes the samples of the LLaVA stage: called with (scene, step, rng)."""

    def __init__(self, folder: Path, menu: dict[TurnBuilder, float] = MENU):
        self.writer, self.menu = RowWriter(folder), menu

    def __call__(self, scene: Scene, step: int, rng: np.random.Generator) -> Sample:
        spots = read_spots(scene, GRID)
        return {
            "pixels": tower_view(scene.image),
            **self.writer.write(scene, rng, self.menu),
            "codes": spots.codes,
            "boxes": spots.boxes,
        }
