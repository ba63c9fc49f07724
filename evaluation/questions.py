"""What a suite asks of a system, and what its figures mean where the two were not made for each other."""

from __future__ import annotations

from collections.abc import Iterator

from data.types import Query, Record
from evaluation.catalog import Suite
from evaluation.protocols import FORCED, GENERATED, TWO_PASS
from systems.base import System

REFUSING = ("generalised", "generalised_apart", "premise")  # metrics that ask for what is not there


def questions(record: Record, system: System) -> list[Query]:
    """The system's questions about a record; those of a data set without masks are asked as they stand."""
    if record.kind == "vqa":
        return [Query(dialogue[0].question, dialogue[0].answer) for dialogue in record.dialogues]
    return system.task.queries(record)


def notes(suite: Suite, system: System, protocol: str, record: Record) -> list[str]:
    """What was done, in words, where the system differs from what the suite expects. record: any of its pictures."""
    return list(_notes(suite, system, protocol, record))


def _notes(suite: Suite, system: System, protocol: str, record: Record) -> Iterator[str]:
    number = len(questions(record, system))
    if suite.metric in REFUSING and system.tokens.refuse is None and protocol == GENERATED:
        yield f"{system.name} has no token that refuses: an answer without a mask counts as a refusal"
    if suite.metric in REFUSING and system.tokens.refuse is None and protocol == TWO_PASS:
        yield (
            f"{system.name} has no token that refuses, so two passes decide nothing: only an empty mask counts as a "
            "refusal; with --protocol generate an answer without a mask does, too"
        )
    if suite.metric in (*REFUSING, "exact") and protocol == FORCED:
        yield "the true answer is given, which leaves nothing to decide; --protocol generate has the missing figures"
    if record.kind == "classes" and number > 1:
        yield f"{system.name} is asked for the {len(record.vocabulary)} classes in {number} questions, not in one list"
    if record.kind == "multi" and number > len(record.dialogues):
        yield f"{system.name} is asked for each target alone, by its name, not for several in one answer"
    if record.kind == "multi" and number < len(record.dialogues):
        yield f"{system.name} is asked for all targets of a picture at once, by their names"
