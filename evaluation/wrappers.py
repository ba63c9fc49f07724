"""Sources as a benchmark asks about them: without absent targets, or with several targets per question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from data.readers.digest import annotation_paths
from data.sources import Source
from data.sources.base import first_of, image_paths
from data.types import Mask, Record, Target, Turn
from utils.log import log


class PresentOnly:
    """A source without its absent targets, and without the records that have no other; a message counts these.

    Class lists are asked about whatever is present, so none of their records is left out.
    """

    def __init__(self, source: Source):
        self.source = source
        has_lists = first_of(source, lambda record: record.kind) == "classes"
        self._records = [index for index in range(len(source)) if has_lists or _may_be_present(source, index)]
        left_out = len(source) - len(self._records)
        if left_out:
            log.info("present_only: left out %d of %d records, where nothing is present", left_out, len(source))
        if len(source) and not self._records:
            raise ValueError(f"present_only: nothing is present in any of {len(source)} records")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self.source[self._records[index]]
        return replace(record, targets=_present_targets(record))

    def image_paths(self) -> list[str]:
        paths = image_paths(self.source)
        return [paths[index] for index in self._records]

    def annotation_paths(self) -> list[Path]:
        return annotation_paths(self.source)


class Grouped:
    """A source whose consecutive targets are asked for together, in groups of these sizes in turn (pixellm.md 6.2).

    With the sizes (3, 2), eight targets become groups of 3, 2 and 3.
    """

    def __init__(self, source: Source, sizes: Sequence[int]):
        self.source = source
        self.sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """A record of kind "multi". Its questions have no text yet; the system's task words them."""
        record = self.source[index]
        sizes = cycle(self.sizes)
        groups = []
        start = 0
        while start < len(record.targets):
            stop = min(start + next(sizes), len(record.targets))
            groups.append((Turn("", tuple(map(Mask, range(start, stop)))),))
            start = stop
        return replace(record, kind="multi", dialogues=tuple(groups))

    def image_paths(self) -> list[str]:
        return image_paths(self.source)

    def annotation_paths(self) -> list[Path]:
        return annotation_paths(self.source)


def _may_be_present(source: Source, index: int) -> bool:
    """Whether something is present in a record; also True where it cannot be read, which is said when it is asked."""
    try:
        return bool(_present_targets(source[index]))
    except (OSError, ValueError):
        return True


def _present_targets(record: Record) -> tuple[Target, ...]:
    return tuple(target for target in record.targets if target.mask is not None)
