"""The fused losses against their plain forms: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model import fused_losses
from model.fused_losses import bce_and_dice, cross_entropy, plain_bce_and_dice

CASES = [(False, False), (True, False), (False, True), (True, True)]


def masks(ignored: bool, weighted: bool):
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(5, 4, 6, generator=generator, dtype=torch.float64)
    truth = (torch.rand(5, 4, 6, generator=generator) > 0.6).double()
    truth[3], truth[4, 0, 0] = 0, 0.25
    ignore = torch.rand(5, 4, 6, generator=generator) > 0.7
    ignore[2] = True
    weights = 1 + torch.rand(5, 4, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), truth, ignore if ignored else None, weights if weighted else None


@pytest.mark.parametrize(("ignored", "weighted"), CASES)
@pytest.mark.parametrize("at_once", [2**24, 50])
def test_masks_are_scored_as_in_the_plain_form(monkeypatch, ignored, weighted, at_once):
    monkeypatch.setattr(fused_losses, "CHUNK_ELEMENTS", at_once)
    of_masks = torch.arange(1.0, 6, dtype=torch.float64)
    results = []
    for score in (bce_and_dice, plain_bce_and_dice):
        logits, *rest = masks(ignored, weighted)
        bce, dice = score(logits, *rest)
        (of_masks * bce + of_masks.flip(0) * dice).sum().backward()
        results.append((bce, dice, logits.grad))
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("at_once", [2**24, 25])
def test_text_is_scored_as_torch_does(monkeypatch, at_once):
    monkeypatch.setattr(fused_losses, "CHUNK_ELEMENTS", at_once)
    targets = torch.tensor([3, 0, 9, 3, 7])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        results = []
        for score in (cross_entropy, lambda x, t: F.cross_entropy(x.double(), t).to(x.dtype)):
            logits = (4 * torch.randn(5, 10, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
            loss = score(logits, targets)
            (3 * loss).backward()
            results.append((loss.double(), logits.grad))
        torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)
    assert cross_entropy(logits, targets).dtype == torch.float32


def test_nothing_but_logits_and_truth_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        sum(bce_and_dice(*masks(True, False))).sum().backward()
        cross_entropy(torch.randn(5, 10, requires_grad=True), torch.arange(5)).backward()
    assert sum(size > 5 for size in kept) == 4, "logits, truth, ignore; logits"


def test_no_mask_has_no_loss():
    empty = torch.zeros(0, 4, 6, requires_grad=True)
    bce, dice = bce_and_dice(empty, torch.zeros(0, 4, 6), None, None)
    assert bce.shape == dice.shape == (0,)
    (bce.sum() + dice.sum()).backward()
    assert empty.grad.shape == (0, 4, 6)
