"""Runs suites: pictures in batches, each encoded once for all its questions, every prediction written at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from data.collate import Sample, look
from data.sources import Source
from data.types import Query, Record
from evaluation.metrics import STANDARD
from evaluation.protocols import FORCED, GENERATED, Protocol, Reply, protocol_named
from evaluation.scoring import SCORERS
from evaluation.suites import Suite, find_suites
from systems.assistant import Assistant
from utils import dist
from utils.config import Recipe
from utils.log import log
from utils.masks import encode_rle

KEPT_OPTIONS = (
    "classes",
    "table",
    "version",
    "ignore_unknown",
    "overlap",
    "bad_polygons",
)  # what training and scoring must agree on


@dataclass(frozen=True)
class Item:
    """A picture ready to be asked about: facts, questions, views."""

    index: int
    record: Record
    queries: list[Query]
    sample: Sample


def evaluate(
    assistant: Assistant,
    suites: Sequence[str],
    dataset_dir: str | Path,
    protocol: str = GENERATED,
    limit: int = 0,
    out_dir: str | Path | None = None,
    *,
    batch_size: int = 1,
    max_new_tokens: int = 512,
    workers: int = 2,
    classes: str | None = None,
) -> dict[str, Any]:
    """Scores the suites (names, groups, globs); each figure of the results names its metric, variant and protocol.

    limit: pictures a suite, 0 for all. batch_size: pictures a batch. classes: a class-list file for the semantic
    suites, `{source}` in it stands for the source's name; without it the recipe's class lists count.
    out_dir: gets results.json and a folder of predictions, one JSON line a picture. A suite without its data is
    reported under `missing`, and the others go on. Run on all processes: each scores its share, all return the whole.
    """
    protocol_named(protocol)  # an unknown one raises with the choices
    results: dict[str, Any] = {"protocol": protocol, "limit": limit, "suites": {}, "missing": {}}
    folder = Path(out_dir) if out_dir else None
    training = assistant.model.training
    assistant.model.eval()
    try:
        for suite in find_suites(suites):
            try:
                source = suite.open(dataset_dir, source_options(assistant.recipe, suite, classes))
            except (FileNotFoundError, ValueError) as error:
                log.warning("%s cannot be evaluated: %s", suite.name, error)
                results["missing"][suite.name] = str(error)
                continue
            how = suite.forced if protocol == FORCED else protocol
            run = Run(assistant, suite, source, how, protocol_named(how), batch_size, max_new_tokens, workers)
            results["suites"][suite.name] = run(limit, folder / "predictions" if folder else None)
    finally:
        assistant.model.train(training)
    if folder and dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def summary(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Suite -> metric -> value, standard variant only: what a log takes and a best checkpoint is chosen by."""
    return {
        name: {figure["metric"]: figure["value"] for figure in suite["figures"] if figure["variant"] == STANDARD}
        for name, suite in results["suites"].items()
    }


def as_table(results: dict[str, Any]) -> str:
    """Every figure on a line of its own, with suite, variant and protocol."""
    wide = max([24, *(len(name) + 2 for name in results["suites"])])
    lines = [f"{'suite':<{wide}}{'metric':<18}{'variant':<13}{'protocol':<16}{'value':>8}  pictures"]
    for name, suite in results["suites"].items():
        for figure in suite["figures"]:
            value = "-" if figure["value"] is None else f"{figure['value']:.4f}"
            lines.append(
                f"{name:<{wide}}{figure['metric']:<18}{figure['variant']:<13}{figure['protocol']:<16}{value:>8}"
                f"  {suite['pictures']}"
            )
        troubles = {key: suite[key] for key in ("parse_failures", "unfinished") if suite[key]}
        if troubles:
            lines.append(f"  {name}: " + ", ".join(f"{key} {count}" for key, count in troubles.items()))
    lines += [f"{name}: not evaluated. {message}" for name, message in results["missing"].items()]
    return "\n".join(lines)


def source_options(recipe: Recipe, suite: Suite, classes: str | None = None) -> dict[str, Any]:
    """What the recipe says of the suite's source and scoring must share, such as the class list, or `classes`."""
    sets = [item for task in recipe.data.mixture for item in task.sets if item.source.split("|")[0] == suite.base]
    options = {key: value for item in sets for key, value in item.options.items() if key in KEPT_OPTIONS}
    if classes and suite.metric == "semantic":
        options["classes"] = classes.replace("{source}", suite.base)
    return options


