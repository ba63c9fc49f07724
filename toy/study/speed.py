"""Milliseconds per query of every trained system: one thread, one image at a time, the systems taking turns.

    python -m toy.study.speed --runs lisa=OUT/lisa/train gsva=OUT/gsva/train --dataset_dir OUT/dataset --out FILE

A query is a phrase (read the image, encode it, generate the answer, decode the mask), or a full label set in as many
questions as the system needs. Medians of interleaved queries: other load on the machine affects all systems equally.
"""

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
from toy.study.exam import CLASSES, LIST_SUITE
from utils.files import write_atomically
from utils.log import setup_logging

PHRASES, LISTS, WARM_UP = 40, 20, 3  # timed queries of each kind; untimed rounds before them
PHRASE_SUITE = "refcoco|unc|val"
Request = Callable[[Predictor], object]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m toy.study.speed", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=RUN", help="run folders of train_ds.py")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="the toy data set")
    parser.add_argument("--out", type=Path, required=True, help="file for the figures")
    parser.add_argument("--most", type=int, default=0, help="upper limit of queries per kind (default 0: none)")
    return parser.parse_args(argv)


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


if __name__ == "__main__":
    raise SystemExit(main())
