"""The questions that a suite asks a system, and remarks on the figures where the two were not made for each other."""

from __future__ import annotations

from collections.abc import Iterator

from data.types import Query, Record
from evaluation.catalog import Suite
from evaluation.protocols import FORCED, GENERATED, TWO_PASS
from systems.base import System

NO_TARGET_METRICS = ("generalised", "generalised_apart", "premise")  # with questions about what is not there


def questions(record: Record, system: System) -> list[Query]:
    """The system's questions about a record; those of a dataset without masks are asked as they are."""
    if record.kind == "vqa":
        return [Query(dialogue[0].question, dialogue[0].answer) for dialogue in record.dialogues]
    return system.task.queries(record)


def protocol_notes(suite: Suite, system: System, protocol: str, record: Record) -> list[str]:
    """Sentences on what is done where the system differs from what the suite expects. record: any of the suite's.

    They are part of results.json and of each line of predictions.
    """
    return list(_notes(suite, system, protocol, record))


def _notes(suite: Suite, system: System, protocol: str, record: Record) -> Iterator[str]:
    count = len(questions(record, system))
    if suite.metric in NO_TARGET_METRICS and system.tokens.refuse is None and protocol == GENERATED:
        yield f"{system.name} has no token that refuses: an answer without a mask counts as a refusal"
    if suite.metric in NO_TARGET_METRICS and system.tokens.refuse is None and protocol == TWO_PASS:
        yield (
            f"{system.name} has no token that refuses, so two passes decide nothing: only an empty mask counts as a "
            "refusal; with --protocol generate an answer without a mask does, too"
        )
    if suite.metric in (*NO_TARGET_METRICS, "exact") and protocol == FORCED:
        yield "the true answer is given, which leaves nothing to decide; --protocol generate has the missing figures"
    if record.kind == "classes" and count > 1:
        yield f"{system.name} is asked for the {len(record.vocabulary)} classes in {count} questions, not in one list"
    if record.kind == "multi" and count > len(record.dialogues):
        yield f"{system.name} is asked for each target alone, by its name, not for several in one answer"
    if record.kind == "multi" and count < len(record.dialogues):
        yield f"{system.name} is asked for all targets of an image at once, by their names"
