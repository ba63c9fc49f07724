"""Runs suites: pictures in batches, each encoded once for all its questions, every prediction written at once."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.collate import NothingToAsk, Sample, load_views, rasterize_ignored, rasterize_target
from data.mixture import LOGGED_SKIPS, MISTAKES, ON_BAD_SAMPLE
from data.sources import Source
from data.sources.base import first_of
from data.types import Query, Record
from evaluation import identity
from evaluation.catalog import Suite
from evaluation.identity import NotNumbers
from evaluation.metrics.counts import STANDARD
from evaluation.metrics.scorers import SCORERS, is_present
from evaluation.prediction_schema import reading
from evaluation.predictions import LEFT_OUT, Prediction, PredictionFile, prediction, predictions, settings_of
from evaluation.protocols import FORCED, GENERATED, Protocol, Reply, protocol_named
from evaluation.questions import notes, questions
from evaluation.report.markdown import as_markdown, format_interval, format_value
from evaluation.suites import find_suites
from systems.assistant import Assistant
from utils import dist
from utils.config import Recipe, SuiteConfig
from utils.files import write_atomically
from utils.log import log
from utils.registry import unknown

WAITING = 4  # pictures whose answers wait to be scored and written, their masks on the device
KEPT_OPTIONS = (
    "classes",
    "table",
    "version",
    "ignore_unknown",
    "overlap",
    "bad_polygons",
)  # what training and scoring must agree on


class BrokenSuite(ValueError):
    """A picture or annotation that cannot be read ended a suite; its predictions so far are kept."""


@dataclass(frozen=True)
class EvalItem:
    """A picture ready to be asked about: facts, questions, views. left_out: why it cannot be, and then nothing else."""

    index: int
    record: Record | None = None
    queries: list[Query] = field(default_factory=list)
    sample: Sample | None = None
    left_out: str = ""


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
    resume: bool = False,
    custom: Sequence[SuiteConfig] = (),
    on_bad_sample: str | None = None,
) -> dict[str, Any]:
    """Scores the suites (names, groups, globs); each figure of the results names its metric, variant and protocol.

    limit: pictures a suite, 0 for all. batch_size: pictures a batch. classes: a class-list file for the semantic
    suites, `{source}` in it stands for the source's name; without it the recipe's class lists count.
    out_dir: gets results.json and a folder of predictions, one JSON line a picture. resume: predictions that are there
    already, made with the same weights, data and settings, are kept; the results are those of a run without a break.
    custom: suites beside those of the catalog, to be named in `suites`. on_bad_sample: what a record that cannot be
    read, or whose mask is empty, means: "raise" gives the suite up, "skip" leaves the picture out and counts it; None:
    what the recipe says. A picture that nothing can be asked about (no labelled pixel) is left out and counted.
    A suite without its data is reported under `missing`, and the others go on. NotNumbers is raised where weights or
    masks are NaN. Run on all processes: each scores its share, all return the whole.
    """
    protocol_named(protocol)  # an unknown one raises with the choices
    on_bad_sample = on_bad_sample or assistant.recipe.data.on_bad_sample
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise ValueError(unknown("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE))
    if limit < 0 or batch_size < 1:
        raise ValueError(f"limit must be 0 (all) or more and batch_size 1 or more, got {limit} and {batch_size}")
    identity.check_finite(assistant.model)
    results: dict[str, Any] = {"protocol": protocol, "limit": limit, "suites": {}, "missing": {}}
    folder, root, skip = Path(out_dir) if out_dir else None, Path(dataset_dir), on_bad_sample == "skip"
    known = identity.of_assistant(assistant) if folder else {}
    training = assistant.model.training
    assistant.model.eval()
    try:
        for suite in find_suites(suites, custom):
            try:
                options = source_options(assistant.recipe, suite, classes)
                source, how = (
                    suite.open(root, options),
                    suite.teacher_forced_protocol if protocol == FORCED else protocol,
                )
                done = first_of(source, partial(notes, suite, assistant.system, how)) or []
                settings = {**known, **identity.of_data(suite, source, root, options)} if folder else {}
            except (OSError, ValueError) as error:
                log.warning("%s cannot be evaluated: %s", suite.name, error)
                results["missing"][suite.name] = str(error)
                continue
            for note in done:
                log.info("%s: %s", suite.name, note)
            run = SuiteEvaluation(
                assistant, suite, source, how, protocol_named(how), batch_size, max_new_tokens, workers, done, skip
            )
            journal = PredictionFile(folder / "predictions" if folder else None, suite.name)
            try:
                results["suites"][suite.name] = run(limit, journal, settings, resume=resume)
            except BrokenSuite as error:
                log.warning("%s was given up: %s", suite.name, error)
                results["missing"][suite.name] = f"given up: {error}"
    finally:
        assistant.model.train(training)
    if folder and dist.is_main():
        write_results(results, folder)
    return results


def write_results(results: dict[str, Any], folder: Path) -> None:
    """results.json with everything, results.md to be read."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.md", as_markdown(results), errors="backslashreplace")
    write_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")


