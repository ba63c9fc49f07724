"""Compares two sets of predictions on the same images: the difference of every figure with a paired interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics import SCORERS
from evaluation.metrics.base import STANDARD, Interval, released_truth
from evaluation.prediction_schema import LEFT_OUT, Prediction, reading
from evaluation.predictions import place_of, predictions, settings_of
from evaluation.report.examples import query_ious
from evaluation.suites import find_suites
from utils.registry import unknown

SAME = ("source", "suite_options", "metric", "present_only", "groups", "options", "annotations", "records")


@dataclass(frozen=True)
class Difference:
    """One figure of both, None on a side that does not have it. interval: 95 %, of `second` minus `first` over the
    choice of images; None where it is not estimated (as released) or nothing is counted on a side."""

    metric: str
    variant: str
    first: float | None
    second: float | None
    interval: Interval | None

    @property
    def value(self) -> float | None:
        """Second minus first."""
        return None if self.first is None or self.second is None else self.second - self.first

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class QueryDifference:
    """An image, or a target of it, with both scores (IoU; of a class list the share of right pixels).

    target: index into `Record.targets`; None where the scores are of the full image.
    """

    index: int
    target: int | None
    first: float
    second: float


@dataclass(frozen=True)
class SuiteComparison:
    """Two sets of predictions of one suite. lines: by index, of both, the images that both have answered."""

    name: str
    protocol: str
    figures: list[Difference]
    first: dict[int, Prediction]
    second: dict[int, Prediction]
    queries: int
    only_first: int  # images that the other one has not answered
    only_second: int
    settings: dict[str, Any]
    differing: list[QueryDifference]  # the largest difference first
    notes: list[str]  # what there is to know about one of the two, such as missing answers


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns. missing: suites that only one of the two has."""

    names: tuple[str, str]
    suites: list[SuiteComparison]
    missing: dict[str, str]


def compare(first: str | Path, second: str | Path, suites: Sequence[str] | None = None) -> Comparison:
    """Compares folders of results, or files of predictions, of this program or of its judge.

    suites: names, groups or globs of those to compare; None: all that both have. Raises ValueError where the two do not
    measure the same: another protocol, metric, other options or annotations of the data.
    """
    lines = [predictions([place_of(path)]) for path in (first, second)]
    settings = [settings_of([place_of(path)]) for path in (first, second)]
    have = [*lines[0], *(name for name in lines[1] if name not in lines[0])]
    names = _chosen(suites, have)
    results, missing = [], {}
    for name in names:
        absent = [str(path) for path, own in zip((first, second), lines, strict=True) if name not in own]
        if absent:
            missing[name] = f"not in {' and '.join(absent)}"
            continue
        pair = [{line["index"]: line for line in own[name]} for own in lines]
        with reading(name):
            results.append(_compare_suite(name, pair, [own.get(name, {}) for own in settings]))
    if not results:
        raise ValueError(f"{first} and {second} have no suite in common: {'; '.join(missing.values())}")
    return Comparison((str(first), str(second)), results, missing)


def comparison_table(comparison: Comparison) -> str:
    """The comparison as a table for the terminal."""
    width = max([24, *(len(suite.name) + 2 for suite in comparison.suites)])
    lines = [f"A: {comparison.names[0]}", f"B: {comparison.names[1]}"]
    lines.append(
        f"{'suite':<{width}}{'metric':<18}{'variant':<13}{'protocol':<16}{'A':>8}{'B':>8}{'B - A':>9}  "
        f"{'images':<8}{'queries':<9}paired 95 % interval"
    )
    for suite in comparison.suites:
        for figure in suite.figures:
            low_high = "{:+.4f} to {:+.4f}".format(*figure.interval) if figure.interval else ""
            mark = " *" if figure.is_clear else ""
            lines.append(
                f"{suite.name:<{width}}{figure.metric:<18}{figure.variant:<13}{suite.protocol:<16}"
                f"{_number(figure.first):>8}{_number(figure.second):>8}{_number(figure.value, sign='+'):>9}  "
                f"{len(suite.first):<8}{suite.queries:<9}{low_high}{mark}".rstrip()
            )
        lines += [f"  {suite.name}: {note}" for note in suite.notes]
        if suite.only_first or suite.only_second:
            lines.append(
                f"  {suite.name}: images that only one has answered do not count: {suite.only_first} of A, "
                f"{suite.only_second} of B"
            )
    lines += [f"{name}: not compared. {why}" for name, why in comparison.missing.items()]
    lines.append("* the interval leaves out 0")
    return "\n".join(lines)


