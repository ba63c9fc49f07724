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
    versions. claims: [phrase, index into `masks` or None]. masks: COCO run-length encodings.

    The other fields are there where they say something. scores: the confidence in each mask, of the mask head or of the
    program that predicted it. substitutes: the claims about what the answer offers instead. released: [phrase, mask,
    withheld mask] of the claims by the published rule. won: of a class list, the pixels that each mask takes in the map
    of classes, where these are not all of its pixels.
    """

    question: str
    asked: list[str]
    targets: NotRequired[list[int]]
    text: str
    claims: list[tuple[str, int | None]]
    masks: list[dict[str, Any]]
    finished: bool
    unread: int
    scores: NotRequired[list[float]]
    substitutes: NotRequired[list[int]]
    released: NotRequired[list[tuple[str, int | None, int | None]]]
    won: NotRequired[list[dict[str, Any] | None]]


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
        masks = len(answer["masks"])
        for claim in answer["claims"]:
            if not isinstance(claim, list) or len(claim) != 2 or not isinstance(claim[0], str):
                raise ValueError(f"{place}: a claim is [phrase, mask], got {_shortened(claim)}")
            _mask_number(claim[1], masks, place)
        for claim in answer.get("released", ()):
            if not isinstance(claim, list) or len(claim) != 3 or not isinstance(claim[0], str):
                raise ValueError(f"{place}: a released claim is [phrase, mask, withheld], got {_shortened(claim)}")
            for number in claim[1:]:
                _mask_number(number, masks, place)
        for name in ("scores", "won"):
            if name in answer and len(answer[name]) != masks:
                raise ValueError(f"{place}: {len(answer[name])} {name} of {masks} masks")
    return line


def _mask_number(value: Any, masks: int, place: str) -> None:
    if value is not None and not (_count(value) and value < masks):
        raise ValueError(f"{place}: claims mask {_shortened(value)} of {masks}")


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


def is_score(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    "scores": (lambda value: isinstance(value, list) and all(map(is_score, value)), "a list of numbers", False),
    "substitutes": (_list_of(int), "a list of whole numbers", False),
    "released": (lambda value: isinstance(value, list), "a list", False),
    "won": (
        lambda value: isinstance(value, list) and all(part is None or isinstance(part, dict) for part in value),
        "a list of RLEs",
        False,
    ),
}


def _shortened(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."
