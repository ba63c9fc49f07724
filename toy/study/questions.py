"""Questions that no single benchmark asks: lists with more or less that is absent, one question for several targets."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from data.types import Mask, Query, Record
from systems.assistant import Assistant
from systems.base import SegTask, about_picture, label_set, sample_items
from systems.single import SENTENCE_PROMPT


@dataclass(frozen=True)
class ListQuestions:
    """Asks about the present classes and `absent` times as many others, in the label set's order, not about all of it.

    Which others hangs on the picture's name alone, so that every model is asked the same.
    """

    task: SegTask
    absent: float

    def queries(self, record: Record) -> list[Query]:
        names, present = label_set(record)
        others = [name for name in names if name not in present]
        rng = np.random.default_rng(zlib.crc32(record.image.name.encode()))
        asked = {*present, *sample_items(others, round(self.absent * len(present)), rng)}
        return self.task.queries(replace(record, vocabulary=tuple(name for name in names if name in asked)))


@dataclass(frozen=True)
class DatasetQuestions:
    """Asks every model a multi-target question in the data set's own words, once for all its targets."""

    def queries(self, record: Record) -> list[Query]:
        queries = []
        for (turn,) in record.dialogues:
            targets = tuple(part.target for part in turn.answer if isinstance(part, Mask))
            names = tuple(record.targets[index].phrase for index in targets)
            queries.append(Query(about_picture(SENTENCE_PROMPT.format(turn.question)), (), targets, names))
        return queries


def with_questions(assistant: Assistant, task: ListQuestions | DatasetQuestions) -> Assistant:
    """The same assistant, asked by `task`."""
    return replace(assistant, system=replace(assistant.system, task=task))