@dataclass
class Run:
    """One suite on this process."""

    assistant: Assistant
    suite: Suite
    source: Source
    protocol: str
    answer: Protocol
    batch_size: int
    max_new_tokens: int
    workers: int

    def __call__(self, limit: int, folder: Path | None) -> dict[str, Any]:
        """Answers, counts and writes this process's share; returns the figures of all shares together."""
        scorer, tally, started = SCORERS[self.suite.metric](), Tally(), time.monotonic()
        number = min(limit or len(self.source), len(self.source))
        mine = range(number)[dist.rank() :: dist.world_size()]
        lines = self._lines(mine, tqdm(total=len(mine), desc=self.suite.name, disable=not dist.is_main(), leave=False))
        with Sink(folder, self.suite.name) as sink:
            for line in lines:
                scorer.add(line["counts"])
                tally.add(line)
                sink.write(line)
        scorer, *others = dist.gather(scorer)
        tally, *tallies = dist.gather(tally)
        for other, more in zip(others, tallies, strict=True):
            scorer.merge(other)
            tally.merge(more)
        figures = [{**vars(figure), "protocol": self.protocol} for figure in scorer.figures()]
        seconds = round(time.monotonic() - started, 3)
        return {"figures": figures, **vars(tally), "seconds": seconds, **scorer.details()}

    def _lines(self, indices: Sequence[int], bar: tqdm) -> Iterator[dict[str, Any]]:
        """One JSON-able line a picture, in order."""
        groups = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        with bar:
            for items in ahead(self._load, groups, self.workers):
                started = time.monotonic()
                samples, queries = [item.sample for item in items], [item.queries for item in items]
                replies = self.answer(self.assistant, samples, queries, self.max_new_tokens)
                seconds = (time.monotonic() - started) / len(items)
                for item, mine in zip(items, replies, strict=True):
                    yield self._line(item, mine, seconds)
                bar.update(len(items))

    def _load(self, indices: Sequence[int]) -> list[Item]:
        items = []
        for index in indices:
            record = self.source[index]
            queries = self.assistant.system.task.queries(record)
            if not queries:
                raise ValueError(f"{record.image}: {self.assistant.system.name} asks nothing about it")
            items.append(Item(index, record, queries, look(record.image, self.assistant.views)))
        return items

    def _line(self, item: Item, replies: list[Reply], seconds: float) -> dict[str, Any]:
        counts = SCORERS[self.suite.metric].count(item.record, item.queries, replies, self.protocol)
        return {
            "suite": self.suite.name,
            "index": item.index,
            "image": str(item.record.image),
            "protocol": self.protocol,
            "seconds": round(seconds, 4),
            "counts": counts,
            "answers": [(query, reply) for query, reply in zip(item.queries, replies, strict=True)],
        }


@dataclass
class Tally:
    """What a run went through: pictures, questions, and what went wrong in answers."""

    pictures: int = 0
    queries: int = 0
    parse_failures: int = 0  # claims that name nothing asked for, or a mask that is not there
    unfinished: int = 0  # answers cut off at the token limit

    def add(self, line: dict[str, Any]) -> None:
        replies = [reply for _, reply in line["answers"]]
        self.pictures += 1
        self.queries += len(replies)
        self.parse_failures += line["counts"]["unmatched"] + sum(reply.unread for reply in replies)
        self.unfinished += sum(not reply.finished for reply in replies)

    def merge(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Sink:
    """Predictions as JSON lines, each flushed when its picture is done; without a folder nothing is written.

    Several processes write a file each: `<suite>.jsonl`, `<suite>.1.jsonl`, ...
    """

    def __init__(self, folder: Path | None, suite: str):
        self._file: TextIO | None = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            part = f".{dist.rank()}" if dist.rank() else ""
            self._file = (folder / f"{suite.replace('|', '_')}{part}.jsonl").open("w", encoding="utf-8")

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()

    def write(self, line: dict[str, Any]) -> None:
        if self._file:
            answers = [prediction(query, reply) for query, reply in line["answers"]]
            self._file.write(json.dumps({**line, "answers": answers}) + "\n")
            self._file.flush()


def prediction(query: Query, reply: Reply) -> dict[str, Any]:
    """One answer as JSON: text, claims as [phrase, mask], masks as RLE."""
    masks = (reply.masks > 0).to(torch.uint8).cpu().numpy()
    return {
        "question": query.question,
        "asked": list(query.asked),
        "text": reply.text,
        "claims": [[claim.phrase, claim.mask] for claim in reply.claims],
        "masks": [encode_rle(mask) for mask in masks],
        "finished": reply.finished,
        "unread": reply.unread,
    }


def ahead(function: Any, items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map` whose next results are made in threads meanwhile; without workers, when asked."""
    if workers < 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting, pending = iter(items), []
        for item in waiting:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()
