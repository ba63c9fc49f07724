"""A run and its folder: whether it can be used, what a start writes into it, and when a run has to stop early."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from data.mixture import Part
from model.checkpoints.fingerprint import contents
from training.checkpoint import Checkpoints, TrainState, check_writable, global_batch_size, step_of, store_state
from training.compatibility import BEST_BY, Change, differences
from training.lock import Lock
from training.provenance import describe_data, describe_start, last_start
from utils import dist
from utils.config import Recipe, load_recipe, save_recipe
from utils.log import log

RECIPE = "recipe.yaml"
BYTES_PER_WEIGHT = 12  # of a checkpoint: the weight and two Adam moments, in fp32
STEPS_PER_EPOCH = 500  # as released


def with_epochs(recipe: Recipe, pictures: int) -> Recipe:
    """The recipe with `train.steps_per_epoch` filled in, unless it counts no epochs (`train.steps`).

    With `data.sampling` epoch, an epoch has as many steps as visit each of the mixture's records (`pictures` of them)
    once; else 500, as released. A number that the recipe states stays.
    """
    train = recipe.train
    if train.steps is not None:
        return recipe
    steps = STEPS_PER_EPOCH
    if recipe.data.sampling == "epoch":
        per_step = global_batch_size(train, dist.world_size())
        steps = math.ceil(pictures / per_step)
        if train.steps_per_epoch not in (None, steps):
            log.warning(
                "train.steps_per_epoch is %d; an epoch of data.sampling epoch is %d steps (%d images, %d per step): "
                "leave it out (null) for that",
                train.steps_per_epoch,
                steps,
                pictures,
                per_step,
            )
    return replace(recipe, train=replace(train, steps_per_epoch=train.steps_per_epoch or steps))


def with_precision(recipe: Recipe) -> Recipe:
    """The recipe with the number format that this device computes in place of `auto`: a run records what it was trained
    in."""
    precision = dist.precision(recipe.model.precision)
    if precision == "bf16" and not dist.computes_bf16():
        log.warning(
            "model.precision is bf16, for which this device has no instructions: it is emulated, on a CPU some 50 "
            "times slower than fp32; model.precision=auto takes the faster one"
        )
    elif recipe.model.precision == "auto":
        log.info("model.precision auto: %s", precision)
    return replace(recipe, model=replace(recipe.model, precision=precision))


@contextmanager
def open_run(recipe: Recipe) -> Generator[Run]:
    """The run folder of a recipe, locked, and compared with the recipe before the model is built.

    Raises on all processes, with nothing changed on the disk, when the folder cannot be written, another process
    trains there, it holds a run of another recipe or one that is not to be resumed, or the checkpoint to resume
    from is damaged.
    """
    lock, started = Lock(recipe.run.folder), time.monotonic()
    try:
        dist.on_main(lock.acquire)
        yield Run(recipe, dist.on_main(lambda: find_resume(recipe)), lock, started)
    finally:
        lock.release()


def find_resume(recipe: Recipe) -> Path | None:
    """The checkpoint to resume from; None for a new run.

    `train.resume` may name one of the folder's own checkpoints, or, while the folder has none, one of another run.
    Without it, or where the same command line is given again after an interruption, it is the folder's last one: that
    is, where it names another run's although the folder has checkpoints, or the one that the last start named, too.
    """
    checkpoints = checkpoints_of(recipe)
    last = checkpoints.last()
    resume = Path(recipe.train.resume) if recipe.train.resume else None
    is_own = resume is not None and resume.parent.resolve() == checkpoints.folder.resolve()
    if last and not recipe.train.auto_resume and not is_own:
        raise FileExistsError(
            f"{recipe.run.folder} already holds a run up to {last.name}: resume it with --auto_resume, choose another "
            "--exp_name, or remove the folder"
        )
    if resume is not None and not is_own and last and not _resumed_before(recipe):
        raise FileExistsError(
            f"{recipe.run.folder} already holds a run up to {last.name}, which did not begin at {resume}: choose "
            "another --exp_name for that, or leave out --resume to continue the one there"
        )
    checkpoint = resume if is_own or last is None else last
    if is_own and last and step_of(last) > step_of(resume) and _resumed_before(recipe):
        log.warning(
            "%s: the last start resumed from it, too, so this one continues from %s; rename that and what else is "
            "newer to go back once more",
            *(resume, last.name),
        )
        checkpoint = last
    if checkpoint is not None:
        checkpoints.check(checkpoint)
        check_recipe(recipe, checkpoint)
    return checkpoint


def _resumed_before(recipe: Recipe) -> bool:
    """Whether the last start that trained in the recipe's folder named the same checkpoint to resume from."""
    folder = recipe.run.folder
    return (folder / RECIPE).is_file() and recipe_of(folder).train.resume == recipe.train.resume


