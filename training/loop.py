"""Training from a command line to the last step: build the assistant, then the loop, in the open."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import torch

from data.collate import SampleBuilder
from data.mixture import Mixture, Stream
from data.readers.index import set_index_folder
from model.losses import objective
from systems.assistant import Assistant, build
from systems.base import build_system, systems_accepting
from training.checkpoint import TrainState, restore
from training.engine import Engine, check_settings
from training.loss_guard import LossGuard
from training.meters import Meters, Progress
from training.run import Run, StopSignal, open_run, out_of_patience, with_epochs, with_precision
from training.validation import (
    assistant_to_score,
    check_suites,
    evaluation_splits,
    score,
    score_final,
    suites_needed,
    validate,
)
from utils import dist
from utils.config import Recipe
from utils.flags import resolve
from utils.log import log, setup_logging
from utils.registry import UnknownName
from utils.run_log import RunLog, import_wandb

COUNTS = ("skipped", "lost_updates")  # of the state, in the log where they are not 0


def run(argv: list[str]) -> None:
    """All that a command line of train_ds.py asks for. Ends the program with a message where it cannot be done."""
    with message_alone():
        # A command line without a system means the first one that accepts its options and flags.
        recipe = resolve(argv, systems_accepting)
        check_settings(recipe.train)
        build_system(recipe.system, recipe.options)  # its options are checked before anything slow
        setup_logging(dist.is_main())
        set_index_folder(recipe.data.index_dir)
        check_suites(recipe)
        if recipe.run.wandb:
            import_wandb()  # fails now rather than after the model is built
    dist.start(recipe.train.timeout_minutes)
    recipe = with_precision(recipe)
    if recipe.eval.eval_only:
        with message_alone():
            assistant = assistant_to_score(recipe)
        score(assistant, recipe, suites_needed(recipe), out=recipe.run.folder / "eval")
        return
    with ExitStack() as stack:
        with message_alone():
            opened = stack.enter_context(open_run(recipe))  # before the model is built: the folder may not fit
            assistant = build(recipe, device="cpu")  # the engine moves it to the device, sharded under ZeRO-3
            mixture = training_mixture(assistant, recipe)
        train(assistant, mixture, opened)


@contextmanager
def message_alone() -> Generator[None]:
    """Ends the program with an error's message, without a traceback: a file, folder or setting is the cause of what is
    raised before the first step."""
    try:
        yield
    except (OSError, ValueError, ImportError, UnknownName) as error:
        raise SystemExit(f"train_ds.py: {error}") from None


def train(assistant: Assistant, mixture: Mixture, run: Run) -> None:
    """Trains to the last step, the end of `train.patience`, the time limit or SIGTERM; validates after each epoch;
    resumes where the run stopped."""
    recipe = with_epochs(run.recipe, mixture.num_records)
    settings = recipe.train
    last_step = settings.total_steps
    checkpoints = run.checkpoints(assistant.model)
    engine = Engine(assistant.model, recipe)
    state = restore(engine, run.resume, run.recipe) if run.resume else TrainState.begin(recipe)
    state = run.begin(recipe, checkpoints, state, mixture.parts)
    meters = Meters()
    meters.restore(state.meters)
    loss_guard = LossGuard(settings.on_bad_loss)

    stopping = False
    with ExitStack() as stack:
        run_log = RunLog(recipe.run, step=state.step, again=kinds_to_log_again(state), enabled=dist.is_main())
        stack.callback(run_log.close)
        progress = stack.enter_context(closing(Progress(last_step, state.step)))
        stop_signal = stack.enter_context(closing(StopSignal(settings.time_limit_minutes, run.started)))
        stream = stack.enter_context(closing(training_stream(mixture, recipe, state)))
        validate(assistant, engine, recipe, state, checkpoints, run_log)  # if it was due when the process was killed
        for step in range(state.step, last_step):
            if out_of_patience(recipe, state):  # before the step: a run that stopped here also resumes here
                break
            engine.train()
            lr = engine.lr
            micro_step = 0
            while micro_step < settings.grad_accumulation_steps:  # not `for`: a batch with a bad loss is replaced
                batch = meters.timed(stream).to(engine.device, assistant.model.dtype)
                state.samples += settings.batch_size * state.processes
                seed_dropout(settings.seed, step, micro_step * state.processes + dist.rank())
                losses = objective(engine(batch), batch, recipe.loss)
                if not loss_guard.accepts(losses, batch, state):
                    continue
                engine.backward(losses.total)
                engine.step()  # updates the weights after the last micro-batch of a step only
                meters.add(losses.parts, weight=len(batch))
                micro_step += 1
            loss_guard.note_update(engine.updated, state, expected=recipe.model.precision == "fp16")
            state.step += 1
            progress.step()

            # One answer for all ranks. Each must ask at every step, hence first: the answer is a collective operation.
            stopping = stop_signal() and state.step < last_step
            epoch_ends = recipe.ends_epoch(state.step)
            if state.step % settings.print_freq == 0 or epoch_ends:
                means = meters.read()
                progress.show(means)
                values = {**means, "lr": lr, "grad_norm": engine.grad_norm}
                values |= {name: count for name in COUNTS if (count := getattr(state, name))}
                run_log.write("train", state.step, values)
            save_due = settings.save_steps > 0 and state.step % settings.save_steps == 0
            if stopping or epoch_ends or save_due:
                state.meters = dist.all_gather(meters.state())
                run_log.sync()  # first: a resumed run trusts the log up to its checkpoint's step
                checkpoints.save(engine, state)
            if stopping:
                break
            if epoch_ends:
                validate(assistant, engine, recipe, state, checkpoints, run_log)
        if not stopping:
            stop_signal.close()  # nothing is left to save: from here on SIGTERM ends the process at once
            score_final(assistant, engine, recipe, state, run_log)
    how = "finished" if state.step >= last_step else "stopped"
    if state.step < last_step and out_of_patience(recipe, state):
        how = f"stopped: {recipe.eval.best_by} no better for {state.no_better} validations"
    log.info("%s at step %d of %d: %s", how, state.step, last_step, recipe.run.folder)


def training_mixture(assistant: Assistant, recipe: Recipe) -> Mixture:
    """The training data, in the system's words and the model's views."""
    builder = SampleBuilder(
        assistant.system.task,
        assistant.encoder,
        assistant.views,
        ignore_region=recipe.loss.ignore_region,
        drop_long_rows=recipe.data.on_bad_sample == "skip",
    )
    return Mixture.build(recipe.data, builder, seed=recipe.train.seed, held_out=evaluation_splits(recipe))


def training_stream(mixture: Mixture, recipe: Recipe, state: TrainState) -> Stream:
    """The batches of this process, from the sample that the state has reached."""
    return Stream(
        mixture,
        recipe.train.batch_size,
        rank=dist.rank(),
        world=dist.world_size(),
        start=state.samples,
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        pin_memory=dist.device().type == "cuda",
    )


def kinds_to_log_again(state: TrainState) -> tuple[str, ...]:
    """Kinds of log lines that this start will write at the step where it begins, so that the old ones are dropped.

    A run can be killed after it wrote a validation line and before its checkpoint noted the validation; then both the
    validation and its line are repeated.
    """
    return () if state.validated == state.step else ("val",)


def seed_dropout(*key: int) -> None:
    """Makes dropout a function of the key (seed, step, position of the micro-batch within the step over all processes).

    A checkpoint then needs no generator state, and 2 processes with 4 micro-batches each give the same dropout as 8
    processes with one: position 5 is micro-batch 2 of rank 1 in the first case, rank 5 in the second. Must be called
    after the batch is read: a data loader takes a number from the same generator when it starts.
    """
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
