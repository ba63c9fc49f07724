"""What a file of predictions may hold. Such files are passed on, so each field is checked where it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LARGEST = 2**53  # of a count: beyond it, floats are not exact


def check_line(line: Any, where: str) -> dict[str, Any]:
    """The line, if it is a prediction of this program in every field that is read of it, else a ValueError."""
    _fields(line, LINE, where)
    _numbers(line["counts"], f"{where}: counts")
    _fields(line["counts"], COUNTS, f"{where}: counts")
    for number, answer in enumerate(line["answers"]):
        place = f"{where}: answers[{number}]"
        _fields(answer, ANSWER, place)
        for claim in answer["claims"]:
            if not isinstance(claim, list) or len(claim) != 2 or not isinstance(claim[0], str):
                raise ValueError(f"{place}: a claim is [phrase, mask], got {_shortened(claim)}")
            if claim[1] is not None and not (_count(claim[1]) and claim[1] < len(answer["masks"])):
                raise ValueError(f"{place}: claims mask {_shortened(claim[1])} of {len(answer['masks'])}")
    return line


@contextmanager
def reading(suite: str) -> Iterator[None]:
    """What goes wrong while the counts of a suite's lines are used becomes a ValueError that names the suite."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{suite}: its predictions are damaged or of another program ({reason})") from None


def _fields(values: Any, kinds: dict[str, tuple[Callable[[Any], bool], str, bool]], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: not a prediction of this program: expected a mapping, got {_shortened(values)}")
    for name, (fits, what, needed) in kinds.items():
        if name not in values and needed:
            raise ValueError(f"{where}: not a prediction of this program: no {name!r}")
        if name in values and not fits(values[name]):
            raise ValueError(f"{where}: {name} must be {what}, got {_shortened(values[name])}")


def _numbers(value: Any, where: str) -> None:
    """Counts and scores are finite, and none is below -1, which stands for none."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            _numbers(inner, where)
    elif isinstance(value, (int, float)) and not -1 <= value <= LARGEST:
        raise ValueError(f"{where}: {_shortened(value)} is not a count of pixels or things")


def _name(value: Any) -> bool:
    """Printed as it is: without control characters, which could give a terminal orders."""
    return isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _listed(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


NAME, COUNT, TEXT = "a name of printable characters", "a whole number from 0", "text"
LINE = {
    "suite": (_name, NAME, True),
    "metric": (_name, NAME, True),
    "protocol": (_name, NAME, True),
    "index": (_count, COUNT, True),
    "image": (lambda value: isinstance(value, str), TEXT, True),
    "seconds": (_duration, "a number of seconds", True),
    "counts": (lambda value: isinstance(value, dict), "a mapping", True),
    "answers": (_listed(dict), "a list of mappings", True),
    "notes": (lambda value: isinstance(value, list) and all(map(_name, value)), "a list of printable texts", False),
}
COUNTS = {"unmatched": (_count, COUNT, True), "classes": (_listed(str), "a list of names", False)}
ANSWER = {
    "question": (lambda value: isinstance(value, str), TEXT, True),
    "text": (lambda value: isinstance(value, str), TEXT, True),
    "asked": (_listed(str), "a list of texts", True),
    "claims": (lambda value: isinstance(value, list), "a list", True),
    "masks": (_listed(dict), "a list of RLEs", True),
    "finished": (lambda value: isinstance(value, bool), "true or false", True),
    "unread": (_count, COUNT, True),
    "targets": (_listed(int), "a list of whole numbers", False),
}


def _shortened(value: Any) -> str:
    return text if len(text := ascii(value)) <= 80 else f"{text[:80]} ..."
