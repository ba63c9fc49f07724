"""The target-refinement loss against a direct reading of its formula, pixel by pixel (pixellm.md 5.4)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.losses import objective, refinement_weights
from model.seg_model import SegOutput
from tests.tiny_model import tiny_batch
from utils.config import LossConfig


@pytest.fixture
def case():
    """Two masks in the first row and one in the second of image 0, one of image 1, with random logits."""
    generator = torch.Generator().manual_seed(0)
    batch = tiny_batch()
    batch.mask_rows = torch.tensor([0, 0, 1, 2])
    batch.masks = [(torch.rand(n, 4, 5, generator=generator) > 0.5).float() for n in (3, 1)]
    logits = [torch.randn(masks.shape, generator=generator).requires_grad_() for masks in batch.masks]
    return SegOutput(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), logits), batch


def direct(output, batch, kind: str, alpha: float) -> float:
    """Sum over images, targets and pixels of A * BCE, over pixels and targets; plus plain BCE where it is apart."""
    rows, total, targets = iter(batch.mask_rows.tolist()), 0.0, 0
    for logits, truth in zip(output.masks, batch.masks, strict=True):
        mine = [next(rows) for _ in truth]
        number, height, width = truth.shape
        for k in range(number):
            targets += 1
            for y in range(height):
                for x in range(width):
                    same = [j for j in range(number) if mine[j] == mine[k]]
                    count = sum(1 / (1 + math.exp(-logits[j, y, x].item())) > 0.5 for j in same)
                    p = 1 / (1 + math.exp(-logits[k, y, x].item()))
                    t = truth[k, y, x].item()
                    bce = -(t * math.log(p) + (1 - t) * math.log(1 - p))
                    weight = (alpha if kind == "paper" else 1.0 + 1.0) if count >= 2 else 1.0
                    total += weight * bce / (height * width)
    return total / targets


@pytest.mark.parametrize(("kind", "alpha"), [("paper", 2.0), ("paper", 5.0), ("overlap_only", 2.0)])
def test_equals_the_formula(case, kind, alpha):
    found = objective(*case, LossConfig(overlap_refinement=kind, overlap_weight=alpha, bce=1.0)).parts["bce"].item()
    assert found == pytest.approx(direct(*case, kind, alpha), rel=1e-5)


def test_none_is_plain_bce_and_dice_never_changes(case):
    plain, refined = (objective(*case, LossConfig(overlap_refinement=kind)) for kind in ("none", "paper"))
    assert plain.parts["bce"].item() == pytest.approx(direct(*case, "paper", 1.0) * 2.0, rel=1e-5)
    assert plain.parts["dice"] == refined.parts["dice"] and plain.parts["bce"] < refined.parts["bce"]


def test_masks_of_different_questions_do_not_overlap(case):
    output, batch = case
    apart = replace(batch, mask_rows=torch.tensor([0, 1, 2, 3]))
    plain = objective(output, apart, LossConfig()).total
    assert torch.equal(
        objective(output, apart, LossConfig(overlap_refinement="paper", overlap_weight=9.0)).total, plain
    )


def test_weights_are_constants_of_the_gradient(case):
    output, batch = case
    objective(
        output, batch, LossConfig(overlap_refinement="paper", overlap_weight=3.0, dice=0.0, bce=1.0)
    ).total.backward()
    logits, truth = output.masks[0], batch.masks[0]
    weights = refinement_weights(logits, batch.mask_rows[:3], "paper", 3.0)
    expected = weights * (torch.sigmoid(logits.detach()) - truth) / (truth[0].numel() * 4)
    torch.testing.assert_close(logits.grad, expected)


def test_ignored_pixels_stay_out(case):
    output, batch = case
    batch.ignore = [torch.zeros(4, 5, dtype=torch.bool), None]
    batch.ignore[0][2:] = True
    config = LossConfig(overlap_refinement="paper", ignore_region=True)
    found = objective(output, batch, config).parts["bce"]
    cut = SegOutput(output.token_logits, output.token_targets, [output.masks[0][:, :2], output.masks[1]])
    kept = replace(batch, masks=[batch.masks[0][:, :2], batch.masks[1]], ignore=[None, None])
    torch.testing.assert_close(found, objective(cut, kept, config).parts["bce"])
