"""Answers with several masks: pairing, misses and extras, and the published variant's defects."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from data.types import Claim, Mask, Query, Record, Target
from evaluation.metrics.base import RELEASED, STANDARD
from evaluation.metrics.matched import MatchedScorer, pair_up
from evaluation.protocols import FORCED, GENERATED, Reply
from evaluation.suites import find_suites

SHAPE = (12, 10)


def stripes(number: int) -> torch.Tensor:
    """(N, H, W) bool: mask k is row k."""
    return torch.arange(SHAPE[0])[None, :, None].expand(number, -1, SHAPE[1]) == torch.arange(number)[:, None, None]


def record(number: int) -> Record:
    masks = stripes(number).numpy()
    return Record(Path("a.jpg"), "multi", tuple(Target(f"t{k}", lambda k=k: masks[k]) for k in range(number)))


def reply(masks: torch.Tensor, high: float = 3.0) -> Reply:
    logits = torch.where(masks, high, -3.0)
    return Reply("", tuple(Claim("", index) for index in range(len(masks))), logits)


def score(number: int, masks: torch.Tensor, protocol: str = GENERATED, high: float = 3.0) -> dict:
    targets = tuple(range(number))
    query = Query("?", tuple(map(Mask, targets)), targets, tuple(f"t{k}" for k in targets))
    scorer = MatchedScorer()
    scorer.add(scorer.count(record(number), [query], [reply(masks, high)], protocol))
    values = {(figure.metric, figure.variant): figure.value for figure in scorer.figures()}
    return values | scorer.details()


def test_any_order_of_the_right_masks_is_perfect():
    found = score(4, stripes(4)[[2, 0, 3, 1]])
    assert found["gIoU", STANDARD] == found["cIoU", STANDARD] == found["union_gIoU", STANDARD] == 1
    assert found["gIoU", RELEASED] == pytest.approx(1, abs=1e-5)
    assert score(4, stripes(4)[[2, 0, 3, 1]], FORCED)["gIoU", STANDARD] == 0, "given answers are paired in order"
    assert score(4, stripes(4), FORCED)["gIoU", STANDARD] == 1


def test_an_extra_mask_costs_and_as_released_does_not():
    """pixellm.md 12, check 9."""
    extra = torch.zeros(1, *SHAPE, dtype=torch.bool)
    extra[0, 8:] = True
    found = score(3, torch.cat([stripes(3), extra]))
    assert found["gIoU", STANDARD] == 3 / 4
    assert found["cIoU", STANDARD] == 30 / (30 + 40)
    assert (found["masks_both"], found["masks_missed"], found["masks_extra"]) == (3, 0, 1)
    assert found["cIoU", RELEASED] == pytest.approx(1)  # none of its logits lies from 0.5 to 1
    assert found["gIoU", RELEASED] == pytest.approx(1, abs=1e-5)
    seen = score(3, torch.cat([stripes(3), extra]), high=0.7)
    assert seen["cIoU", RELEASED] == pytest.approx(30 / 70) and seen["gIoU", RELEASED] == pytest.approx(3 / 4, abs=1e-5)


def test_a_missing_mask_costs_and_an_empty_extra_one_too():
    found = score(4, stripes(4)[:3])
    assert found["gIoU", STANDARD] == 3 / 4 and found["cIoU", STANDARD] == 30 / 40 and found["masks_missed"] == 1
    empty = torch.zeros(1, *SHAPE, dtype=torch.bool)
    assert score(3, torch.cat([stripes(3), empty]))["gIoU", STANDARD] == 3 / 4
    nothing = score(2, stripes(0))
    assert nothing["gIoU", STANDARD] == nothing["cIoU", STANDARD] == nothing["union_gIoU", STANDARD] == 0


@pytest.mark.parametrize("seed", range(5))
def test_pairing_is_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, *SHAPE, generator=generator)
    truth = torch.rand(3, *SHAPE, generator=generator) > 0.6

    def iou(i: int, j: int) -> float:
        mine = logits[i] > 0
        return float((mine & truth[j]).sum() / (mine | truth[j]).sum())

    best = max(sum(iou(i, j) for j, i in enumerate(chosen)) for chosen in permutations(range(4), 3))
    rows = [row for kind, row, _ in pair_up(logits, truth) if kind == "both"]
    assert sum(row[0] / row[1] for row in rows) == pytest.approx(best, rel=1e-6)


def test_shares_of_processes_add_up():
    whole, parts = MatchedScorer(), [MatchedScorer(), MatchedScorer()]
    for index, number in enumerate((1, 3, 2)):
        query = Query("?", (), tuple(range(number)))
        counts = whole.count(record(number), [query], [reply(stripes(2))], GENERATED)
        whole.add(counts)
        parts[index % 2].add(counts)
    parts[0].merge(parts[1])
    assert parts[0].details() == whole.details()
    assert parts[0].figures() == whole.figures()
    assert MatchedScorer().figures()[0].value is None


def test_the_order_of_images_changes_no_bit():
    rng = np.random.default_rng(0)
    sizes = [(int(hit), int(hit + miss)) for hit, miss in rng.integers(1, 5000, (300, 2))]
    images = [
        {"pairs": [("both", [hit, union, union, union, 0], 0)], "unions": [[hit, union, union, union, 0]], "larger": 1}
        for hit, union in sizes
    ]
    found = []
    for _ in range(5):
        scorer = MatchedScorer()
        for place in rng.permutation(len(images)):
            scorer.add(images[place])
        found.append(scorer.figures())
    assert all(figures == found[0] for figures in found)


def test_suites_of_several_targets():
    names = [suite.name for suite in find_suites(["multi"])]
    assert names == ["muse|val", "muse|test_few", "muse|test_many"]
    assert find_suites(["MultiReasonSeg|val"]) == find_suites(["muse|val"])
    assert np.all([suite.metric == "matched" for suite in find_suites(["muse*"])])
