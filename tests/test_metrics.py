"""Every metric against a slow, direct reading of its definition; and sharding changes nothing."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evaluation.metrics.counts import (
    IGNORE,
    Confusion,
    Overlap,
    Overlaps,
    Presence,
    class_map,
    confusion_cells,
    overlap,
    presence_cells,
)

CLASSES = 4
SHAPE = (3, 5)
MASK = arrays(bool, SHAPE, elements=st.booleans())
QUERIES = st.lists(st.tuples(MASK, MASK, MASK, st.booleans()), min_size=1, max_size=6)
TRUE_MAP = arrays(np.int64, SHAPE, elements=st.integers(-1, CLASSES))  # IGNORE to "none"
CLAIMED_MAP = arrays(np.int64, SHAPE, elements=st.integers(0, CLASSES))
MAPS = st.lists(st.tuples(TRUE_MAP, CLAIMED_MAP), min_size=1, max_size=4)
FAST = settings(max_examples=60, deadline=None)


def rows_of(queries) -> list[Overlap]:
    tensors = [(*map(torch.from_numpy, masks), rejected) for *masks, rejected in queries]
    return [overlap(p, t, i, rejected=r) for p, t, i, r in tensors]


def slow_pixels(query) -> tuple[int, int, int, int]:
    predicted, truth, ignore, _ = query
    both = either = there = claimed = 0
    for y in range(SHAPE[0]):
        for x in range(SHAPE[1]):
            if not ignore[y, x]:
                both += bool(predicted[y, x] and truth[y, x])
                either += bool(predicted[y, x] or truth[y, x])
                there += bool(truth[y, x])
                claimed += bool(predicted[y, x])
    return both, either, there, claimed


@FAST
@given(QUERIES)
def test_overlap_metrics_against_pixel_loops(queries):
    scores = Overlaps(rows_of(queries))
    pixels = [slow_pixels(query) for query in queries]
    assert [tuple(row[:4]) for row in scores.rows] == pixels
    ious = [both / either if either else 1.0 for both, either, *_ in pixels]
    assert scores.giou() == pytest.approx(sum(ious) / len(ious))
    union = sum(either for _, either, *_ in pixels)
    assert scores.ciou() == (pytest.approx(sum(p[0] for p in pixels) / union) if union else None)
    rejected = [query[3] or claimed == 0 for query, (*_, claimed) in zip(queries, pixels, strict=True)]
    absent = [no for no, (_, _, there, _) in zip(rejected, pixels, strict=True) if not there]
    present = [no for no, (_, _, there, _) in zip(rejected, pixels, strict=True) if there]
    assert scores.n_acc() == (pytest.approx(np.mean(absent)) if absent else None)
    assert scores.t_acc() == (pytest.approx(1 - np.mean(present)) if present else None)
    hits = [both / either >= 0.5 for both, either, there, _ in pixels if there]
    assert scores.precision(0.5) == (pytest.approx(np.mean(hits)) if hits else None)


@FAST
@given(QUERIES)
def test_released_lisa_scoring_differs_by_its_constants_only(queries):
    scores = Overlaps(rows_of(queries))
    released = scores.released()
    assert released["gIoU"] == pytest.approx(scores.giou(), abs=2e-5)
    assert released["cIoU"] == pytest.approx(scores.ciou() or 0.0, abs=1e-9)


@FAST
@given(QUERIES)
def test_released_generalised_scoring_credits_rejected_masks(queries):
    scores = Overlaps(rows_of(queries))
    terms, both, either, without = [], 0, 0, 0
    for query in queries:
        i, u, there, claimed = slow_pixels(query)
        if there:
            terms.append(i / u)
            both, either, without = both + i, either + u, without + u
        else:
            terms.append(1.0 if query[3] else 0.0)
            either += 0 if query[3] else claimed
    counted = scores.released_generalised(count_false_masks=True)
    assert counted["gIoU"] == pytest.approx(np.mean(terms), abs=2e-5)
    assert counted["cIoU"] == pytest.approx(both / either if either else 0.0)
    other = scores.released_generalised(count_false_masks=False)
    assert other["cIoU"] == pytest.approx(both / without if without else 0.0)
    assert {name: other[name] for name in ("gIoU", "N-acc", "T-acc")} == {
        name: counted[name] for name in ("gIoU", "N-acc", "T-acc")
    }


@FAST
@given(MAPS)
def test_confusion_metrics_against_pixel_loops(maps):
    confusion = Confusion(CLASSES)
    for truth, predicted in maps:
        confusion.add(confusion_cells(torch.from_numpy(truth), torch.from_numpy(predicted), CLASSES))
    pairs = [(t, p) for m in maps for t, p in zip(m[0].ravel(), m[1].ravel(), strict=True) if t != IGNORE]
    ious, weights = {}, {}
    for c in range(CLASSES):
        both, either = sum(t == c == p for t, p in pairs), sum(c in (t, p) for t, p in pairs)  # also where t is "none"
        weights[c] = sum(t == c for t, _ in pairs)
        if either:
            ious[c] = both / either
    got = confusion.iou()
    assert {c: got[c] for c in range(CLASSES) if not math.isnan(got[c])} == pytest.approx(ious)
    assert confusion.miou() == (pytest.approx(np.mean(list(ious.values()))) if ious else None)
    pairs = [(t, p) for t, p in pairs if t != CLASSES]
    assert confusion.pixel_accuracy() == (pytest.approx(np.mean([t == p for t, p in pairs])) if pairs else None)
    expected = sum(weights[c] * ious.get(c, 0.0) for c in weights) / len(pairs) if pairs else None
    assert confusion.weighted_iou() == (pytest.approx(expected) if pairs else None)


def test_unanswered_pixels_are_wrong_and_ignored_ones_do_not_count():
    truth = torch.tensor([[0, 0, 1, IGNORE]])
    none = torch.full_like(truth, CLASSES)
    confusion = Confusion(CLASSES)
    confusion.add(confusion_cells(truth, none, CLASSES))
    assert confusion.counts.sum() == 3 and confusion.miou() == 0.0 and confusion.pixel_accuracy() == 0.0


@FAST
@given(st.lists(st.tuples(*[st.sets(st.integers(0, 5))] * 3), min_size=1, max_size=5))
def test_presence_against_a_loop_over_classes(pictures):
    presence = Presence()
    right, asked_present, silent, asked_absent = 0, 0, 0, 0
    for asked, present, claimed in pictures:
        presence.add(presence_cells(asked, present, claimed))
        for c in asked:
            if c in present:
                asked_present, right = asked_present + 1, right + (c in claimed)
            else:
                asked_absent, silent = asked_absent + 1, silent + (c not in claimed)
    assert presence.present_accuracy() == (right / asked_present if asked_present else None)
    assert presence.absent_accuracy() == (silent / asked_absent if asked_absent else None)


@FAST
@given(st.dictionaries(st.integers(0, CLASSES - 1), arrays(np.float32, SHAPE, elements=st.integers(-2, 2)), max_size=4))
def test_class_map_is_the_argmax_among_positive_logits(logits):
    got = class_map({k: torch.from_numpy(v) for k, v in logits.items()}, SHAPE, CLASSES, "cpu").numpy()
    for y, x in np.ndindex(SHAPE):
        positive = {k: v[y, x] for k, v in logits.items() if v[y, x] > 0}
        highest = [k for k, v in positive.items() if v == max(positive.values())]
        assert got[y, x] == (min(highest) if highest else CLASSES)


@FAST
@given(QUERIES, MAPS, st.randoms(use_true_random=False))
def test_shards_merge_to_the_same_figures_to_the_last_bit(queries, maps, random):
    rows = rows_of(queries)
    cells = [confusion_cells(torch.from_numpy(t), torch.from_numpy(p), CLASSES) for t, p in maps]
    whole, parts = (Overlaps(), Confusion(CLASSES)), [(Overlaps(), Confusion(CLASSES)) for _ in range(3)]
    for kind, items in enumerate((rows, cells)):
        for item in items:
            whole[kind].add(item)
            random.choice(parts)[kind].add(item)
    merged = (Overlaps(), Confusion(CLASSES))
    for part in parts:
        for kind in range(2):
            merged[kind].merge(pickle.loads(pickle.dumps(part[kind])))
    assert merged[0].figures() == whole[0].figures()
    assert (merged[1].counts == whole[1].counts).all() and merged[1].miou() == whole[1].miou()


def test_nothing_at_all_is_no_crash():
    assert {figure.value for figure in Overlaps().figures()} == {None}
    assert Confusion(3).miou() is None and Confusion(3).pixel_accuracy() is None and Confusion(3).weighted_iou() is None
    assert {figure.value for figure in Presence().figures()} == {None}


def test_masks_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        overlap(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool))
