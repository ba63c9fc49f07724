"""Evaluates a trained row: every toy benchmark, class lists of four kinds, multi-target questions, by generation.

    python -m toy.study.exam --run OUT/lisa/train --dataset_dir OUT/dataset --out OUT/lisa [--lists_only]

Writes below --out one folder per part (results.json, predictions) and exam.json, the figures of all parts. An
interrupted evaluation resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    setup_logging()
    assistant = load(args.run, checkpoint="last")
    parts = LIST_PARTS if args.lists_only else PARTS
    report = {part.name: evaluate_part(assistant, part, args) for part in parts}
    file = args.out / "exam.json"
    write_atomically(file, json.dumps(report, indent=1) + "\n")  # where it is, the row is done
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m toy.study.exam", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder of train_ds.py")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="the toy data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for answers and figures")
    parser.add_argument("--lists_only", action="store_true", help="class lists only, as for ablations")
    parser.add_argument("--most", type=int, default=0, help="upper limit of images per suite (default 0: none)")
    parser.add_argument("--batch_size", type=int, default=4, help="images per batch (default 4)")
    parser.add_argument("--max_new_tokens", type=int, default=160, help="token limit of an answer (default 160)")
    return parser.parse_args(argv)


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


if __name__ == "__main__":
    raise SystemExit(main())
