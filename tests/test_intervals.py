"""Intervals: as wide as they should be, blind to order, and around figures that are the suites' own."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation import catalog  # noqa: F401  (it registers all metrics)
from evaluation.metrics import SCORERS
from evaluation.metrics.base import RELEASED, STANDARD, Interval
from evaluation.metrics.intervals import intervals, quotient, ratio_intervals
from evaluation.metrics.no_target import PremiseScorer
from evaluation.metrics.overlap import OverlapScorer


def interval(parts, wholes) -> Interval | None:
    return ratio_intervals({"x": (np.asarray(parts), np.asarray(wholes))})["x"]


def test_interval_of_a_share_is_that_of_the_binomial():
    hits = np.random.default_rng(1).random(400) < 0.3
    low, high = interval(hits, np.ones(400))
    wide = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 400)
    assert low == pytest.approx(hits.mean() - wide, abs=0.01) and high == pytest.approx(hits.mean() + wide, abs=0.01)


def test_interval_covers_a_ratio_of_sums_about_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(60):
        wholes = rng.integers(1, 50, size=80)
        low, high = interval(rng.binomial(wholes, 0.6), wholes)
        inside += low <= 0.6 <= high
    assert 52 <= inside <= 60


def test_order_does_not_matter_and_few_images_give_none():
    rng = np.random.default_rng(2)
    parts, wholes = rng.random(30), rng.random(30) + 1
    order = rng.permutation(30)
    assert interval(parts, wholes) == pytest.approx(interval(parts[order], wholes[order]), rel=1e-12)
    assert interval([1], [2]) is None and interval([], []) is None and interval([0, 0], [0, 0]) is None


def test_a_figure_of_several_sums_is_resampled_as_a_whole():
    """The mean of two ratios that always add up to one never varies, though each of them does."""
    parts = np.random.default_rng(4).integers(0, 11, size=50)
    columns = np.stack([parts, 10 - parts, np.full(50, 10)], axis=1)
    shares = lambda sums: quotient(sums[:, :2], sums[:, 2:].repeat(2, axis=1))  # noqa: E731
    assert intervals(columns, lambda sums: shares(sums).mean(axis=1, keepdims=True)) == [pytest.approx((0.5, 0.5))]
    low, high = intervals(columns, shares)[0]
    assert high - low > 0.05


def test_phrases_of_one_image_are_sampled_together():
    """Eight equal phrases per image say no more than one: the interval must not shrink."""
    ious = np.random.default_rng(3).integers(0, 101, size=40)
    widths = []
    for phrases in (1, 8):
        scorer = OverlapScorer()
        for iou in ious.tolist():
            scorer.add({"kind": "refer", "overlaps": [[iou, 100, 100, iou, 0]] * phrases})
        figures = {figure.metric: figure for figure in scorer.figures() if figure.variant == STANDARD}
        for name in ("gIoU", "cIoU", *(f"Pr@{level}" for level in (0.5, 0.6, 0.7, 0.8, 0.9))):
            low, high = figures[name].interval
            assert low <= figures[name].value <= high
        widths.append(figures["gIoU"].interval)
    assert widths[0] == pytest.approx(widths[1])


def row(rng: np.random.Generator) -> list[int]:
    """Counts of one query: present, or absent with and without a mask."""
    intersection, more, missed = rng.integers(1, 50, size=3).tolist()
    case = rng.integers(4)
    if case == 0:
        return [0, 0, 0, 0, 1]
    if case == 1:
        return [0, more, 0, more, 0]
    return [intersection, intersection + more + missed, intersection + missed, intersection + more, int(case == 2)]


def counts_of(metric: str, rng: np.random.Generator) -> dict:
    """Counts of one image as the scorer of `metric` writes them."""
    rows = [row(rng) for _ in range(rng.integers(1, 4))]
    pairs = [("both" if one[2] and one[3] else "missed" if one[2] else "extra", one, 0) for one in rows]
    cells = [[t, p, int(rng.integers(1, 90))] for t in range(3) for p in range(4) if rng.random() < 0.7]
    return {
        "semantic": {"classes": ["a", "b", "c"], STANDARD: cells, RELEASED: [], "presence": (1, 2, 2, 3)},
        "overlap": {"kind": ("phrase", "reason")[rng.integers(2)], "overlaps": rows},
        "matched": {"pairs": pairs, "unions": rows[:1], "larger": len(rows)},
        "exact": {"answers": [[int(rng.integers(2)), 0]], "forced": False},
    }.get(metric, {"rows": {STANDARD: rows, RELEASED: rows}, "forced": False, "said": [[float(rng.random()), 1]]})


@pytest.mark.parametrize("metric", list(SCORERS))
def test_every_standard_figure_of_every_metric_lies_in_its_interval(metric):
    rng, scorer, parts = np.random.default_rng(5), SCORERS[metric](), [SCORERS[metric](), SCORERS[metric]()]
    for number in range(60):
        counts = counts_of(metric, rng)
        scorer.add(counts)
        parts[number % 2].add(counts)
    parts[1].merge(parts[0])
    for whole, merged in zip(scorer.figures(), parts[1].figures(), strict=True):
        assert (whole.interval is None) == (whole.variant == RELEASED), whole
        if whole.interval:
            low, high = whole.interval
            assert low <= whole.value <= high and high - low < 0.6
            assert merged.value == pytest.approx(whole.value) and merged.interval == pytest.approx(whole.interval)


def test_a_figure_that_is_not_decided_has_no_interval():
    scorer = PremiseScorer()
    for _ in range(3):
        scorer.add({"rows": {STANDARD: [[1, 2, 1, 2, 0]], RELEASED: []}, "forced": True, "said": []})
    assert {figure.metric for figure in scorer.figures() if figure.interval is None} >= {"See", "See_recall"}