def _compare_suite(
    name: str, pair: Sequence[dict[int, Prediction]], settings: Sequence[dict[str, Any]]
) -> SuiteComparison:
    for key in ("protocol", "metric"):
        values = {line[key] for lines in pair for line in lines.values()}
        if len(values) > 1:
            hint = f'; entries of other programs name theirs with "{key}"' if key == "protocol" else ""
            raise ValueError(
                f"{name}: {key}s differ ({', '.join(sorted(values))}), so the figures cannot be compared{hint}"
            )
    differ = [key for key in SAME if all(settings) and settings[0].get(key) != settings[1].get(key)]
    if differ:
        raise ValueError(f"{name}: made on other {', '.join(differ)}, so the figures cannot be compared")
    scored = [{i: line for i, line in lines.items() if LEFT_OUT not in line["counts"]} for lines in pair]
    common = sorted(scored[0].keys() & scored[1].keys())
    if not common:
        raise ValueError(f"{name}: no image that both have answered")
    for index in common:
        images = [Path(lines[index]["image"]).name for lines in scored]
        if images[0] != images[1]:
            raise ValueError(f"{name}: image {index} is {images[0]} in one and {images[1]} in the other")
    metric = scored[0][common[0]]["metric"]
    if metric not in SCORERS:
        raise ValueError(f"{name}: {unknown('metric', metric, SCORERS)}")
    scorers = []
    for lines in scored:
        scorer = SCORERS[metric]()
        for index in common:
            scorer.add(lines[index]["counts"])
        scorers.append(scorer)
    intervals: dict[str, Interval | None] = {}
    # Each part with each: one may lack a part, as Say where no answer has words. Names pair the figures.
    for one, other in product(scorers[0].statistics(), scorers[1].statistics()):
        intervals |= one.differences(other)
    values = [{(figure.metric, figure.variant): figure.value for figure in scorer.figures()} for scorer in scorers]
    notes = _notes(scored)
    if len({released_truth(own.get("system")) for own in settings}) > 1:
        values = [{key: value for key, value in side.items() if key[1] == STANDARD} for side in values]
        notes.append("as-released figures are left out: those of A and B follow different rules")
    figures = []
    for metric, variant in {**values[0], **values[1]}:
        ours, theirs = (side.get((metric, variant)) for side in values)
        counted = variant == STANDARD and ours is not None and theirs is not None
        figures.append(Difference(metric, variant, ours, theirs, intervals.get(metric) if counted else None))
    first, second = ({index: lines[index] for index in common} for lines in scored)
    differing = _differing(first, second)
    return SuiteComparison(
        name=name,
        protocol=first[common[0]]["protocol"],
        figures=figures,
        first=first,
        second=second,
        queries=len(differing),
        only_first=len(scored[0]) - len(common),
        only_second=len(scored[1]) - len(common),
        settings=settings[0] or settings[1],
        differing=differing,
        notes=notes,
    )


def _notes(scored: Sequence[dict[int, Prediction]]) -> list[str]:
    """What the predictions of only one of the two say of themselves, but where they are from."""
    notes = [
        list(dict.fromkeys(note for line in lines.values() for note in line["notes"] if not note.startswith("judged")))
        for lines in scored
    ]
    return [
        f"{side}: {note}"
        for side, own, other in zip("AB", notes, notes[::-1], strict=True)
        for note in own
        if note not in other
    ]


def _differing(first: dict[int, Prediction], second: dict[int, Prediction]) -> list[QueryDifference]:
    """The targets of both, or the images where targets cannot be paired, ordered by how much their scores differ."""
    found = []
    for index, line in first.items():
        scores, others = _by_target(line), _by_target(second[index])
        if scores and scores.keys() == others.keys():
            found += [QueryDifference(index, target, score, others[target]) for target, score in scores.items()]
            continue
        means = [float(np.mean(query_ious(one) or [0.0])) for one in (line, second[index])]
        found.append(QueryDifference(index, None, *means))
    return sorted(found, key=lambda query: (-abs(query.second - query.first), query.index, query.target or 0))


def _by_target(line: Prediction) -> dict[int, float]:
    """Target -> IoU, in the order of the targets; {} where scores do not belong to single targets."""
    counts = line["counts"]
    rows = query_ious(line) if "overlaps" in counts or "rows" in counts else []
    targets = [target for answer in line["answers"] for target in answer.get("targets", ())]
    if counts.get("kind") == "classes" or len(rows) != len(targets):
        return {}
    return dict(sorted(zip(targets, rows, strict=True)))


def _chosen(suites: Sequence[str] | None, have: Sequence[str]) -> list[str]:
    if suites is None:
        return list(have)
    names = []
    for pattern in suites:
        try:
            found = [suite.name for suite in find_suites([pattern])]
        except ValueError:  # a suite of somebody's own, known by its predictions alone
            found = [pattern]
        names += [name for name in found if name in have and name not in names]
    if not names:
        raise ValueError(f"neither has predictions of {', '.join(suites)}; they have: {', '.join(have)}")
    return names


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
