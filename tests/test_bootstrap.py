from __future__ import annotations

import numpy as np
import pytest

from evaluation.bootstrap import interval
from evaluation.metrics import STANDARD
from evaluation.scoring import OverlapScorer


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


def test_order_has_no_say_and_few_pictures_give_none():
    rng = np.random.default_rng(2)
    parts, wholes = rng.random(30), rng.random(30) + 1
    order = rng.permutation(30)
    assert interval(parts, wholes) == interval(parts[order], wholes[order])
    assert interval([1], [2]) is None and interval([], []) is None and interval([0, 0], [0, 0]) is None


def test_phrases_of_one_picture_are_drawn_together():
    """Eight equal phrases a picture tell no more than one: the interval must not shrink."""
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