def check_recipe(recipe: Recipe, checkpoint: Path) -> None:
    """Raises where the recipe would give the weights of this checkpoint another meaning than its run's recipe does."""
    run = checkpoint.absolute().parents[1]
    if not (run / RECIPE).is_file():
        if run.resolve() == recipe.run.folder.resolve():
            raise FileNotFoundError(
                f"{run} holds checkpoints but no {RECIPE}, so nothing says what they mean: put it back, or choose "
                "another --exp_name"
            )
        log.warning("%s: its run has no %s, so it cannot be compared with this recipe", checkpoint, RECIPE)
        return
    before = recipe_of(run)
    meaning, _ = differences(before, recipe, last_start(run).get("content", {}))
    if meaning:
        raise ValueError(
            f"{checkpoint} belongs to another recipe; its weights mean nothing under this one:\n"
            + "".join(f"  {change}\n" for change in meaning)
            + f"Nothing was changed. Choose another --exp_name for this recipe, or give {run / RECIPE} as --config to "
            "resume that run"
        )


def recipe_of(run: Path) -> Recipe:
    try:
        return load_recipe(run)
    except ValueError as error:
        raise ValueError(
            f"{run / RECIPE} cannot be read, so nothing says what the run's checkpoints mean ({error}): put an "
            "undamaged copy back, or choose another --exp_name"
        ) from None


def checkpoints_of(recipe: Recipe, size: int = 0) -> Checkpoints:
    return Checkpoints(recipe.run.folder / "checkpoints", recipe.train.keep_checkpoints, size)


@dataclass
class Run:
    """A locked run folder. resume: the checkpoint that the run resumes from. started: when it was opened, before
    anything slow."""

    recipe: Recipe
    resume: Path | None
    lock: Lock
    started: float = field(default_factory=time.monotonic)

    def checkpoints(self, model: nn.Module) -> Checkpoints:
        """The folder's checkpoints; raises OSError where there is no room for one of the model's trained weights."""
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        size = BYTES_PER_WEIGHT * trained
        dist.on_main(lambda: check_writable(self.recipe.run.folder, size))
        return checkpoints_of(self.recipe, size)

    def begin(self, recipe: Recipe, checkpoints: Checkpoints, state: TrainState, parts: Sequence[Part]) -> TrainState:
        """Writes to the folder for the first time, once `restore` has succeeded: the pointers to its checkpoints, an
        entry about this start with the settings that changed, the recipe. All processes call it and get the state."""
        return dist.on_main(lambda: self._begin(recipe, checkpoints, state, parts))

    def _begin(self, recipe: Recipe, checkpoints: Checkpoints, state: TrainState, parts: Sequence[Part]) -> TrainState:
        folder = recipe.run.folder
        changed: list[Change] = []
        more: dict[str, Any] = {"content": contents(recipe.model), "step": state.step}
        if self.resume is not None:
            run = self.resume.absolute().parents[1]
            more["from"] = str(self.resume)
            if (run / RECIPE).is_file():
                _, changed = differences(recipe_of(run), recipe, last_start(run).get("content", {}))
        state = checkpoints.resume_at(self.resume, state)  # without a best score where that of another run stands
        if self.resume and state.best is not None and any(change.field.startswith(BEST_BY) for change in changed):
            log.warning("what validation measures has changed: the best score so far, %s, no longer counts", state.best)
            state.forget_best()
            store_state(state, self.resume)  # before the recipe, without which no next start would see the change
        finished = state.step >= recipe.train.total_steps or out_of_patience(recipe, state)
        if changed:
            more["changes"] = {change.field: [change.before, change.now] for change in changed}
            how = "is finished, and nothing was trained with" if finished else "resumes with"
            log.warning("%s %s other settings: %s", folder, how, "; ".join(map(str, changed)))
        # Before the recipe: if the process is killed between the two, the next start reports the changes again.
        describe_start(folder, **more)
        describe_data(folder, parts)
        # A finished run is trained no further: the recipe that its weights were trained with stays.
        if not finished or not (folder / RECIPE).is_file():
            save_recipe(recipe, folder)
        self.lock.sign()
        return state


def out_of_patience(recipe: Recipe, state: TrainState) -> bool:
    """Whether `train.patience` ends the run here. The same on all processes: they have the same scores and state."""
    return 0 < recipe.train.patience <= state.no_better


class StopSignal:
    """Whether to save and stop: the time limit is over, or a scheduler has sent SIGTERM.

    Schedulers send SIGTERM some time before they kill a job. The handler only notes it, since a signal may arrive in
    the middle of a collective operation or of a write; the loop asks after each step. Not every process gets the
    signal, and clocks differ, so the processes agree: one that stopped alone would leave the others waiting for it.
    """

    def __init__(self, minutes: float = 0.0, started: float | None = None):
        begin = time.monotonic() if started is None else started  # weights are read and data indexed before the loop
        self.deadline = begin + 60 * minutes if minutes > 0 else None
        self.received = False
        self._previous_handler = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.received = True

    def __call__(self) -> bool:
        """The same answer on all processes, which must all call it."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        stop = dist.any_process(self.received or late)
        if stop:
            log.info("stopping early: %s", "SIGTERM" if self.received else "time limit, or a signal to another process")
        return stop

    def close(self) -> None:
        """From here on SIGTERM does again what it did before."""
        signal.signal(signal.SIGTERM, self._previous_handler)
