"""Scores a suite from lines of predictions alone, without model or data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics import SCORERS
from evaluation.prediction_schema import LEFT_OUT, Prediction, reading
from evaluation.predictions import predictions, settings_of
from evaluation.results import EvaluationResults, SuiteResult
from utils.registry import unknown


class SuiteScore:
    """Collects lines of predictions of one suite. Scores of several processes are merged into one."""

    def __init__(self, metric: str):
        self.scorer = SCORERS[metric]()
        self.images = 0
        self.queries = 0
        self.parse_failures = 0  # claims that name nothing asked for, or a mask that does not exist
        self.unfinished = 0  # answers cut off at the token limit
        self.seconds = 0.0  # of answering, summed over the processes
        self.notes: list[str] = []  # what was done otherwise than the suite expects
        self.left_out: dict[int, str] = {}  # images that are not scored, and why
        self.broken = ""  # what was wrong with the data, where that ended the suite

    def add(self, line: Prediction) -> None:
        if LEFT_OUT in line["counts"]:
            self.left_out[line["index"]] = line["counts"][LEFT_OUT]
            return
        answers = line["answers"]
        self.scorer.add(line["counts"])
        self.images += 1
        self.queries += len(answers)
        self.parse_failures += line["counts"]["unmatched"] + sum(answer["unread"] for answer in answers)
        self.unfinished += sum(not answer["finished"] for answer in answers)
        self.seconds += line["seconds"]
        self.notes = line.get("notes", self.notes)

    def merge(self, other: SuiteScore) -> None:
        self.scorer.merge(other.scorer)
        self.images += other.images
        self.queries += other.queries
        self.parse_failures += other.parse_failures
        self.unfinished += other.unfinished
        self.seconds += other.seconds
        self.notes = self.notes or other.notes
        self.broken = self.broken or other.broken
        self.left_out |= other.left_out

    def why_left_out(self) -> str:
        """How many images are left out, and why the first of them is."""
        return f"{len(self.left_out)} left out, the first: {self.left_out[min(self.left_out)]}"

    def result(self, protocol: str, records: int = 0) -> SuiteResult:
        """records: the number of images of the suite, 0 where it is not known."""
        notes = list(self.notes)
        if self.left_out:
            notes.append(self.why_left_out())
        count = self.images + len(self.left_out)
        if count < records:
            notes.append(f"{count} of {records} pictures only")  # worded as earlier results.json files have it
        return SuiteResult(
            figures=self.scorer.figures(),
            protocol=protocol,
            images=self.images,
            left_out=len(self.left_out),
            queries=self.queries,
            parse_failures=self.parse_failures,
            unfinished=self.unfinished,
            seconds=round(self.seconds, 3),
            notes=notes,
            details=self.scorer.details(),
        )


def rescore(paths: Sequence[str | Path]) -> EvaluationResults:
    """The results of files (or folders) of predictions, every metric and variant.

    Raises ValueError for damaged files, and for files of several protocols, weights or data in one suite.
    """
    lines_of = predictions(paths)
    settings = settings_of(paths)
    suites: dict[str, SuiteResult] = {}
    for name, lines in lines_of.items():
        metric = lines[0]["metric"]
        if metric not in SCORERS:
            raise ValueError(f"{name}: {unknown('metric', metric, SCORERS)}")
        with reading(name):
            score = SuiteScore(metric)
            for line in lines:
                score.add(line)
            suites[name] = score.result(lines[0]["protocol"], settings.get(name, {}).get("records", 0))
    models = {name: settings[name].get("weights") for name in suites if name in settings}
    if len(set(models.values())) > 1:  # one table of several models must say so
        for name, weights in models.items():
            suites[name].notes.append(f"of the weights {weights}; the suites here are not all of the same")
    return EvaluationResults(suites, sources=[str(path) for path in paths])
