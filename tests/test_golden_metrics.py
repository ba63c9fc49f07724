"""The as-released variants give what the published scoring programs gave (golden/README.md, metrics)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evaluation.metrics.counts import Confusion, Overlaps, confusion_cells, overlap
from evaluation.metrics.matching import Names, read_list
from evaluation.metrics.semantic import released_map, released_truth
from systems.base import build_system
from tests.records import last_answer, metrics_folder

TOLERANCE = 1e-6


def record(name: str):
    folder = metrics_folder()
    return np.load(folder / f"{name}.npz"), json.loads((folder / f"{name}.json").read_text())


def overlaps(arrays, *, rejections: bool) -> Overlaps:
    scores = Overlaps()
    for truth, predicted, rejected in zip(arrays["gt"], arrays["pred"], arrays["rejected"], strict=True):
        masks = [torch.from_numpy(mask) for mask in (predicted, truth == 1, truth == 255)]
        scores.add(overlap(*masks, rejected=bool(rejected) and rejections))
    return scores


@pytest.mark.parametrize("name", ["lisa", "gsva"])
def test_plain_validation(name):
    arrays, expected = record(name)
    assert overlaps(arrays, rejections=False).released() == pytest.approx(
        {"gIoU": expected["validate"]["giou"], "cIoU": expected["validate"]["ciou"]}, abs=TOLERANCE
    )


@pytest.mark.parametrize(("key", "counted"), [("eval_gres_grefcoco", True), ("eval_gres_other", False)])
def test_generalised_scoring(key, counted):
    arrays, expected = record("gsva")
    got = overlaps(arrays, rejections=True).released_generalised(count_false_masks=counted)
    names = {"gIoU": "giou", "cIoU": "ciou", "N-acc": "n_acc", "T-acc": "t_acc"}
    assert got == pytest.approx({ours: expected[key][theirs] for ours, theirs in names.items()}, abs=TOLERANCE)


def test_semantic_miou():
    arrays, expected = record("lasagna")
    classes, read = expected["classes"], build_system("lasagna").read
    names, confusion = Names(classes), Confusion(len(classes))
    for picture, text in enumerate(expected["texts"]):
        start, end = arrays["offset"][picture : picture + 2]
        logits = torch.from_numpy(arrays["logits"][start:end])
        reading = read_list(read(last_answer(text)), classes, names, fuzzy=True)
        assert len(reading.masks) == len(logits)
        truth = torch.from_numpy(arrays["label"][picture].astype(np.int64))
        truth[truth == 255] = -1
        height, width = truth.shape
        predicted = released_map([(index, logits[mask]) for index, mask in reading.masks], (height, width))
        confusion.add(confusion_cells(released_truth(truth), predicted, len(classes)))
    assert confusion.miou() == pytest.approx(expected["expected"]["miou"], abs=TOLERANCE)
    iou = confusion.iou()
    got = {str(index): value for index, value in enumerate(iou) if not np.isnan(value)}
    assert got == pytest.approx(expected["expected"]["iou"], abs=TOLERANCE)
