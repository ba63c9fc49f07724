"""Losses that are not finite: the run stops and names the images of the micro-batch, or leaves it out."""

from __future__ import annotations

import torch

from data.types import Batch
from model.losses import Losses
from training.checkpoint import TrainState
from utils import dist
from utils.log import log

IN_A_ROW = 10  # micro-batches without a usable loss after which the weights, not the images, are to blame


class LossGuard:
    """Checks the loss of each micro-batch before its backward pass.

    All processes get the same answer: if one skipped a micro-batch alone, the others would wait for its gradients.
    on_bad_loss: `stop` or `skip`, as in the recipe's train section.
    """

    def __init__(self, on_bad_loss: str):
        self.skips = on_bad_loss == "skip"
        self.in_a_row = 0
        self.lost_in_a_row = 0

    def note_update(self, done: bool, state: TrainState, *, expected: bool) -> None:
        """Counts the steps whose update was dropped since its gradient is not finite, although the loss is. The same on
        all processes. expected: fp16, whose loss scale is found that way.

        Raises FloatingPointError, where it is not expected, if the recipe says stop, or at the IN_A_ROW-th in
        succession.
        """
        if done:
            self.lost_in_a_row = 0
            return
        state.lost_updates += 1
        self.lost_in_a_row += 1
        if expected:
            return
        message = f"step {state.step + 1}: the loss is finite and its gradient is not, so that nothing was updated"
        if not self.skips:
            raise FloatingPointError(f"{message} (train.on_bad_loss=skip continues with the next step)")
        if self.lost_in_a_row >= IN_A_ROW:
            raise FloatingPointError(f"{message}. It is the {IN_A_ROW}th in a row: the weights have probably diverged")
        log.warning(message)

    def accepts(self, losses: Losses, batch: Batch, state: TrainState) -> bool:
        """Whether the loss is finite on every process. All processes call it.

        If it is not and the recipe says skip, counts the micro-batch as skipped on all processes and returns False.
        Raises FloatingPointError if the recipe says stop, or at the IN_A_ROW-th such micro-batch in succession.
        """
        finite = bool(torch.isfinite(losses.total))
        if not dist.any_process(not finite):
            self.in_a_row = 0
            return True
        messages = dist.all_gather("" if finite else describe_loss(losses, batch))
        message = f"step {state.step + 1}: " + "; ".join(filter(None, messages))
        self.in_a_row += 1
        if not self.skips:
            raise FloatingPointError(f"{message} (train.on_bad_loss=skip trains without such images)")
        if self.in_a_row >= IN_A_ROW:
            raise FloatingPointError(f"{message}. It is the {IN_A_ROW}th in a row: the weights have probably diverged")
        state.skipped += 1
        log.warning("left out: %s", message)
        return False


def describe_loss(losses: Losses, batch: Batch) -> str:
    parts = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.parts.items())
    return f"the loss is {losses.total.item()} ({parts}) for {batch.names}"
