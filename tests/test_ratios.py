"""What the intervals resample adds up to the figures, and to a slow reading of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evaluation.metrics.base import RELEASED, STANDARD
from evaluation.metrics.counts import Overlaps, overlap
from evaluation.metrics.no_target import SEE, PremiseScorer, RefZomScorer, see, similarity
from evaluation.metrics.overlap import OverlapScorer
from evaluation.metrics.ratios import overlap_ratios
from evaluation.metrics.semantic import SemanticScorer

MASK = arrays(bool, (2, 3), elements=st.booleans()) | st.just(np.zeros((2, 3), bool)) | st.just(np.ones((2, 3), bool))
QUERY = st.tuples(MASK, MASK, MASK, st.booleans())  # predicted, true, ignored, refused
PICTURES = st.lists(st.lists(QUERY, max_size=3), min_size=1, max_size=4)


def rows_of(pictures) -> list[list[list[int]]]:
    return [
        [list(overlap(*map(torch.from_numpy, masks), rejected=refused)) for *masks, refused in picture]
        for picture in pictures
    ]


def slow(pictures) -> dict[str, float | None]:
    """Every share of presence, and the overlaps of what is there, query by query and pixel by pixel."""
    right = hits = said_number = there_number = denied = absent_number = inter = union = 0
    ious = []
    for predicted, truth, ignore, refused in (query for picture in pictures for query in picture):
        pixels = [(bool(p), bool(t)) for p, t, i in zip(predicted.flat, truth.flat, ignore.flat, strict=True) if not i]
        there, said = any(t for _, t in pixels), any(p for p, _ in pixels) and not refused
        right, hits, denied = right + (there == said), hits + (there and said), denied + (not there and not said)
        said_number, there_number, absent_number = said_number + said, there_number + there, absent_number + (not there)
        if there:
            both, either = sum(p and t for p, t in pixels), sum(p or t for p, t in pixels)
            inter, union = inter + both, union + either
            ious.append(both / either)
    return {
        "See": share(right, there_number + absent_number),
        "See_precision": share(hits, said_number),
        "See_recall": share(hits, there_number),
        "See_absent": share(denied, absent_number),
        "See_F1": share(2 * hits, there_number + said_number),
        "Acc": share(denied, absent_number),
        "mIoU": share(sum(ious), len(ious)),
        "oIoU": share(inter, union),
    }


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@settings(max_examples=40, deadline=None)
@given(PICTURES)
def test_presence_and_overlaps_against_loops_over_pixels(pictures):
    rows, expected = rows_of(pictures), slow(pictures)
    counts = {"rows": {STANDARD: [row for picture in rows for row in picture], RELEASED: []}, "forced": False}
    premise, apart = PremiseScorer(), RefZomScorer()
    premise.add({**counts, "said": []})
    apart.add(counts)
    found = {f.metric: f.value for f in (*apart.figures(), *premise.figures()) if f.variant == STANDARD}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert see(Overlaps(premise.rows[STANDARD].rows)) == {name: pytest.approx(expected[name]) for name in SEE}


@settings(max_examples=40, deadline=None)
@given(PICTURES)
def test_the_numbers_of_all_images_add_up_to_the_figures(pictures):
    rows = rows_of(pictures)
    sums = {name: (part.sum(), whole.sum()) for name, (part, whole) in overlap_ratios(rows).items()}
    scorer, premise = OverlapScorer(), PremiseScorer()
    for picture in rows:
        scorer.add({"kind": "refer", "overlaps": picture})
        premise.add({"rows": {STANDARD: picture, RELEASED: []}, "forced": False, "said": []})
    for figure in (*scorer.figures(), *premise.figures()):
        if figure.variant == STANDARD:
            assert figure.value == pytest.approx(share(*sums[figure.metric])), figure.metric


def test_class_lists_that_differ_are_counted_by_name():
    """An image whose crowd leaves a class unclear has a shorter list (coco, crowd: ignore)."""
    whole, parts = SemanticScorer(), [SemanticScorer(), SemanticScorer()]
    pictures = (
        {"classes": ["a", "b", "c"], STANDARD: [[0, 0, 5], [2, 3, 1]], RELEASED: [], "presence": None},
        {"classes": ["c", "a"], STANDARD: [[0, 0, 3], [1, 0, 2], [1, 2, 4]], RELEASED: [], "presence": None},
    )
    for number, counts in enumerate(pictures):
        whole.add(counts)
        parts[number].add(counts)
    parts[1].merge(parts[0])
    assert whole.details() == {"class_iou": {"a": 5 / 11, "b": None, "c": 3 / 6}}
    assert parts[1].details()["class_iou"] == {"c": 3 / 6, "a": 5 / 11, "b": None}
    assert whole.figures()[0].value == pytest.approx((5 / 11 + 3 / 6) / 2)


def test_a_correction_is_like_its_reference_and_a_plain_denial_is_not():
    reference = "the red car"
    right = similarity("There is no blue car, but there is the red car. [SEG]", reference)
    denied = similarity("Sorry, I do not see it.", reference)
    assert similarity("The red car", reference) == 1 > right > 0.4 > 0.2 > denied
    assert similarity("[SEG]<no_ins>", reference) == 0
