"""The lines of a file of predictions. Such files are passed on between people, so each field is checked when read."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NotRequired, TypedDict

LARGEST = 2**53  # of a count: floats above it are not exact
LEFT_OUT = "left_out"  # a key of the counts of an image that was not asked about: why


class Answer(TypedDict):
    """One question about an image and its answer.

    asked: the phrases or class names of the question. targets: indices into `Record.targets`; missing in files of early
    versions. claims: [phrase, index into `masks` or None]. masks: COCO run-length encodings. scores: of each mask, the
    mask head's own confidence, 0 to 1; missing of a head without one.
    """

    question: str
    asked: list[str]
    targets: NotRequired[list[int]]
    text: str
    claims: list[tuple[str, int | None]]
    masks: list[dict[str, Any]]
    scores: NotRequired[list[float]]
    finished: bool
    unread: int


class Prediction(TypedDict):
    """One line: an image of a suite with all answers about it, and their counts as the suite's scorer makes them."""

    suite: str
    metric: str
    index: int  # of the record in the suite's source
    image: str
    protocol: str
    notes: NotRequired[list[str]]
    seconds: float
    counts: dict[str, Any]
    answers: list[Answer]


def check_line(line: Any, where: str) -> Prediction:
    """The line, if every field of it that is read is what this program writes; else raises ValueError."""
    _fields(line, LINE, where)
    _numbers(line["counts"], f"{where}: counts")
    _fields(line["counts"], COUNTS, f"{where}: counts")
    for number, answer in enumerate(line["answers"]):
        place = f"{where}: answers[{number}]"
        _fields(answer, ANSWER, place)
        if len(answer.get("scores", answer["masks"])) != len(answer["masks"]):
            raise ValueError(f"{place}: {len(answer['scores'])} scores of {len(answer['masks'])} masks")
        for claim in answer["claims"]:
            if not isinstance(claim, list) or len(claim) != 2 or not isinstance(claim[0], str):
                raise ValueError(f"{place}: a claim is [phrase, mask], got {_shortened(claim)}")
            if claim[1] is not None and not (_count(claim[1]) and claim[1] < len(answer["masks"])):
                raise ValueError(f"{place}: claims mask {_shortened(claim[1])} of {len(answer['masks'])}")
    return line


@contextmanager
def reading(suite: str) -> Generator[None]:
    """Any error of damaged counts, raised while a suite's lines are used, becomes a ValueError that names the suite.

    `check_line` does not know what each scorer's counts look like; this catches what it lets through.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{suite}: its predictions are damaged or of another program ({reason})") from None


def _fields(values: Any, kinds: dict[str, tuple[Callable[[Any], bool], str, bool]], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: not a prediction of this program: expected a mapping, got {_shortened(values)}")
    for name, (fits, what, required) in kinds.items():
        if name not in values and required:
            raise ValueError(f"{where}: not a prediction of this program: no {name!r}")
        if name in values and not fits(values[name]):
            raise ValueError(f"{where}: {name} must be {what}, got {_shortened(values[name])}")


def _numbers(value: Any, where: str) -> None:
    """Counts and scores are finite and not below -1, which stands for "no class"."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            _numbers(inner, where)
    elif isinstance(value, (int, float)) and not -1 <= value <= LARGEST:
        raise ValueError(f"{where}: {_shortened(value)} is not a count of pixels or things")


def _name(value: Any) -> bool:
    """Names are printed as they are, so they hold no control characters, which could command a terminal."""
    return isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _shares(value: Any) -> bool:
    """A list of numbers from 0 to 1."""
    return isinstance(value, list) and all(_duration(item) and item <= 1 for item in value)


def _duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


NAME = "a name of printable characters"
COUNT = "a whole number from 0"
TEXT = "text"
LINE = {  # field -> check, its words for messages, whether the field is required
    "suite": (_name, NAME, True),
    "metric": (_name, NAME, True),
    "protocol": (_name, NAME, True),
    "index": (_count, COUNT, True),
    "image": (lambda value: isinstance(value, str), TEXT, True),
    "seconds": (_duration, "a number of seconds", True),
    "counts": (lambda value: isinstance(value, dict), "a mapping", True),
    "answers": (_list_of(dict), "a list of mappings", True),
    "notes": (lambda value: isinstance(value, list) and all(map(_name, value)), "a list of printable texts", False),
}
COUNTS = {"unmatched": (_count, COUNT, True), "classes": (_list_of(str), "a list of names", False)}
ANSWER = {
    "question": (lambda value: isinstance(value, str), TEXT, True),
    "text": (lambda value: isinstance(value, str), TEXT, True),
    "asked": (_list_of(str), "a list of texts", True),
    "claims": (lambda value: isinstance(value, list), "a list", True),
    "masks": (_list_of(dict), "a list of RLEs", True),
    "finished": (lambda value: isinstance(value, bool), "true or false", True),
    "unread": (_count, COUNT, True),
    "targets": (_list_of(int), "a list of whole numbers", False),
    "scores": (_shares, "a list of numbers from 0 to 1", False),
}


def _shortened(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."
