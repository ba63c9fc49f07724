"""Sa2VA's mask losses (sa2va.md 5.2): points, their sampling, five masks per image, smoothing, nearest truth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from model import losses as module
from model.losses import objective
from model.point_sampling import sample_points, values_at
from model.seg_model import SegOutput
from tests.tiny_model import tiny_batch
from utils.config import LossConfig

SA2VA = LossConfig(mask_size="decoder", truth_resize="nearest", points=64, dice_smooth=1.0, masks_per_image=5)


def case(*counts: int, size: int = 12, seed: int = 0):
    """Images of different sizes with this many masks each, and predictions of the decoder's size."""
    generator, batch = torch.Generator().manual_seed(seed), tiny_batch()
    batch.masks = [
        (torch.rand(count, 20 + index, 31, generator=generator) > 0.5).float() for index, count in enumerate(counts)
    ]
    batch.refused = [0] * len(counts)
    batch.ignore = [None] * len(counts)
    masks = [3 * torch.randn(count, size, size, generator=generator) for count in counts]
    text = torch.randn(4, 9, generator=generator), torch.arange(4)
    return SegOutput(*text, [values.requires_grad_() for values in masks]), batch


def by_grid_sample(maps, points):
    return F.grid_sample(maps[:, None], 2 * points[:, :, None] - 1, mode="bilinear", align_corners=False)[:, 0, :, 0]


def reference(logits, truth, points):
    """(N, h, w), (N, H, W), (N, P, 2) -> loss_mask, loss_dice, written out as the sheet has them."""
    truth = F.interpolate(truth[:, None], logits.shape[1:], mode="nearest")[:, 0]
    x, t = by_grid_sample(logits, points).double(), by_grid_sample(truth, points).double()
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="sum") / (x.numel() + 1e-4)
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return 2.0 * bce, 0.5 * dice.sum() / (len(x) + 1e-4)


