"""The objective is the published one; what is ignored or absent counts as the recipe says."""

from __future__ import annotations

import pytest
import torch

from model.losses import mask_losses, objective
from model.runtime import RuntimeOptions
from model.seg_model import SegOutput
from tests.tiny_model import tiny_batch, tiny_model
from utils.config import LossConfig


def direct(logits, truth):
    """The formulas of lisa.md 5.3, mask by mask and pixel by pixel."""
    bce = dice = 0.0
    for x, t in zip(logits.double(), truth.double(), strict=True):
        p = 1 / (1 + torch.exp(-x))
        bce += -(t * torch.log(p) + (1 - t) * torch.log(1 - p)).mean().item()
        dice += (1 - (2 * (p / 1000 * t).sum() + 1e-6) / ((p / 1000).sum() + (t / 1000).sum() + 1e-6)).item()
    return bce, dice


@pytest.fixture
def output():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randn(2, 20, 30, generator=generator), torch.randn(1, 25, 10, generator=generator)]
    return SegOutput(torch.randn(5, 40, generator=generator), torch.tensor([1, 7, 3, 39, 0]), masks)


def test_objective_is_the_published_one(output):
    batch, config = tiny_batch(), LossConfig(ce=1.5, dice=0.5, bce=2.0)
    losses = objective(output, batch, config)
    sums = [direct(*pair) for pair in zip(output.masks, batch.masks, strict=True)]
    bce, dice = (sum(values) / 3 for values in zip(*sums, strict=True))
    log_shares = torch.log_softmax(output.token_logits.double(), -1)
    ce = -log_shares[range(5), output.token_targets].mean().item()
    expected = {"ce": 1.5 * ce, "bce": 2 * bce, "dice": 0.5 * dice}
    for name, value in expected.items():
        assert losses.parts[name].item() == pytest.approx(value, rel=1e-5)
    assert losses.total.item() == pytest.approx(sum(expected.values()), rel=1e-5)
    assert losses.parts["mask"].item() == pytest.approx(expected["bce"] + expected["dice"], rel=1e-5)


def test_perfect_and_empty_masks():
    truth = torch.zeros(2, 8, 8)
    truth[0, 2:5] = 1
    bce, dice = mask_losses((truth - 0.5) * 200, truth)
    assert bce.item() < 1e-6
    assert dice.item() < 1e-3
    bce, dice = mask_losses(torch.zeros(0, 8, 8), torch.zeros(0, 8, 8))
    assert (bce.item(), dice.item()) == (0, 0)


def test_ignored_pixels_count_only_when_the_recipe_ignores_not(output):
    batch = tiny_batch()
    plain = objective(output, batch, LossConfig()).total
    batch.ignore = [torch.zeros(20, 30, dtype=torch.bool), None]
    batch.ignore[0][:, 15:] = True
    assert objective(output, batch, LossConfig()).total == plain
    spared = objective(output, batch, LossConfig(ignore_region=True)).total
    changed = [output.masks[0].clone(), output.masks[1]]
    changed[0][:, :, 15:] = 50.0
    other = SegOutput(output.token_logits, output.token_targets, changed)
    assert objective(other, batch, LossConfig(ignore_region=True)).total == spared
    bce, _ = mask_losses(output.masks[0], batch.masks[0], batch.ignore[0])
    assert bce.item() == pytest.approx(direct(output.masks[0][:, :, :15], batch.masks[0][:, :, :15])[0], rel=1e-5)


def test_pictures_of_one_size_are_scored_together_as_they_would_be_alone():
    generator, batch = torch.Generator().manual_seed(1), tiny_batch()
    shapes = [(2, 6, 8), (3, 6, 8), (1, 5, 8), (0, 6, 8), (2, 6, 8)]
    masks = [torch.randn(shape, generator=generator) for shape in shapes]
    batch.masks = [(torch.rand(shape, generator=generator) > 0.5).float() for shape in shapes]
    batch.ignore = [torch.rand(6, 8, generator=generator) > 0.5, None, None, None, torch.arange(48).view(6, 8) < 5]
    output = SegOutput(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), masks)
    for config in (LossConfig(), LossConfig(ignore_region=True)):
        ignore = batch.ignore if config.ignore_region else [None] * 5
        sums = [mask_losses(*picture) for picture in zip(masks, batch.masks, ignore, strict=True)]
        bce, dice = (sum(values).item() for values in zip(*sums, strict=True))
        parts = objective(output, batch, config).parts
        assert parts["bce"].item() == pytest.approx(2.0 * bce / 8, rel=1e-5)
        assert parts["dice"].item() == pytest.approx(0.5 * dice / 8, rel=1e-5)


