"""The run folder: what it holds, whether it can be used, and when a run has to stop early."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from data.mixture import Part
from training.checkpoint import Checkpoints, TrainState, check_writable
from training.compatibility import BEST_BY, contents, differences
from training.lock import Lock
from training.provenance import describe, describe_data, last_start
from utils import dist
from utils.config import Recipe, load_recipe, save_recipe
from utils.log import log

RECIPE = "recipe.yaml"

BYTES_PER_WEIGHT = 12  # of a checkpoint: the weight and two Adam moments, in fp32
STEPS_PER_EPOCH = 500  # as released


def with_epochs(recipe: Recipe, pictures: int) -> Recipe:
    """The recipe with the steps of an epoch as a number, unless it counts no epochs (train.steps).

    Where `data.sampling` is epoch it need not state any: an epoch of its mixture, `pictures` records, has as many steps
    as visit each of them.
    """
    train, steps = recipe.train, STEPS_PER_EPOCH
    if train.steps is not None:
        return recipe
    if recipe.data.sampling == "epoch":
        a_step = train.batch_size * train.grad_accumulation_steps * dist.world_size()
        steps = math.ceil(pictures / a_step)
        if train.steps_per_epoch not in (None, steps):
            log.warning(
                "train.steps_per_epoch is %d; an epoch of data.sampling epoch is %d steps (%d pictures, %d a step): "
                "leave it out (null) to have it so",
                train.steps_per_epoch,
                steps,
                pictures,
                a_step,
            )
    return replace(recipe, train=replace(train, steps_per_epoch=train.steps_per_epoch or steps))


def ends_epoch(recipe: Recipe, step: int) -> bool:
    """Whether a checkpoint is saved after `step` for a validation: after each epoch, or, where the recipe counts steps
    alone, after every eval.every_steps and the last."""
    train = recipe.train
    if train.steps is None:
        assert train.steps_per_epoch is not None, "see with_epochs"
        return step % train.steps_per_epoch == 0
    every = recipe.eval.every_steps
    return step == train.steps or bool(every and step % every == 0)


def validates(recipe: Recipe, step: int) -> bool:
    """Whether the suites are scored where an epoch ends: not after each, where eval.every_epochs is more than 1."""
    train = recipe.train
    if train.steps is not None:
        return True
    assert train.steps_per_epoch is not None, "see with_epochs"
    epoch = step // train.steps_per_epoch
    return epoch == train.epochs or epoch % recipe.eval.every_epochs == 0


@contextmanager
def open_run(recipe: Recipe) -> Iterator[Run]:
    """The run folder of a recipe, for this training alone, compared with the recipe before anything is built.

    Raises on all processes, with nothing changed on the disk, when the folder cannot be written, another process
    trains there, it holds a run of another recipe or one that is not to be resumed, or the checkpoint to resume
    from is damaged.
    """
    lock = Lock(recipe.run.folder)
    try:
        dist.on_main(lock.acquire)
        yield Run(recipe, dist.on_main(lambda: find_resume(recipe)), lock)
    finally:
        lock.release()


def find_resume(recipe: Recipe) -> Path | None:
    """The checkpoint to resume from, if any: the folder's last one or the one of them that `train.resume` names; for a
    new run, that of another which it names."""
    folder, checkpoints = recipe.run.folder, checkpoints_of(recipe)
    last, asked = checkpoints.last(), Path(recipe.train.resume) if recipe.train.resume else None
    own = asked is not None and asked.parent.resolve() == checkpoints.folder.resolve()
    if last and not recipe.train.auto_resume and not own:
        raise FileExistsError(
            f"{folder} already holds a run up to {last.name}: go on with --auto_resume, choose another --exp_name, "
            "or remove the folder"
        )
    chosen = asked if own or last is None else last
    if chosen is not None:
        checkpoints.check(chosen)
        compare(recipe, chosen)
    return chosen


def compare(recipe: Recipe, chosen: Path) -> None:
    """Raises where the recipe would give the weights of this checkpoint another meaning than its run's recipe does."""
    run = chosen.absolute().parents[1]
    if not (run / RECIPE).is_file():
        if run.resolve() == recipe.run.folder.resolve():
            raise FileNotFoundError(
                f"{run} holds checkpoints but no {RECIPE}, so nothing says what they mean: put it back, or choose "
                "another --exp_name"
            )
        log.warning("%s: no %s beside it, so it cannot be compared with this recipe", chosen, RECIPE)
        return
    before = recipe_of(run)
    meaning, _ = differences(before, recipe, last_start(run).get("content", {}))
    if meaning:
        raise ValueError(
            f"{chosen} belongs to another recipe; its weights mean nothing under this one:\n"
            + "".join(f"  {change}\n" for change in meaning)
            + f"Nothing was changed. Choose another --exp_name for this recipe, or give {run / RECIPE} as --config to "
            "resume that run"
        )


def recipe_of(run: Path) -> Recipe:
    try:
        return load_recipe(run)
    except ValueError as error:
        raise ValueError(
            f"{run / RECIPE} cannot be read, so nothing says what the checkpoints beside it mean ({error}): put a "
            "whole copy back, or choose another --exp_name"
        ) from None


def checkpoints_of(recipe: Recipe, size: int = 0) -> Checkpoints:
    return Checkpoints(recipe.run.folder / "checkpoints", recipe.train.keep_checkpoints, size)


@dataclass
class Run:
    """An open run folder. resume: the checkpoint that it resumes from."""

    recipe: Recipe
    resume: Path | None
    lock: Lock

    def checkpoints(self, model: nn.Module) -> Checkpoints:
        """The folder's checkpoints; raises where there is no room for one of the model's trained weights."""
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        size = BYTES_PER_WEIGHT * trained
        dist.on_main(lambda: check_writable(self.recipe.run.folder, size))
        return checkpoints_of(self.recipe, size)

    def begin(self, recipe: Recipe, checkpoints: Checkpoints, state: TrainState, parts: Sequence[Part]) -> TrainState:
        """The first that is written to the folder, once `restore` has succeeded: pointers that say what is there, the
        recipe with the steps of an epoch counted, how the run was started, from where, with which settings changed."""
        return dist.on_main(lambda: self._begin(recipe, checkpoints, state, parts))

    def _begin(self, recipe: Recipe, checkpoints: Checkpoints, state: TrainState, parts: Sequence[Part]) -> TrainState:
        folder, changed, more = recipe.run.folder, [], {"content": contents(recipe), "step": state.step}
        finished = state.step >= recipe.train.total_steps
        if self.resume is not None:
            run = self.resume.absolute().parents[1]
            more["from"] = str(self.resume)
            if (run / RECIPE).is_file():
                _, changed = differences(recipe_of(run), recipe, last_start(run).get("content", {}))
        if changed:
            more["changes"] = {change.field: [change.before, change.now] for change in changed}
            how = "is finished, and nothing was trained with" if finished else "resumes with"
            log.warning("%s %s other settings: %s", folder, how, "; ".join(map(str, changed)))
        state = checkpoints.resume_at(self.resume, state)
        if any(change.field.startswith(BEST_BY) for change in changed) and state.best is not None:
            log.warning("what validation measures has changed: the best score so far, %s, counts no more", state.best)
            state.best = None
        describe(folder, **more)  # before the recipe: killed between them, the next start says the changes again
        describe_data(folder, parts)
        if not finished or not (folder / RECIPE).is_file():  # what the weights were trained with stays their recipe
            save_recipe(recipe, folder)
        self.lock.sign()
        return state


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
