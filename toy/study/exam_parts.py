"""The parts of the evaluation of the study, and what each asks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from evaluation.protocols import GENERATED
from evaluation.runner import evaluate
from systems.assistant import Assistant, load
from toy.study.questions import DatasetQuestions, ListQuestions, with_questions
from utils.files import write_atomically
from utils.log import setup_logging

CLASSES = "toy_classes/{source}.txt"  # the classes of each label set that the toy world has
LIST_SUITE, MULTI_SUITE = "ade20k|val", "muse|val"
WHOLE, OWN, SHIPPED = "whole", "own", "shipped"  # parts: the full class list; own prompts; the data set's questions
LISTS = {"present": 0.0, "half": 1.0, "double": 2.0}  # part -> number of absent classes in the list per present class
SUITES = {  # evaluated with each system's own prompts: suite -> images, fewer where an image has many questions
    "cocostuff|val": 20,
    "cityscapes|val": 20,
    "mapillary|val": 20,
    "refcoco|unc|val": 40,
    "refcoco+|unc|val": 15,
    "refcocog|umd|val": 15,
    "refclef|unc|val": 15,
    "grefcoco|unc|val": 60,
    "refzom|final|test": 30,
    "fprefcoco|berkeley_exclude_unified|val": 24,
    "fprefcoco+|berkeley_exclude_unified|val": 10,
    "fprefcocog|berkeley_exclude_unified|val": 10,
    "R-refcoco|unc_exclude_unified|val": 10,
    "R-refcoco+|unc_exclude_unified|val": 10,
    "R-refcocog|umd_exclude_unified|val": 10,
    "ReasonSeg|val": 60,
    "muse|val": 40,
}
LIST_IMAGES = MULTI_IMAGES = 40


def run(args: argparse.Namespace) -> int:
    """Evaluates all parts and writes args.out/exam.json; returns the exit status."""
    setup_logging()
    assistant = load(args.run, checkpoint="last")
    parts = LIST_PARTS if args.lists_only else PARTS
    report = {part.name: evaluate_part(assistant, part, args) for part in parts}
    file = args.out / "exam.json"
    write_atomically(file, json.dumps(report, indent=1) + "\n")  # where it is, the row is done
    return 0


@dataclass(frozen=True)
class Part:
    """Suites with their numbers of images, evaluated with one way of asking."""

    name: str
    suites: dict[str, int]
    ask: Callable[[Assistant], Assistant] = lambda assistant: assistant


def _ask_lists(assistant: Assistant, absent: float) -> Assistant:
    return with_questions(assistant, ListQuestions(assistant.system.task, absent))


def _ask_dataset_questions(assistant: Assistant) -> Assistant:
    return with_questions(assistant, DatasetQuestions())


LIST_PARTS = (
    Part(WHOLE, {LIST_SUITE: LIST_IMAGES}),
    *(Part(name, {LIST_SUITE: LIST_IMAGES}, partial(_ask_lists, absent=absent)) for name, absent in LISTS.items()),
)
PARTS = (*LIST_PARTS, Part(SHIPPED, {MULTI_SUITE: MULTI_IMAGES}, _ask_dataset_questions), Part(OWN, SUITES))


def evaluate_part(assistant: Assistant, part: Part, args: argparse.Namespace) -> dict[str, Any]:
    """Suite -> its standard figures, with the numbers of images and questions; missing data ends the program."""
    figures: dict[str, Any] = {}
    for suite, images in part.suites.items():
        results = evaluate(
            part.ask(assistant),
            [suite],
            args.dataset_dir,
            GENERATED,
            min(images, args.most or images),
            args.out / part.name,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            workers=0,
            classes=CLASSES,
            resume=True,
        )
        if results.missing:
            raise SystemExit("\n".join(f"{name}: {message}" for name, message in results.missing.items()))
        (scored,) = results.suites.values()
        counts = {"pictures": scored.images, "queries": scored.queries, "unfinished": scored.unfinished}
        figures[suite] = {**scored.values(), **counts}
        print(f"{part.name} {suite}: {figures[suite]}", flush=True)
    return figures
