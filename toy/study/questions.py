"""Questions beyond the benchmarks: class lists with more or fewer absent classes, one question for several targets."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from data.types import Mask, Query, Record
from systems.assistant import Assistant
from systems.base import SegTask
from systems.single import SENTENCE_PROMPT
from systems.targets import label_set, sample_items
from systems.wording import about_image


@dataclass(frozen=True)
class ListQuestions:
    """Asks about the present classes and `absent` times as many absent ones, in the order of the label set.

    The absent classes depend only on the image's name, so that every model gets the same list.
    """

    task: SegTask
    absent: float

    def queries(self, record: Record) -> list[Query]:
        names, present = label_set(record)
        others = [name for name in names if name not in present]
        rng = np.random.default_rng(zlib.crc32(record.image.name.encode()))
        wanted = {*present, *sample_items(others, round(self.absent * len(present)), rng)}
        return self.task.queries(replace(record, vocabulary=tuple(name for name in names if name in wanted)))


@dataclass(frozen=True)
class DatasetQuestions:
    """Asks multi-target questions in the data set's own words, one question for all its targets."""

    def queries(self, record: Record) -> list[Query]:
        queries = []
        for (turn,) in record.dialogues:
            targets = tuple(part.target for part in turn.answer if isinstance(part, Mask))
            names = tuple(record.targets[index].phrase for index in targets)
            queries.append(Query(about_image(SENTENCE_PROMPT.format(turn.question)), (), targets, names))
        return queries


def with_questions(assistant: Assistant, task: ListQuestions | DatasetQuestions) -> Assistant:
    """The same assistant with the queries of `task`."""
    return replace(assistant, system=replace(assistant.system, task=task))
