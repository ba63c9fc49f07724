"""Times queries of several trained systems, which take turns."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data.types import Record
from evaluation.predictor import Predictor
from evaluation.suites import find_suites
from toy.study.exam_parts import CLASSES, LIST_SUITE
from utils.files import write_atomically
from utils.log import setup_logging

PHRASES, LISTS, WARM_UP = 40, 20, 3  # timed queries of each kind; untimed rounds before them
PHRASE_SUITE = "refcoco|unc|val"
Request = Callable[[Predictor], object]


def run(args: argparse.Namespace) -> int:
    """Writes the medians of every run into args.out; returns the exit status."""
    setup_logging()
    torch.set_num_threads(1)
    runs = dict(item.split("=", 1) for item in args.runs)
    predictors = {
        name: Predictor.from_pretrained(run, checkpoint="last", max_new_tokens=160) for name, run in runs.items()
    }
    phrases = [_phrase_request(record) for record in _records(PHRASE_SUITE, args.dataset_dir, args.most or PHRASES)]
    lists = [_list_request(record) for record in _records(LIST_SUITE, args.dataset_dir, args.most or LISTS)]
    phrase_ms, list_ms = medians(predictors, phrases), medians(predictors, lists)
    report = {name: {"phrase_ms": phrase_ms[name], "list_ms": list_ms[name]} for name in predictors}
    write_atomically(args.out, json.dumps(report, indent=1) + "\n")
    return 0


def medians(predictors: dict[str, Predictor], requests: Sequence[Request]) -> dict[str, float]:
    """Name -> median milliseconds; all systems answer a query before the next one."""
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for number, request in enumerate([*requests[:WARM_UP], *requests]):
        for name, predictor in predictors.items():
            started = time.perf_counter()
            request(predictor)
            if number >= min(WARM_UP, len(requests)):
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


def _records(suite: str, dataset_dir: Path, number: int) -> list[Record]:
    (found,) = find_suites([suite])
    options = {"classes": CLASSES.format(source=found.base)} if found.metric == "semantic" else {}
    source = found.open(dataset_dir, options)
    return [source[index] for index in range(min(number, len(source)))]


def _phrase_request(record: Record) -> Request:
    return lambda predictor: predictor(record.image, [record.targets[0].phrase])


def _list_request(record: Record) -> Request:
    return lambda predictor: predictor.classes(record.image, record.vocabulary)
