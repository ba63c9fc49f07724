"""Scores where some of what is asked for is absent: hand-made answers, both variants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.types import Claim, Mask, Query, Record, Refuse, Target
from evaluation.metrics import SCORERS
from evaluation.metrics import no_target as absent  # noqa: F401  (it registers its scorers)
from evaluation.protocols import FORCED, GENERATED, TWO_PASS, Reply, all_accepted, apply_decisions
from systems.base import ReleasedTruth

LEFT = np.zeros((4, 4), bool)
LEFT[:, :2] = True
RECORD = Record(
    Path("x.png"), "refer", (Target("car", lambda: LEFT), Target("dog", None), Target("tree", lambda: ~LEFT))
)
QUERY = Query("<image>\nall", (Mask(0), Refuse(1), Mask(2)), (0, 1, 2), ("car", "dog", "tree"))


def logits(*masks: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.from_numpy(mask).float() - 0.5 for mask in masks]) if masks else torch.zeros(0, 4, 4)


def figures(metric: str, *replies: Reply, protocol: str = GENERATED) -> dict:
    scorer = SCORERS[metric]()
    for reply in replies:
        other = SCORERS[metric]()
        other.add(SCORERS[metric].count(RECORD, [QUERY], [reply], protocol))
        scorer.merge(other)
    return {(figure.metric, figure.variant): figure.value for figure in scorer.figures()}


RIGHT = Reply("", (Claim("car", 0), Claim("dog", None), Claim("tree", 1)), logits(LEFT, ~LEFT))
WRONG = Reply("", (Claim("car", None), Claim("dog", 0), Claim("tree", None)), logits(LEFT))


def test_generalised_right_and_wrong():
    right, wrong = figures("generalised", RIGHT), figures("generalised", WRONG)
    for variant in ("standard", "as_released"):
        assert [right[name, variant] for name in ("N-acc", "T-acc")] == [1.0, 1.0]
        assert [wrong[name, variant] for name in ("N-acc", "T-acc", "gIoU")] == [0.0, 0.0, 0.0]
    assert right["gIoU", "standard"] == right["cIoU", "standard"] == right["Pr@0.9", "standard"] == 1.0
    assert figures("generalised", RIGHT, WRONG)["N-acc", "standard"] == 0.5


def test_a_withheld_mask_is_credited_in_the_released_variant_alone():
    """gsva.md 6.3: a falsely rejected target keeps its overlap as released; the reference rule takes it away."""
    claims = (Claim("car", None, withheld_mask=0), Claim("dog", None, withheld_mask=1), Claim("tree", 2))
    found = figures("generalised", Reply("", claims, logits(LEFT, LEFT, ~LEFT), released=claims), protocol=TWO_PASS)
    assert found["gIoU", "standard"] == pytest.approx(2 / 3) and found["cIoU", "standard"] == pytest.approx(8 / 16)
    assert found["gIoU", "as_released"] == pytest.approx(1, abs=1e-4)
    assert found["cIoU", "as_released"] == pytest.approx(1)
    assert found["T-acc", "standard"] == found["T-acc", "as_released"] == 0.5


def test_both_decision_rules_stand_side_by_side():
    masks = logits(LEFT, LEFT, ~LEFT)
    accepted, refused = Claim("dog", 1), Claim("dog", None, withheld_mask=1)
    car, tree = Claim("car", 0), Claim("tree", 2)
    reply = Reply("", (car, accepted, tree), masks, released=(car, refused, tree))
    found = figures("generalised", reply, protocol=TWO_PASS)
    assert (found["N-acc", "standard"], found["N-acc", "as_released"]) == (0.0, 1.0)


def test_false_masks_enter_the_union_of_one_set_only():
    reply = Reply("", (Claim("car", 0), Claim("dog", 1), Claim("tree", 2)), logits(LEFT, LEFT, ~LEFT))
    assert figures("generalised", reply)["cIoU", "as_released"] == pytest.approx(16 / 24)
    apart = figures("generalised_apart", reply)
    assert apart["cIoU", "as_released"] == pytest.approx(1) and apart["oIoU", "standard"] == 1
    assert apart["mIoU", "standard"] == 1 and apart["Acc", "standard"] == 0


def test_see_and_segment():
    seen, wrong = figures("premise", RIGHT), figures("premise", WRONG)
    names = ("See", "See_precision", "See_recall", "See_absent", "See_F1", "Segment")
    assert [seen[name, "standard"] for name in names] == [1] * 6
    assert [wrong[name, "standard"] for name in ("See", "See_recall", "See_absent", "Segment")] == [0] * 4
    empty = Reply("", (Claim("car", 0), Claim("dog", None), Claim("tree", 1)), logits(LEFT & False, ~LEFT))
    found = figures("premise", empty)  # an empty mask says that it is not there
    assert found["See", "standard"] == pytest.approx(2 / 3) and found["Segment", "standard"] == pytest.approx(0.5)
    assert found["Segment", "as_released"] == pytest.approx(0.5)


def test_forced_answers_give_no_accuracy_of_presence():
    assert figures("premise", RIGHT, protocol=FORCED)["See", "standard"] is None
    for metric in ("generalised", "overlap"):
        for name in ("N-acc", "T-acc"):
            assert figures(metric, RIGHT, protocol=FORCED)[name, "standard"] is None
            assert figures(metric, RIGHT, protocol=TWO_PASS)[name, "standard"] == 1


@pytest.mark.parametrize(
    ("claims", "refuses"),
    [
        ((), True),
        ((Claim("", None),), True),
        ((Claim("", None), Claim("red dog", 0, is_substitute=True)), True),  # "no, but here is a red dog"
        ((Claim("", 1),), True),  # an empty mask
        ((Claim("", 0),), False),
    ],
)
def test_say_and_see_agree_on_what_a_refusal_is(claims, refuses):
    record = Record(Path("x.png"), "refer", (Target("blue dog", None, correction="a red dog"),))
    reply = Reply("there is a red dog", claims, logits(LEFT, LEFT & False))
    counts = SCORERS["premise"].count(record, [Query("q", (), (0,), ("blue dog",))], [reply], GENERATED)
    ((_, claimed),), ((_, refused),) = counts["seen"], counts["said"]
    assert (claimed, refused) == (not refuses, refuses)


@pytest.mark.parametrize("metric", ["premise", "generalised"])
@pytest.mark.parametrize("parts", ["exclude", "union"])
@pytest.mark.parametrize("ignored", ["leave out", "object", "background"])
def test_as_released_compares_with_what_the_release_takes_for_the_truth(metric, parts, ignored):
    """As the scorer of sets without absent targets does; what is not there stays so, whatever is ignored."""
    top, upper = np.zeros((2, 4, 4), bool)
    top[0], upper[:2] = True, True
    seen = Target("car", lambda: LEFT, released_mask=lambda: LEFT & ~top)
    unseen, dog = Target("bus", lambda: upper & LEFT & top), Target("dog", None)
    record = Record(Path("x.png"), "reason", (seen, unseen, dog), ignore=lambda: top)
    queries = [Query("q", (), (place,), (target.phrase,)) for place, target in enumerate(record.targets)]
    replies = [Reply("", (Claim("", 0),), logits(upper)) for _ in queries]
    truth = ReleasedTruth(parts, ignored)
    rows = SCORERS[metric].count(record, queries, replies, GENERATED, truth)["rows"]
    plain = SCORERS["overlap"].count(record, queries, replies, GENERATED, truth)
    assert rows["standard"] == plain["overlaps"] and rows["as_released"] == plain["released"]
    assert len(rows["standard"]) == 2 and len(rows["as_released"]) == 3  # without and with the bus
    assert rows["standard"][-1][2] == rows["as_released"][-1][2] == 0  # true pixels of the dog


def test_nothing_to_score_gives_no_figure():
    for metric in ("generalised", "generalised_apart", "premise"):
        assert not {figure.value for figure in SCORERS[metric]().figures()} - {None}


def test_slots_and_decisions():
    assert all_accepted(("a", Mask(0), "b", Refuse(1))) == ("a", Mask(0), "b", Mask(1))
    claims = apply_decisions([Claim("a", 0), Claim("b", 1)], [True, False])
    assert claims == (Claim("a", 0), Claim("b", None, withheld_mask=1))
