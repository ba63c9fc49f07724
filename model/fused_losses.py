"""Memory-lean cross entropy and BCE + Dice: autograd functions that save only logits and targets for the backward pass.

Under autograd, cross entropy keeps the logits twice and BCE with Dice about seven mask-sized tensors. Here gradients
are given by formula and everything else is recomputed in chunks of bounded size, whatever the number of tokens and
masks. The plain forms stand next to the fused ones; tests compare values and gradients of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**24  # of a float32 temporary
DICE_SCALE = 1000.0  # as released by LISA: sums are divided by it
DICE_SMOOTH = 1e-3  # as released by LISA, which adds 1e-6 after the division


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(S, V) logits of any precision and (S,) targets -> their mean loss in float32 (float64 of float64 logits).

    Equals `F.cross_entropy(logits.float(), targets)`.
    """
    return _CrossEntropy.apply(logits, targets)


def bce_and_dice(
    logits: Tensor, truth: Tensor, ignore: Tensor | None, weights: Tensor | None, smooth: float = DICE_SMOOTH
) -> tuple[Tensor, Tensor]:
    """(N, H, W) logits and truth -> BCE and Dice loss per mask, (N,). ignore: (N, H, W) bool; weights: of BCE; smooth:
    what Dice adds to twice the overlap and to the areas, in pixels.

    Equals `plain_bce_and_dice`.
    """
    return _BceAndDice.apply(logits, truth, ignore, weights, smooth / DICE_SCALE)


def plain_bce_and_dice(
    logits: Tensor, truth: Tensor, ignore: Tensor | None, weights: Tensor | None, smooth: float = DICE_SMOOTH
) -> tuple[Tensor, Tensor]:
    """The same by the formulas of lisa.md 5.3, differentiated by autograd: the reference of `bce_and_dice`.

    Over the pixels of a mask that are not ignored, with p = sigmoid(x) and n their number:

        bce  = 1/n sum w * (softplus(x) - x t)
        dice = 1 - (2 sum p t / s + e) / ((sum p + sum t) / s + e)        s = 1000, e = smooth / s
    """
    eps = smooth / DICE_SCALE
    pixels = F.binary_cross_entropy_with_logits(logits, truth, weights, reduction="none")
    probs, number = logits.sigmoid() / DICE_SCALE, logits[0].numel()
    if ignore is not None:
        pixels, probs, truth = (values.masked_fill(ignore, 0) for values in (pixels, probs, truth))
        number = (~ignore).sum((1, 2)).clamp(min=1)
    overlap = 2 * (probs * truth).sum((1, 2))
    area = probs.sum((1, 2)) + (truth / DICE_SCALE).sum((1, 2))
    return pixels.sum((1, 2)) / number, 1 - (overlap + eps) / (area + eps)


class _CrossEntropy(Function):
    """mean(logsumexp(x) - x[target]), whose gradient is (softmax(x) - onehot(target)) / S."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logsumexp = torch.cat([_at_least_float32(chunk).logsumexp(-1) for chunk in _chunks(logits)])
        ctx.save_for_backward(logits, targets, logsumexp)
        return (logsumexp - logits.gather(1, targets[:, None])[:, 0]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        logits, targets, logsumexp = ctx.saved_tensors
        grad, size = torch.empty_like(logits), _chunk_size(logits)
        chunks = (values.split(size) for values in (grad, logits, logsumexp, targets))
        for out, x, lse, target in zip(*chunks, strict=True):
            # softmax from the saved logsumexp, in place where the gradient has its precision
            probs = torch.sub(x, lse[:, None], out=out if out.dtype == lse.dtype else None).exp_()
            probs.scatter_add_(1, target[:, None], probs.new_full((len(target), 1), -1.0))
            probs.mul_(grad_output / len(targets))
            if probs is not out:
                out.copy_(probs)
        return grad, None


class _BceAndDice(Function):
    """Gradients by hand. With o = 2 sum p t / s + e and a = (sum p + sum t) / s + e, dice = 1 - o / a and

        d dice / d p = -(do/dp a - o da/dp) / a^2 = (o - 2 t a) / (s a^2)

    which is linear in t: o / (s a^2) where t = 0 and (o - 2 a) / (s a^2) where t = 1, interpolated where the truth is
    fractional. The rest is the chain rule through p = sigmoid(x), dp/dx = p (1 - p), and d bce / dx = w (p - t) / n.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, truth: Tensor, ignore: Tensor | None, weights: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        sums = [_sums(*chunk) for chunk in zip(*_chunk_together(logits, truth, ignore, weights), strict=True)]
        bce, overlap, area = (torch.cat(values) for values in zip(*sums, strict=True))
        number = (~ignore).sum((1, 2)).clamp(min=1) if ignore is not None else max(1, logits[0:1].numel())
        number = torch.as_tensor(number, device=logits.device).expand(len(logits))
        overlap, area = overlap / DICE_SCALE + eps, area / DICE_SCALE + eps
        ctx.save_for_backward(logits, truth, ignore, weights, overlap, area, number)
        return bce / number, 1 - overlap / area

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bce: Tensor, grad_dice: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, truth, ignore, weights, overlap, area, number = ctx.saved_tensors
        grad = torch.empty_like(logits)
        dprob_inside = grad_dice * (overlap - 2 * area) / area**2 / DICE_SCALE  # where t = 1
        dprob_outside = grad_dice * overlap / area**2 / DICE_SCALE  # where t = 0
        per_mask = [grad_bce / number, dprob_inside, dprob_outside]
        chunks = _chunk_together(logits, truth, ignore, weights, grad, *per_mask)
        for x, t, ignored, weight, out, bce, inside, outside in zip(*chunks, strict=True):
            probs = torch.sigmoid(x)
            dlogit = (1 - probs).mul_(probs)  # dp/dx
            dlogit *= torch.lerp(outside[:, None, None], inside[:, None, None], t)
            probs -= t  # from here on the gradient of BCE, in place
            probs *= bce[:, None, None]
            if weight is not None:
                probs *= weight
            torch.add(probs, dlogit, out=out)
            if ignored is not None:
                out.masked_fill_(ignored, 0)
        return grad, None, None, None, None


def _sums(logits: Tensor, truth: Tensor, ignore: Tensor | None, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Per mask, (N,): BCE summed over pixels; twice the overlap of prediction and truth; the sum of their areas."""
    pixels = F.softplus(logits).addcmul_(logits, truth, value=-1)
    if weights is not None:
        pixels *= weights
    if ignore is not None:
        pixels.masked_fill_(ignore, 0)
        truth = truth.masked_fill(ignore, 0)
    bce = pixels.sum((1, 2))
    probs = torch.sigmoid(logits, out=pixels)
    if ignore is not None:
        probs.masked_fill_(ignore, 0)
    area = probs.sum((1, 2)) + truth.sum((1, 2))
    return bce, 2 * probs.mul_(truth).sum((1, 2)), area


def _chunk_together(logits: Tensor, *others: Tensor | None) -> list[Any]:
    """Splits all tensors into chunks of the same number of masks."""
    chunks, size = _chunks(logits), _chunk_size(logits)
    return [chunks, *([None] * len(chunks) if other is None else other.split(size) for other in others)]


def _chunks(values: Tensor) -> tuple[Tensor, ...]:
    return values.split(_chunk_size(values))


def _chunk_size(values: Tensor) -> int:
    """Items of `values` that hold CHUNK_ELEMENTS elements, at least one."""
    return max(1, CHUNK_ELEMENTS // max(1, values[0:1].numel()))


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