def test_everything_ignored_is_no_loss(output):
    batch = tiny_batch()
    bce, dice = mask_losses(output.masks[0], batch.masks[0], torch.ones(20, 30, dtype=torch.bool))
    assert bce.item() == 0
    assert dice.item() == 0


def test_nothing_supervised_is_zero_with_a_graph():
    logits = torch.zeros(0, 40, requires_grad=True)
    batch = tiny_batch(masks=False)
    masks = [torch.zeros(0, 20, 30, requires_grad=True), torch.zeros(0, 25, 10)]
    total = objective(SegOutput(logits, torch.zeros(0, dtype=torch.long), masks), batch, LossConfig()).total
    assert total.item() == 0
    total.backward()


def test_mask_numbers_must_agree(output):
    batch = tiny_batch()
    batch.masks[1] = batch.masks[1][:0]
    with pytest.raises(ValueError, match=r"differ in number.*\(1, 0\).*b\.jpg"):
        objective(output, batch, LossConfig())


def test_bf16_logits_are_scored_in_float32(output):
    half = SegOutput(output.token_logits.bfloat16(), output.token_targets, output.masks)
    assert objective(half, tiny_batch(), LossConfig()).total.dtype == torch.float32


def test_refused_slots_count_only_where_a_recipe_says_so(output):
    """gsva.md 5.4: logit 0 against nothing, a constant that makes the others lighter, only in rows with masks."""
    batch = tiny_batch()
    batch.refused = [2, 0]
    plain, counted = (objective(output, batch, LossConfig(count_refused=how)) for how in (False, True))
    constant = direct(torch.zeros(2, *batch.geometry[0].original), torch.zeros(2, *batch.geometry[0].original))
    for name, weight, value in (("bce", 2.0, constant[0]), ("dice", 0.5, constant[1])):
        expected = (plain.parts[name].item() * 3 + weight * value) / 5
        assert counted.parts[name].item() == pytest.approx(expected, rel=1e-5)
    batch.refused, batch.masks[1], output.masks[1] = [0, 4], batch.masks[1][:0], output.masks[1][:0]
    alone = [objective(output, batch, LossConfig(count_refused=how)).total.item() for how in (False, True)]
    assert alone[0] == alone[1]


def test_masks_are_compared_in_the_cells_of_the_decoder_where_a_recipe_says_so():
    model, batch = tiny_model(), tiny_batch()
    full = model.train()(batch)
    model.configure(RuntimeOptions(full_size_masks=False))
    small = model(batch)
    assert [tuple(masks.shape) for masks in full.masks] == [(2, 20, 30), (1, 25, 10)]
    assert [tuple(masks.shape) for masks in small.masks] == [(2, 22, 32), (1, 32, 13)], "of 32 x 32 cells"
    assert [tuple(masks.shape) for masks in model.eval()(batch).masks] == [(2, 20, 30), (1, 25, 10)]
    config = LossConfig(mask_size="decoder", ignore_region=True)
    batch.masks = [torch.zeros(2, 44, 64), torch.zeros(1, 64, 26)]
    batch.masks[0][:, :21, :33] = 1
    batch.ignore = [torch.zeros(44, 64, dtype=torch.bool), None]
    batch.ignore[0][0, 7] = True
    truth = torch.zeros(2, 22, 32)
    truth[:, :10, :16], truth[:, 10, :16], truth[:, :10, 16], truth[:, 10, 16] = 1, 0.5, 0.5, 0.25
    ignore = torch.zeros(22, 32, dtype=torch.bool)
    ignore[0, 3] = True
    pictures = [mask_losses(small.masks[0], truth, ignore), mask_losses(small.masks[1], torch.zeros(1, 32, 13))]
    bce, dice = (sum(values).item() / 3 for values in zip(*pictures, strict=True))
    parts = objective(small, batch, config).parts
    assert parts["bce"].item() == pytest.approx(2.0 * bce, rel=1e-5)
    assert parts["dice"].item() == pytest.approx(0.5 * dice, rel=1e-5)


def test_masks_of_the_decoder_train_the_same_weights():
    model = tiny_model().train()
    model.configure(RuntimeOptions(full_size_masks=False))
    for masks in (True, False):
        model.zero_grad(set_to_none=True)
        batch = tiny_batch(masks=masks)
        objective(model(batch), batch, LossConfig(mask_size="decoder")).total.backward()
        assert all(weight.grad is not None for weight in model.project.parameters())