def rescore(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The results of files (or folders) of predictions, every metric and variant, without model or data."""
    suites, found = {}, predictions(paths)
    settings = settings_of(paths)
    for name, lines in found.items():
        if (metric := lines[0]["metric"]) not in SCORERS:
            raise ValueError(f"{name}: {unknown('metric', metric, SCORERS)}")
        with reading(name):
            score = SuiteScore(metric)
            for line in lines:
                score.add(line)
            suites[name] = score.result(lines[0]["protocol"], settings.get(name, {}).get("records", 0))
    models = {name: settings[name].get("weights") for name in suites if name in settings}
    if len(set(models.values())) > 1:  # one table of several models must say so
        for name, weights in models.items():
            suites[name]["notes"].append(f"of the weights {weights}; the suites here are not all of the same")
    return {"from": [str(path) for path in paths], "suites": suites, "missing": {}}


def summary(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Suite -> metric -> value, standard variant only: what a log takes and a best checkpoint is chosen by."""
    return {
        name: {figure["metric"]: figure["value"] for figure in suite["figures"] if figure["variant"] == STANDARD}
        for name, suite in results["suites"].items()
    }


def as_table(results: dict[str, Any]) -> str:
    """Every figure on a line of its own, with suite, variant and protocol."""
    wide = max([24, *(len(name) + 2 for name in results["suites"])])
    lines = [f"{'suite':<{wide}}{'metric':<18}{'variant':<13}{'protocol':<16}{'value':>8}  pictures  95 % interval"]
    for name, suite in results["suites"].items():
        for figure in suite["figures"]:
            value = format_value(figure["value"])
            lines.append(
                f"{name:<{wide}}{figure['metric']:<18}{figure['variant']:<13}{figure['protocol']:<16}{value:>8}"
                f"  {suite['pictures']:<8}  {format_interval(figure)}".rstrip()
            )
        lines += [f"  {name}: {note}" for note in suite["notes"]]
        troubles = {key: suite[key] for key in ("left_out", "parse_failures", "unfinished") if suite[key]}
        if troubles:
            lines.append(f"  {name}: " + ", ".join(f"{key} {count}" for key, count in troubles.items()))
    lines += [f"{name}: not evaluated. {message}" for name, message in results["missing"].items()]
    return "\n".join(lines)


def source_options(recipe: Recipe, suite: Suite, classes: str | None = None) -> dict[str, Any]:
    """What the recipe says of the suite's source and scoring must share, such as the class list, or `classes`."""
    mixed = () if suite.own else recipe.data.mixture
    sets = [item for task in mixed for item in task.sets if item.source.split("|")[0] == suite.base]
    options: dict[str, Any] = {}
    for key, value in ((key, value) for item in sets for key, value in item.options.items() if key in KEPT_OPTIONS):
        if options.setdefault(key, value) != value and not (classes and key == "classes"):
            raise ValueError(
                f"suite {suite.name}: the recipe's sets of {suite.base} do not agree on {key} ({options[key]!r} and "
                f"{value!r}), so which one it is scored with is open; define the suite in eval.custom"
            )
    if classes and suite.metric == "semantic":
        options["classes"] = classes.replace("{source}", suite.base)
    return options


@dataclass
class SuiteEvaluation:
    """One suite on this process."""

    assistant: Assistant
    suite: Suite
    source: Source
    protocol: str
    answer: Protocol
    batch_size: int
    max_new_tokens: int
    workers: int
    notes: list[str]
    skip: bool  # a bad record is left out and counted; else it ends the suite

    def __call__(
        self, limit: int, journal: PredictionFile, settings: dict[str, Any], *, resume: bool
    ) -> dict[str, Any]:
        """Answers, counts and writes this process's share; returns the figures of all shares together."""
        score, number = SuiteScore(self.suite.metric), min(limit or len(self.source), len(self.source))
        batches = [range(number)[start : start + self.batch_size] for start in range(0, number, self.batch_size)]
        settings = {
            **settings,
            "suite": self.suite.name,
            "protocol": self.protocol,
            "records": len(self.source),
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
        }
        with journal:
            kept, open_batches = journal.begin(settings, batches, resume=resume)
            for line in kept:
                score.add(line)

            def finish(answered: tuple[EvalItem, list[Reply], float]) -> None:
                line = self._line(*answered)
                score.add(line)
                journal.write(line)
                if (why := answered[0].left_out) and len(score.left_out) <= LOGGED_SKIPS:
                    log.warning("%s: left out: %s", self.suite.name, why)

            try:
                run_in_background(finish, self._answers(open_batches[dist.rank() :: dist.world_size()]))
            except (OSError, ValueError) as error:
                score.broken = str(error)  # the other processes are told when they are done
        score, *others = dist.all_gather(score)
        for other in others:
            score.merge(other)
        if score.broken:
            raise BrokenSuite(score.broken)
        if not score.pictures:
            raise BrokenSuite(f"none of its {number} pictures can be scored; {score.why_left_out()}")
        if 2 * score.unfinished > score.queries:
            log.warning(
                "%s: %d of %d answers do not end within max_new_tokens=%d; they are scored as far as they go",
                *(self.suite.name, score.unfinished, score.queries, self.max_new_tokens),
            )
        return score.result(self.protocol, len(self.source))

    def _answers(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[EvalItem, list[Reply], float]]:
        """Each picture with the answers about it and the seconds they took, in order."""
        total = sum(map(len, batches))
        with tqdm(total=total, desc=self.suite.name, disable=not dist.is_main(), leave=False) as bar:
            for batch in prefetch(self._load, batches, self.workers):
                items = [item for item in batch if not item.left_out]
                yield from ((item, [], 0.0) for item in batch if item.left_out)
                started = time.monotonic()
                samples, queries = [item.sample for item in items], [item.queries for item in items]
                replies = self.answer(self.assistant, samples, queries, self.max_new_tokens) if items else []
                seconds = (time.monotonic() - started) / max(1, len(items))
                for item, mine in zip(items, replies, strict=True):
                    yield item, mine, seconds
                bar.update(len(batch))

    def _load(self, indices: Sequence[int]) -> list[EvalItem]:
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> EvalItem:
        """A picture with its questions. All that can be wrong with the data shows here, before the model answers."""
        try:
            record = self.source[index]
            queries = questions(record, self.assistant.system)
            if not queries:
                raise NothingToAsk(f"{record.image}: {self.assistant.system.name} asks nothing about it")
            item = EvalItem(index, record, queries, load_views(record.image, self.assistant.views))
            for target in {target for query in queries for target in query.targets if is_present(record, target)}:
                rasterize_target(record, target, item.sample.geometry.original)
            rasterize_ignored(record, item.sample.geometry.original)
            return item
        except NothingToAsk as error:
            return EvalItem(index, left_out=str(error))
        except MISTAKES:
            raise
        except Exception as error:  # a damaged file raises what its reader happens to raise
            told = isinstance(error, (OSError, ValueError))
            why = f"record {index}: {error if told else f'{type(error).__name__}: {error}'}"
            if not self.skip:
                raise BrokenSuite(f"{why} (on_bad_sample: skip leaves it out and counts it)") from error
            return EvalItem(index, left_out=why)

    def _line(self, item: EvalItem, replies: list[Reply], seconds: float) -> Prediction:
        if item.left_out:
            counts = {LEFT_OUT: item.left_out, "unmatched": 0}
        else:
            self._check_masks(item, replies)
            released = self.assistant.system.released_truth
            metric = SCORERS[self.suite.metric]
            counts = metric.count(item.record, item.queries, replies, self.protocol, released)
        return {
            "suite": self.suite.name,
            "metric": self.suite.metric,
            "index": item.index,
            "image": str(item.record.image) if item.record else "",
            "protocol": self.protocol,
            "notes": self.notes,
            "seconds": round(seconds, 4),
            "counts": counts,
            "answers": [prediction(query, reply) for query, reply in zip(item.queries, replies, strict=True)],
        }

    def _check_masks(self, item: EvalItem, replies: list[Reply]) -> None:
        for query, reply in zip(item.queries, replies, strict=True):
            if reply.masks.isnan().any():
                raise NotNumbers(
                    f"{self.suite.name}: {item.record.image}: the masks of the answer to {query.question!r} hold NaN; "
                    f"{self.assistant.model.dtype} may be too narrow, try --precision fp32"
                )


class SuiteScore:
    """The figures of one suite from lines of predictions, and what a run went through to make them."""

    def __init__(self, metric: str):
        self.scorer = SCORERS[metric]()
        self.pictures = 0
        self.queries = 0
        self.parse_failures = 0  # claims that name nothing asked for, or a mask that is not there
        self.unfinished = 0  # answers cut off at the token limit
        self.seconds = 0.0  # of answering, summed over the processes
        self.notes: list[str] = []  # what was done otherwise than the suite expects
        self.broken = ""  # what was wrong with the data, where that ended it
        self.left_out: dict[int, str] = {}  # pictures that are not scored, and why

    def add(self, line: Prediction) -> None:
        if LEFT_OUT in line["counts"]:
            self.left_out[line["index"]] = line["counts"][LEFT_OUT]
            return
        answers = line["answers"]
        self.scorer.add(line["counts"])
        self.pictures += 1
        self.queries += len(answers)
        self.parse_failures += line["counts"]["unmatched"] + sum(answer["unread"] for answer in answers)
        self.unfinished += sum(not answer["finished"] for answer in answers)
        self.seconds += line["seconds"]
        self.notes = line.get("notes", self.notes)

    def merge(self, other: SuiteScore) -> None:
        self.scorer.merge(other.scorer)
        for name in ("pictures", "queries", "parse_failures", "unfinished", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.notes = self.notes or other.notes
        self.broken = self.broken or other.broken
        self.left_out |= other.left_out

    def why_left_out(self) -> str:
        return f"{len(self.left_out)} left out, the first: {self.left_out[min(self.left_out)]}"

    def result(self, protocol: str, records: int = 0) -> dict[str, Any]:
        """records: how many pictures the suite has, 0 where that is not known."""
        notes = [self.why_left_out()] if self.left_out else []
        if (seen := self.pictures + len(self.left_out)) < records:
            notes.append(f"{seen} of {records} pictures only")
        return {
            "figures": [{**vars(figure), "protocol": protocol} for figure in self.scorer.figures()],
            "pictures": self.pictures,
            "left_out": len(self.left_out),
            "queries": self.queries,
            "parse_failures": self.parse_failures,
            "unfinished": self.unfinished,
            "seconds": round(self.seconds, 3),
            "notes": [*self.notes, *notes],
            **self.scorer.details(),
        }


def run_in_background(function: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Calls it with each item in a thread, in order, while the next is made; at most WAITING wait.

    What was made before an error, on either side, is still dealt with; then the error is raised.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > WAITING:
                waiting.popleft().result()
        for future in waiting:
            future.result()


def prefetch(function: Any, items: Iterable[Any], workers: int) -> Iterator[Any]:
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
