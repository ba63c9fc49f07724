"""Losses that are no numbers: the run stops and says which pictures gave one, or does without them."""

from __future__ import annotations

import torch

from data.types import Batch
from model.losses import Losses
from training.checkpoint import TrainState
from utils import dist
from utils.log import log

IN_A_ROW = 10  # micro-batches without a usable loss after which the weights, not the pictures, are to blame


class LossGuard:
    """Looks at each micro-batch before its gradients count. All processes get one answer.

    on_bad_loss: `stop` or `skip`, as the recipe's train section has it.
    """

    def __init__(self, on_bad_loss: str):
        self.skips, self.in_a_row = on_bad_loss == "skip", 0

    def accepts(self, losses: Losses, batch: Batch, state: TrainState) -> bool:
        """Whether every process may go on with its loss. Else, where the recipe says so, the micro-batch is counted
        as skipped by all of them; or this raises."""
        fine = bool(torch.isfinite(losses.total))
        if not dist.any_process(not fine):
            self.in_a_row = 0
            return True
        words = "; ".join(filter(None, dist.all_gather("" if fine else describe(losses, batch))))
        words = f"step {state.step + 1}: {words}"
        self.in_a_row += 1
        if not self.skips:
            raise FloatingPointError(f"{words} (train.on_bad_loss=skip goes on without such pictures)")
        if self.in_a_row >= IN_A_ROW:
            raise FloatingPointError(f"{words}. It is the {IN_A_ROW}th in a row: the weights have probably diverged")
        state.skipped += 1
        log.warning("left out: %s", words)
        return False


def describe(losses: Losses, batch: Batch) -> str:
    parts = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.parts.items())
    return f"the loss is {losses.total.item()} ({parts}) for {batch.names}"