def test_values_between_cells_and_their_gradients_are_those_of_grid_sample():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(3, 7, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    points = torch.rand(3, 200, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1  # some beyond the edges
    weights = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    results = []
    for sample in (values_at, by_grid_sample):
        values = sample(maps, points)
        results.append((values, *torch.autograd.grad((values * weights).sum(), maps)))
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-9)


def test_three_quarters_of_the_points_are_the_most_uncertain_of_three_times_as_many():
    logits = torch.linspace(-8, 8, 64).repeat(2, 64, 1)  # uncertain in the middle columns
    torch.manual_seed(3)
    candidates = torch.rand(2, 3 * 400, 2)
    torch.manual_seed(3)
    points = sample_points(logits, 400)
    assert points.shape == (2, 400, 2) and points.min() >= 0 and points.max() < 1
    certainty = by_grid_sample(logits, candidates).abs()
    for mask in range(2):
        limit = certainty[mask].sort().values[299]
        chosen = by_grid_sample(logits, points)[mask, :300].abs()
        torch.testing.assert_close(chosen.max(), limit)
        have = {tuple(point) for point in candidates[mask].tolist()}
        assert {tuple(point) for point in points[mask, :300].tolist()} <= have
        assert not {tuple(point) for point in points[mask, 300:].tolist()} & have
    assert points[:, 300:, 0].std() > 0.25, "the others lie anywhere"


def test_the_losses_are_the_published_ones_at_given_points(monkeypatch):
    (output, batch), generator = case(5, 5), torch.Generator().manual_seed(2)
    points = torch.rand(10, 64, 2, generator=generator)
    monkeypatch.setattr(module, "sample_points", lambda logits, number: points)
    losses = objective(output, batch, SA2VA)
    truth = [F.interpolate(masks[:, None], (12, 12), mode="nearest")[:, 0] for masks in batch.masks]
    bce, dice = reference(torch.cat(output.masks), torch.cat(truth), points)
    assert losses.parts["bce"].item() == pytest.approx(bce.item(), rel=1e-6)
    assert losses.parts["dice"].item() == pytest.approx(dice.item(), rel=1e-6)
    ce = F.cross_entropy(output.token_logits, output.token_targets)
    assert losses.total.item() == pytest.approx((ce + bce + dice).item(), rel=1e-6)
    gradients = torch.autograd.grad(losses.total, output.masks)
    torch.testing.assert_close(gradients, torch.autograd.grad(bce + dice, output.masks), atol=1e-8, rtol=1e-4)


def test_without_points_the_losses_are_means_over_all_cells():
    output, batch = case(5, 5)
    parts = objective(output, batch, replace(SA2VA, points=0)).parts
    truth = torch.cat([F.interpolate(masks[:, None], (12, 12), mode="nearest")[:, 0] for masks in batch.masks])
    x, t = torch.cat(output.masks).double(), truth.double()
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
    bce = F.binary_cross_entropy_with_logits(x, t)
    assert parts["bce"].item() == pytest.approx(2 * bce.item(), rel=1e-6)
    assert parts["dice"].item() == pytest.approx(0.5 * dice.mean().item(), rel=1e-6)


@pytest.mark.parametrize(("have", "order"), [(1, [0] * 5), (2, [0, 1, 0, 1, 0]), (3, [0, 1, 2, 0, 1]), (5, range(5))])
def test_fewer_than_five_masks_are_repeated_in_order(have, order):
    """sa2va.md 5.2, observed there."""
    output, batch = case(have)
    config = replace(SA2VA, points=0)
    alone = [
        objective(
            replace(output, masks=[output.masks[0][index : index + 1]]),
            replace(batch, masks=[batch.masks[0][index : index + 1]]),
            replace(config, masks_per_image=0),
        )
        .parts["mask"]
        .item()
        for index in range(have)
    ]
    together = objective(output, batch, config).parts["mask"].item()
    assert together == pytest.approx(sum(alone[index] for index in order) / 5, rel=1e-5)


def test_of_more_than_five_masks_a_random_five_count():
    output, batch = case(9)
    chosen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        total = objective(output, batch, replace(SA2VA, points=0)).total
        (gradient,) = torch.autograd.grad(total, output.masks)
        counted = gradient.abs().amax((1, 2)) > 0
        assert counted.sum() == 5
        chosen.add(tuple(counted.tolist()))
    assert len(chosen) > 15 and all(any(which) for which in zip(*chosen, strict=True))


def test_images_count_alike_whatever_their_number_of_masks():
    output, batch = case(1, 5)
    total = objective(output, batch, replace(SA2VA, points=0)).parts["mask"].item()
    config = replace(SA2VA, points=0, masks_per_image=0)
    alone = [
        objective(replace(output, masks=[masks]), replace(batch, masks=[truth], refused=[0], ignore=[None]), config)
        for masks, truth in zip(output.masks, batch.masks, strict=True)
    ]
    assert total == pytest.approx(sum(losses.parts["mask"].item() for losses in alone) / 2, rel=1e-5)


def test_points_follow_the_generator_that_training_seeds():
    """`train_ds.seed_dropout` makes it a function of seed, step and micro-batch, so that a resumed run repeats them."""
    output, batch = case(2, 7)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(objective(output, batch, SA2VA).total.item())
    assert found[0] == found[1] != found[2]


def test_no_mask_is_no_mask_loss_with_a_graph():
    output, batch = case(0, 0)
    losses = objective(output, batch, SA2VA)
    assert losses.parts["mask"].item() == 0
    (losses.total + sum(masks.sum() for masks in output.masks)).backward()


def test_ignored_pixels_count_at_no_point():
    output, batch = case(3)
    config = replace(SA2VA, ignore_region=True, masks_per_image=5)
    batch.ignore = [torch.zeros(20, 31, dtype=torch.bool)]
    batch.ignore[0][:, 14:] = True
    torch.manual_seed(0)
    objective(output, batch, config).total.backward()
    gradient = output.masks[0].grad
    assert gradient[:, :, :5].abs().max() > 0 and gradient[:, :, 7:].abs().max() == 0


def test_nearest_truth_is_one_pixel_of_each_cell():
    output, batch = case(1, size=2)
    batch.masks = [torch.zeros(1, 4, 4)]
    batch.masks[0][0, 0, 0] = batch.masks[0][0, 3, 3] = 1
    output.masks[0].data.zero_()
    config = replace(SA2VA, points=0, masks_per_image=0)
    p, t = torch.full((4,), 0.5), torch.tensor([1.0, 0, 0, 0])  # the corner of the fourth cell is empty
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    assert objective(output, batch, config).parts["dice"].item() == pytest.approx(0.5 * dice.item())
    t = torch.tensor([0.25, 0, 0, 0.25])
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    area = replace(config, truth_resize="area")
    assert objective(output, batch, area).parts["dice"].item() == pytest.approx(0.5 * dice.item())
