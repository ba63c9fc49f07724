"""What a suite asks, whoever answers: questions without any system's wording, their names, and a file of them.

{"query": "refcoco|unc|val/12/0", "suite": "refcoco|unc|val", "image": "refer_seg/images/.../x.jpg", "image_id": 12,
 "height": 480, "width": 640, "kind": "refer", "question": "the left man", "phrases": ["the left man"]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.collate import NothingToAsk
from data.mixture import LOGGED_SKIPS, MISTAKES, ON_BAD_SAMPLE, error_text
from data.sources import Source
from data.sources.base import image_size
from data.types import IMAGE_PLACEHOLDER, Mask, Query, Record
from evaluation.catalog import Suite
from evaluation.runner import BrokenSuite, source_options
from evaluation.suites import find_suites
from systems.targets import label_set
from utils.config import Recipe, SuiteConfig
from utils.files import open_atomically
from utils.log import log
from utils.registry import unknown

COCO_NAME = re.compile(r"(?:\w+_)?(\d{12})")  # of an image of COCO, whose number it is


@dataclass(frozen=True)
class Asked:
    """One question about an image.

    number: of the question among those about its image: the index of its first target; 0 of a class list, the place of
    a question in words (vqa). query: the question as it is scored. phrases: what is asked for, as far as the question
    says it; () where finding out is part of the answer.
    """

    number: int
    query: Query
    phrases: tuple[str, ...]
    is_list: bool = False  # of classes, any of which may be in the image


def asked_about(record: Record) -> list[Asked]:
    """The questions about a record. NothingToAsk where there is none: no labelled pixel."""
    if record.kind == "classes":
        label_set(record)  # raises where nothing is labelled, as for every system
        names = tuple(record.vocabulary)
        return [Asked(0, Query(", ".join(names), (), (), names), names, is_list=True)]
    if record.kind == "vqa":
        return [
            Asked(place, Query(plain_question(dialogue[0].question), ()), ())
            for place, dialogue in enumerate(record.dialogues)
        ]
    if record.kind == "multi":
        return [_of_dialogue(record, turn.question, turn.answer) for (turn,) in record.dialogues]
    phrases = [target.phrase.strip() for target in record.targets]
    return [Asked(place, Query(phrase, (), (place,), (phrase,)), (phrase,)) for place, phrase in enumerate(phrases)]


def query_id(suite: str, index: int, number: int) -> str:
    """The name of a question in every file: `suite/index/number`; index is that of the record in the suite."""
    return f"{suite}/{index}/{number}"


def image_id(image: str | Path, index: int) -> int:
    """The number of an image in COCO files: COCO's own, where the file is named after it, else its record's index."""
    found = COCO_NAME.fullmatch(Path(image).stem)
    return int(found[1]) if found else index


def image_name(image: str | Path, root: str | Path) -> str:
    """The path of an image below the dataset folder, with forward slashes; outside of it the full path."""
    path = Path(image)
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def plain_question(question: str) -> str:
    """A question without the placeholder of the image."""
    return question.replace(IMAGE_PLACEHOLDER, "").strip()


def question_lines(
    suite: Suite, source: Source, root: Path, limit: int = 0, *, skip_bad: bool = False
) -> Iterator[dict[str, Any]]:
    """The lines of a suite's questions, of its first `limit` images (0: all). Nothing in them tells the truth.

    skip_bad: a record or image that cannot be read is left out, as in an evaluation; else it raises BrokenSuite.
    """
    left_out = 0
    for index in range(min(limit or len(source), len(source))):
        try:
            record = source[index]
            questions = asked_about(record)
            height, width = image_size(record.image)
        except NothingToAsk as error:
            log.warning("%s: not asked: %s", suite.name, error)
            continue
        except MISTAKES:
            raise
        except Exception as error:  # a damaged file raises what its reader happens to raise
            reason = f"{suite.name}: record {index}: {error_text(error)}"
            if not skip_bad:
                raise BrokenSuite(f"{reason} (--on_bad_sample skip leaves it out)") from error
            left_out += 1
            if left_out <= LOGGED_SKIPS:
                log.warning("left out: %s", reason)
            continue
        for asked in questions:
            line = {
                "query": query_id(suite.name, index, asked.number),
                "suite": suite.name,
                "image": image_name(record.image, root),
                "image_id": image_id(record.image, index),
                "height": height,
                "width": width,
                "kind": record.kind,
                "question": asked.query.question,
            }
            yield line | ({"phrases": list(asked.phrases)} if asked.phrases else {})


def write_questions(
    file: Path,
    suites: Sequence[str],
    dataset_dir: str | Path,
    *,
    limit: int = 0,
    classes: str | None = None,
    custom: Sequence[SuiteConfig] = (),
    on_bad_sample: str = "raise",
) -> int:
    """Writes the questions of suites as JSON lines and returns their number. Raises what `Suite.open` raises.

    limit: images per suite, 0: all. classes: a class-list file for the semantic suites, `{source}` as in `evaluate`.
    on_bad_sample: "skip" leaves out records and images that cannot be read, with a warning.
    """
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise ValueError(unknown("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE))
    skip_bad = on_bad_sample == "skip"
    root = Path(dataset_dir)
    count = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(file) as lines:
        for suite in find_suites(suites, custom):
            source = suite.open(root, source_options(Recipe(), suite, classes), keep_faults=skip_bad)
            for line in question_lines(suite, source, root, limit, skip_bad=skip_bad):
                lines.write(json.dumps(line) + "\n")
                count += 1
    return count


def _of_dialogue(record: Record, question: str, answer: Sequence[Any]) -> Asked:
    """A question about several objects. One without words of its own asks for them by their names."""
    targets = tuple(part.target for part in answer if isinstance(part, Mask))
    phrases = tuple(record.targets[target].phrase.strip() for target in targets)
    text = plain_question(question) or ", ".join(phrases)
    return Asked(targets[0] if targets else 0, Query(text, (), targets, phrases), () if question else phrases)
