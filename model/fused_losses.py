"""The two losses of the objective without copies of what they score: only logits and truth wait for the backward pass.

Written out, cross entropy keeps the logits twice and BCE with dice about seven times. Gradients are given by formula;
what exists beside them is bounded, whatever the number of tokens and masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

AT_ONCE = 2**24  # elements of a float32 copy
DICE_SCALE, DICE_EPS = 1000.0, 1e-6  # as released


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(S, V) logits of any precision and (S,) targets -> their mean loss in float32 (float64 of float64 logits)."""
    return _CrossEntropy.apply(logits, targets)


def bce_and_dice(logits: Tensor, truth: Tensor, ignore: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, H, W) logits and truth -> BCE and dice of each mask, (N,). ignore: (N, H, W) bool; weights: of BCE."""
    return _BceAndDice.apply(logits, truth, ignore, weights)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        norms = torch.cat([_exact(part).logsumexp(-1) for part in _pieces(logits)])
        ctx.save_for_backward(logits, targets, norms)
        return (norms - logits.gather(1, targets[:, None])[:, 0]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        gradient, size = torch.empty_like(logits), _piece(logits)
        for out, part, norm, target in zip(*(x.split(size) for x in (gradient, logits, norms, targets)), strict=True):
            shares = (_exact(part) - norm[:, None]).exp_()
            shares.scatter_add_(1, target[:, None], shares.new_full((len(target), 1), -1.0))
            out.copy_(shares.mul_(weight / len(targets)))
        return gradient, None


class _BceAndDice(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, truth: Tensor, ignore: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums = [_sums(*part) for part in zip(*_in_step(logits, truth, ignore, weights), strict=True)]
        bce, overlap, area = (torch.cat(values) for values in zip(*sums, strict=True))
        number = (~ignore).sum((1, 2)).clamp(min=1) if ignore is not None else max(1, logits[0:1].numel())
        number = torch.as_tensor(number, device=logits.device).expand(len(logits))
        overlap, area = overlap / DICE_SCALE + DICE_EPS, area / DICE_SCALE + DICE_EPS
        ctx.save_for_backward(logits, truth, ignore, weights, overlap, area, number)
        return bce / number, 1 - overlap / area

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_bce: Tensor, of_dice: Tensor) -> tuple[Tensor, None, None, None]:
        logits, truth, ignore, weights, overlap, area, number = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        inside, outside = (
            of_dice * (overlap - 2 * area) / area**2 / DICE_SCALE,
            of_dice * overlap / area**2 / DICE_SCALE,
        )
        factors = [of_bce / number, inside, outside]
        parts = _in_step(logits, truth, ignore, weights, gradient, *factors)
        for x, t, skipped, weigh, out, bce, in_truth, out_of_truth in zip(*parts, strict=True):
            drawn = torch.sigmoid(x)
            slope = (1 - drawn).mul_(drawn)  # of drawn
            slope *= torch.lerp(out_of_truth[:, None, None], in_truth[:, None, None], t)
            drawn -= t
            drawn *= bce[:, None, None]
            if weigh is not None:
                drawn *= weigh
            torch.add(drawn, slope, out=out)
            if skipped is not None:
                out.masked_fill_(skipped, 0)
        return gradient, None, None, None


def _sums(logits: Tensor, truth: Tensor, ignore: Tensor | None, weights: Tensor | None) -> tuple[Tensor, ...]:
    """BCE summed over pixels; twice the overlap of drawn and true; their areas together. (N,) each."""
    pixels = F.softplus(logits).addcmul_(logits, truth, value=-1)
    if weights is not None:
        pixels *= weights
    if ignore is not None:
        pixels.masked_fill_(ignore, 0)
        truth = truth.masked_fill(ignore, 0)
    bce = pixels.sum((1, 2))
    drawn = torch.sigmoid(logits, out=pixels)
    if ignore is not None:
        drawn.masked_fill_(ignore, 0)
    area = drawn.sum((1, 2)) + truth.sum((1, 2))
    return bce, 2 * drawn.mul_(truth).sum((1, 2)), area


def _in_step(logits: Tensor, *others: Tensor | None) -> list[Any]:
    """All of them in pieces of as many masks."""
    pieces, size = _pieces(logits), _piece(logits)
    return [pieces, *([None] * len(pieces) if other is None else other.split(size) for other in others)]


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    return values.split(_piece(values))


def _piece(values: Tensor) -> int:
    """So many of `values` hold AT_ONCE elements."""
    return max(1, AT_ONCE // max(1, values[0:1].numel()))


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
