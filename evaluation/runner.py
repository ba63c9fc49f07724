"""Runs suites: reads images in batches, has each answered once for all its questions, and writes every prediction."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.collate import NothingToAsk, Sample, load_views, rasterize_ignored, rasterize_target
from data.mixture import LOGGED_SKIPS, MISTAKES, ON_BAD_SAMPLE, error_text
from data.sources import Source
from data.sources.base import first_of
from data.types import Query, Record
from evaluation import identity
from evaluation.catalog import Suite
from evaluation.identity import NotNumbers
from evaluation.metrics import SCORERS
from evaluation.metrics.truth import is_present
from evaluation.prediction_schema import Prediction
from evaluation.predictions import PredictionFile, answers_of, left_out_line
from evaluation.prefetch import prefetch, run_in_background
from evaluation.protocols import FORCED, GENERATED, Protocol, Reply, protocol_named
from evaluation.questions import protocol_notes, questions
from evaluation.results import EvaluationResults, SuiteResult, write_results
from evaluation.score import SuiteScore
from evaluation.suites import find_suites
from systems.assistant import Assistant
from utils import dist
from utils.config import Recipe, SuiteConfig
from utils.log import log
from utils.registry import unknown

SHARED_OPTIONS = (  # of a source, which training and scoring must agree on
    "classes",
    "table",
    "version",
    "ignore_unknown",
    "overlap",
    "bad_polygons",
)


class BrokenSuite(ValueError):
    """An image or annotation that cannot be read ended a suite; the predictions so far are on disk."""


@dataclass(frozen=True)
class EvalItem:
    """An image ready to be asked about: its facts, questions and views."""

    index: int
    record: Record
    queries: list[Query]
    sample: Sample


@dataclass(frozen=True)
class LeftOut:
    """An image that is not asked about, and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class Answered:
    """An image with the answers about it, and the seconds that they took."""

    item: EvalItem
    replies: list[Reply]
    seconds: float


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
) -> EvaluationResults:
    """Scores the suites (names, groups, globs); each figure of the results names its metric and variant.

    limit: the number of images per suite, the first ones; 0: all. batch_size: images per batch. workers: threads that
    read images ahead. classes: a class-list file for the semantic suites, in which `{source}` stands for the source's
    name; default: the recipe's class lists.

    out_dir: gets results.json and a folder of predictions, one JSON line per image. resume: predictions that are there
    already, made with the same weights, data and settings, are used; the results are those of a run without a break.

    custom: suites in addition to those of the catalog, to be named in `suites`. on_bad_sample: what a record that
    cannot be read, or whose mask is empty, means: "raise" gives its suite up, "skip" leaves the image out and counts
    it; None: what the recipe says. An image that nothing can be asked about (no labelled pixel) is left out and counted
    in any case.

    A suite whose data are not there, for one of the processes, is reported in `missing`, and the others are evaluated.
    Raises NotNumbers where weights or masks are NaN. Must be called on all processes: each answers its share, all
    return the results of all.
    """
    protocol_named(protocol)  # an unknown one raises before anything is done
    on_bad_sample = on_bad_sample or assistant.recipe.data.on_bad_sample
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise ValueError(unknown("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE))
    if limit < 0 or batch_size < 1:
        raise ValueError(f"limit must be 0 (all) or more and batch_size 1 or more, got {limit} and {batch_size}")
    identity.check_finite(assistant.model)
    results = EvaluationResults(protocol=protocol, limit=limit)
    folder = Path(out_dir) if out_dir else None
    root = Path(dataset_dir)
    assistant_identity = identity.of_assistant(assistant) if folder else {}
    training = assistant.model.training
    assistant.model.eval()
    try:
        for suite in find_suites(suites, custom):
            failure: Exception | None = None
            try:
                options = source_options(assistant.recipe, suite, classes)
                source = suite.open(root, options, keep_faults=on_bad_sample == "skip")
                suite_protocol = suite.teacher_forced_protocol if protocol == FORCED else protocol
                answer = protocol_named(suite_protocol)
                notes = first_of(source, partial(protocol_notes, suite, assistant.system, suite_protocol)) or []
                settings = {**assistant_identity, **identity.of_data(suite, source, root, options)} if folder else {}
            except Exception as error:  # a damaged file raises what its reader happens to raise
                failure = error
            # What one process cannot open none begins: they would wait for it, or gather another suite's score.
            problem = "" if failure is None else error_text(failure) or type(failure).__name__
            gathered = dist.all_gather((problem, isinstance(failure, MISTAKES)))
            problems = [text for text, _ in gathered if text]
            if any(is_mistake for _, is_mistake in gathered):
                raise failure or RuntimeError(f"{suite.name}: another process cannot open it: {problems[0]}")
            if problems:
                log.warning("%s cannot be evaluated: %s", suite.name, problems[0])
                results.missing[suite.name] = problems[0]
                continue
            for note in notes:
                log.info("%s: %s", suite.name, note)
            run = SuiteEvaluation(
                assistant,
                suite,
                source,
                protocol=suite_protocol,
                answer=answer,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                workers=workers,
                notes=notes,
                skip_bad=on_bad_sample == "skip",
            )
            file = PredictionFile(folder / "predictions" if folder else None, suite.name)
            try:
                results.suites[suite.name] = run(limit, file, settings, resume=resume)
            except BrokenSuite as error:
                log.warning("%s was given up: %s", suite.name, error)
                results.missing[suite.name] = f"given up: {error}"
    finally:
        assistant.model.train(training)
    if folder and dist.is_main():
        write_results(results, folder)
    return results


def source_options(recipe: Recipe, suite: Suite, classes: str | None = None) -> dict[str, Any]:
    """Options of the suite's source that training and scoring must share, such as the class list, from the recipe's
    datasets of that source, without those that the suite states itself. classes: replaces the class list. Raises
    ValueError where the recipe's datasets disagree.
    """
    tasks = () if suite.own else recipe.data.mixture  # an own suite states its options itself
    datasets = [entry for task in tasks for entry in task.sets if entry.source.split("|")[0] == suite.base]
    options: dict[str, Any] = {}
    for dataset in datasets:
        for key, value in dataset.options.items():
            if key not in SHARED_OPTIONS or key in suite.options:
                continue
            if options.setdefault(key, value) != value and not (classes and key == "classes"):
                raise ValueError(
                    f"suite {suite.name}: the recipe's sets of {suite.base} do not agree on {key} ({options[key]!r} "
                    f"and {value!r}), so which one it is scored with is open; define the suite in eval.custom"
                )
    if classes and suite.metric == "semantic":
        options["classes"] = classes.replace("{source}", suite.base)
    return options


@dataclass
class SuiteEvaluation:
    """One suite on this process: reading ahead, answering, and in the background scoring and writing."""

    assistant: Assistant
    suite: Suite
    source: Source
    protocol: str
    answer: Protocol
    batch_size: int
    max_new_tokens: int
    workers: int
    notes: list[str]
    skip_bad: bool  # a bad record is left out and counted; else it ends the suite
    score: SuiteScore = field(init=False)

    def __call__(self, limit: int, file: PredictionFile, settings: dict[str, Any], *, resume: bool) -> SuiteResult:
        """Answers, counts and writes this process's share; returns the figures of all shares together."""
        self.score = SuiteScore(self.suite.metric)
        count = min(limit or len(self.source), len(self.source))
        batches = [range(count)[start : start + self.batch_size] for start in range(0, count, self.batch_size)]
        settings = {
            **settings,
            "suite": self.suite.name,
            "protocol": self.protocol,
            "records": len(self.source),
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
        }
        with file:
            earlier, remaining = file.begin(settings, batches, resume=resume)
            for line in earlier:
                self.score.add(line)

            def finish(result: Answered | LeftOut) -> None:
                line = self._line(result)
                self.score.add(line)
                file.write(line)
                if isinstance(result, LeftOut) and len(self.score.left_out) <= LOGGED_SKIPS:
                    log.warning("%s: left out: %s", self.suite.name, result.reason)

            failure: Exception | None = None
            # Nothing is raised here: the other processes wait in `all_gather` below, and learn of it there.
            try:
                run_in_background(finish, self._answers(remaining[dist.rank() :: dist.world_size()]))
            except (OSError, ValueError) as error:
                self.score.broken = str(error)
            except Exception as error:
                failure = error
        return self._merged_score(count, failure).result(self.protocol, len(self.source))

    def _merged_score(self, count: int, failure: Exception | None) -> SuiteScore:
        """The score of all processes, on each of them. Raises BrokenSuite where nothing can be made of it, and another
        error where one of them has a failure that is no fault of the data (a full memory, NaN)."""
        gathered = dist.all_gather((self.score, "" if failure is None else error_text(failure)))
        if failures := [text for _, text in gathered if text]:
            raise failure or RuntimeError(f"{self.suite.name}: another process failed: {failures[0]}")
        score, *others = [score for score, _ in gathered]
        for other in others:
            score.merge(other)
        if score.broken:
            raise BrokenSuite(score.broken)
        if not score.images:
            raise BrokenSuite(f"none of its {count} images can be scored; {score.why_left_out()}")
        if 2 * score.unfinished > score.queries:
            log.warning(
                "%s: %d of %d answers do not end within max_new_tokens=%d; they are scored up to there",
                self.suite.name,
                score.unfinished,
                score.queries,
                self.max_new_tokens,
            )
        return score

    def _answers(self, batches: Sequence[Sequence[int]]) -> Iterator[Answered | LeftOut]:
        """Each image with the answers about it, batch by batch; within a batch the images left out come first."""
        total = sum(map(len, batches))
        with tqdm(total=total, desc=self.suite.name, disable=not dist.is_main(), leave=False) as bar:
            for batch in prefetch(self._read_batch, batches, self.workers):
                items = [item for item in batch if isinstance(item, EvalItem)]
                yield from (item for item in batch if isinstance(item, LeftOut))
                if items:
                    started = time.monotonic()
                    samples = [item.sample for item in items]
                    queries = [item.queries for item in items]
                    batch_replies = self.answer(self.assistant, samples, queries, self.max_new_tokens)
                    seconds = (time.monotonic() - started) / len(items)
                    for item, replies in zip(items, batch_replies, strict=True):
                        yield Answered(item, replies, seconds)
                bar.update(len(batch))

    def _read_batch(self, indices: Sequence[int]) -> list[EvalItem | LeftOut]:
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> EvalItem | LeftOut:
        """An image with its questions. All that can be wrong with the data shows here, before the model answers."""
        try:
            record = self.source[index]
            queries = questions(record, self.assistant.system)
            if not queries:
                raise NothingToAsk(f"{record.image}: {self.assistant.system.name} asks nothing about it")
            sample = load_views(record.image, self.assistant.views)
            # The masks are made again when the answers are scored; here they only have to be readable.
            for target in {target for query in queries for target in query.targets if is_present(record, target)}:
                rasterize_target(record, target, sample.geometry.original)
            rasterize_ignored(record, sample.geometry.original)
            return EvalItem(index, record, queries, sample)
        except NothingToAsk as error:
            return LeftOut(index, str(error))
        except MISTAKES:
            raise
        except Exception as error:  # a damaged file raises what its reader happens to raise
            message = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
            reason = f"record {index}: {message}"
            if not self.skip_bad:
                raise BrokenSuite(f"{reason} (on_bad_sample: skip leaves it out and counts it)") from error
            return LeftOut(index, reason)

    def _line(self, answered: Answered | LeftOut) -> Prediction:
        if isinstance(answered, LeftOut):
            return left_out_line(
                self.suite.name, self.suite.metric, self.protocol, self.notes, answered.index, answered.reason
            )
        item = answered.item
        self._check_masks(item, answered.replies)
        counts = SCORERS[self.suite.metric].count(
            item.record, item.queries, answered.replies, self.protocol, self.assistant.system.released.truth
        )
        return {
            "suite": self.suite.name,
            "metric": self.suite.metric,
            "index": item.index,
            "image": str(item.record.image),
            "protocol": self.protocol,
            "notes": self.notes,
            "seconds": round(answered.seconds, 4),
            "counts": counts,
            "answers": answers_of(item.record, item.queries, answered.replies),
        }

    def _check_masks(self, item: EvalItem, replies: Sequence[Reply]) -> None:
        for query, reply in zip(item.queries, replies, strict=True):
            if reply.masks.isnan().any():
                raise NotNumbers(
                    f"{self.suite.name}: {item.record.image}: the masks of the answer to {query.question!r} hold NaN; "
                    f"{self.assistant.model.dtype} may be too narrow, try --precision fp32"
                )
