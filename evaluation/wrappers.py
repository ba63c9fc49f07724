"""Sources seen another way, as a benchmark asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from data.readers.digest import annotation_paths
from data.sources import Source
from data.sources.base import image_paths
from data.types import Mask, Record, Target, Turn
from utils.log import log


class PresentOnly:
    """A source without its absent targets, and without the records of which nothing is left then: these are counted in
    a message, for there is nothing to ask about them. Class lists are asked whatever is present, so none is left out.
    """

    def __init__(self, source: Source):
        self.source = source
        lists = len(source) > 0 and source[0].kind == "classes"
        self._records = [index for index in range(len(source)) if lists or _present(source[index])]
        if left_out := len(source) - len(self._records):
            log.info("present_only: left out %d of %d records, where nothing is present", left_out, len(source))
        if len(source) and not self._records:
            raise ValueError(f"present_only: nothing is present in any of {len(source)} records")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self.source[self._records[index]]
        return replace(record, targets=_present(record))

    def image_paths(self) -> list[str]:
        paths = image_paths(self.source)
        return [paths[index] for index in self._records]


def _present(record: Record) -> tuple[Target, ...]:
    return tuple(target for target in record.targets if target.mask is not None)

    def annotation_paths(self) -> list[Path]:
        return annotation_paths(self.source)


class Grouped:
    """A source whose consecutive targets are asked for together, in groups of the sizes in turn (pixellm.md 6.2)."""

    def __init__(self, source: Source, sizes: Sequence[int]):
        self.source, self.sizes = source, tuple(sizes)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """A record of kind "multi"; its questions are the task's to word."""
        record, groups, start, sizes = self.source[index], [], 0, cycle(self.sizes)
        while start < len(record.targets):
            stop = min(start + next(sizes), len(record.targets))
            groups.append((Turn("", tuple(map(Mask, range(start, stop)))),))
            start = stop
        return replace(record, kind="multi", dialogues=tuple(groups))

    def image_paths(self) -> list[str]:
        return image_paths(self.source)

    def annotation_paths(self) -> list[Path]:
        return annotation_paths(self.source)
