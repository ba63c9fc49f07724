"""The run folder: what it holds, whether it can be used, and when a run has to stop early."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import replace
from pathlib import Path

from torch import nn

from training.checkpoint import Checkpoints, check_writable
from training.provenance import describe
from utils import dist
from utils.config import Recipe, save_recipe
from utils.log import log

BYTES_A_WEIGHT = 12  # of a checkpoint: the weight and two Adam moments, in fp32
STEPS_PER_EPOCH = 500  # as released


def with_epochs(recipe: Recipe, pictures: int) -> Recipe:
    """The recipe with the steps of an epoch as a number. Where `data.sampling` is once it need not state any: then an
    epoch of its mixture, `pictures` records, takes as many as visit each of them."""
    train, steps = recipe.train, STEPS_PER_EPOCH
    if recipe.data.sampling == "once":
        a_step = train.batch_size * train.grad_accumulation_steps * dist.world_size()
        steps = math.ceil(pictures / a_step)
        if train.steps_per_epoch not in (None, steps):
            log.warning(
                "train.steps_per_epoch is %d; an epoch of data.sampling once is %d steps (%d pictures, %d a step): "
                "leave it out (null) to have it so",
                train.steps_per_epoch,
                steps,
                pictures,
                a_step,
            )
    return replace(recipe, train=replace(train, steps_per_epoch=train.steps_per_epoch or steps))


def open_run(recipe: Recipe, model: nn.Module) -> tuple[Checkpoints, Path | None]:
    """Makes the run folder ready and returns its checkpoints and the one to go on from, if any: its own last one, or
    that of another run which the recipe names to start from.

    Raises, before anything is computed, when the folder cannot be written, has no room for a checkpoint of the
    model's trained weights, or holds another run that this one would overwrite.
    """
    folder = recipe.run.folder
    checkpoints = Checkpoints(folder / "checkpoints", recipe.train.keep_checkpoints)
    resume = checkpoints.last()
    if resume and not recipe.train.auto_resume:
        raise FileExistsError(
            f"{folder} already holds a run up to {resume.name}: go on with --auto_resume, choose another --exp_name, "
            "or remove the folder"
        )
    if resume is None and recipe.train.resume:
        resume = Path(recipe.train.resume)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if dist.is_main():
        check_writable(folder, BYTES_A_WEIGHT * trained)
        checkpoints.prepare()
        save_recipe(recipe, folder)
        describe(folder)
    dist.barrier()
    return checkpoints, resume


class Stop:
    """Whether to save and leave: the time limit is over, or a scheduler sent SIGTERM. All processes get one answer."""

    def __init__(self, minutes: float = 0.0):
        self.until = time.monotonic() + 60 * minutes if minutes > 0 else None
        self.asked = False
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True

    def __call__(self) -> bool:
        over = self.until is not None and time.monotonic() > self.until
        stop = dist.any_process(self.asked or over)
        if stop:
            log.info("stopping early: %s", "SIGTERM" if self.asked else "time limit, or another process asked to")
        return stop

    def close(self) -> None:
        signal.signal(signal.SIGTERM, self._before)
