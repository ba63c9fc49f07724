"""Trains a segmentation assistant: build it, then the training loop, in the open.

    deepspeed train_ds.py --version=LLAVA --vision_pretrained=SAM --dataset_dir=./dataset --exp_name=mine ...
    python train_ds.py --config configs/toy/lasagna.yaml
    torchrun --nproc_per_node 2 train_ds.py --config RECIPE --set train.zero_stage=3

Writes runs/<exp_name>/: recipe.yaml, meta.json, log.jsonl, tensorboard/, checkpoints/{step_*, last, best}.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.collate import SampleBuilder
from data.mixture import Mixture, Stream
from data.readers.index import set_index_folder
from evaluation.metrics.scorers import SCORERS
from evaluation.protocols import protocol_named
from evaluation.report.examples import sample_grid
from evaluation.report.html import write_report
from evaluation.runner import as_table, evaluate, source_options, summary
from evaluation.suites import find_suites
from model.losses import objective
from systems.assistant import Assistant, build, load
from systems.base import systems_accepting
from training.checkpoint import Checkpoints, TrainState, restore
from training.engine import Engine, check_settings
from training.loss_guard import LossGuard
from training.meters import Meters, Progress
from training.run import Run, Stop, open_run, with_epochs
from utils import dist
from utils.config import DatasetConfig, Recipe
from utils.flags import resolve
from utils.log import RunLog, import_wandb, log, setup_logging
from utils.registry import unknown


def main(argv: list[str] | None = None) -> None:
    try:
        recipe = resolve(sys.argv[1:] if argv is None else argv, systems_accepting)
        check_settings(recipe.train)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"train_ds.py: {error}") from None
    setup_logging(dist.is_main())
    set_index_folder(recipe.data.index_dir)
    check_suites(recipe)
    if recipe.run.wandb:
        import_wandb()
    dist.start(recipe.train.timeout_minutes)
    if recipe.eval.eval_only:
        score(finished(recipe), recipe, suites_of(recipe), out=recipe.run.folder / "eval")
        return
    with open_run(recipe) as run:  # whatever does not belong into its folder is refused before anything is built
        train(build(recipe, device="cpu"), run)  # the engine brings it to the device, divided or whole


def train(assistant: Assistant, run: Run) -> None:
    """Trains to the end, the time limit or SIGTERM; validates after each epoch; goes on where a run folder stopped."""
    mixture = training_mixture(assistant, run.recipe)
    recipe = with_epochs(run.recipe, mixture.num_records)
    settings = recipe.train
    total = settings.total_steps
    checkpoints = run.checkpoints(assistant.model)
    engine = Engine(assistant.model, recipe)
    state = restore(engine, run.resume, recipe) if run.resume else TrainState.begin(recipe)
    state = run.begin(recipe, checkpoints, state, mixture.parts)
    meters = Meters()
    meters.restore(state.meters)
    guard = LossGuard(settings.on_bad_loss)

    leave = False
    with ExitStack() as stack:
        run_log = RunLog(recipe.run, step=state.step, again=owed(state), enabled=dist.is_main())
        stack.callback(run_log.close)
        bar = stack.enter_context(closing(Progress(total, state.step)))
        stop = stack.enter_context(closing(Stop(settings.time_limit_minutes)))
        stream = stack.enter_context(closing(training_stream(mixture, recipe, state)))
        validate(assistant, engine, recipe, state, checkpoints, run_log)  # what a killed run still owes
        for step in range(state.step, total):
            engine.train()
            rate = engine.lr
            part = 0
            while part < settings.grad_accumulation_steps:
                batch = meters.timed(stream).to(engine.device, assistant.model.dtype)
                state.samples += settings.batch_size * state.processes
                seed_chance(settings.seed, step, part * state.processes + dist.rank())
                losses = objective(engine(batch), batch, recipe.loss)
                if not guard.accepts(losses, batch, state):
                    continue
                engine.backward(losses.total)
                engine.step()
                meters.add(losses.parts, weight=len(batch))
                part += 1
            state.step += 1
            bar.step()

            leave, epoch_ends = stop() and state.step < total, recipe.ends_epoch(state.step)
            if state.step % settings.print_freq == 0 or epoch_ends:
                means = meters.read()
                bar.show(means)
                skipped = {"skipped": state.skipped} if state.skipped else {}
                run_log.write("train", state.step, {**means, "lr": rate, "grad_norm": engine.grad_norm, **skipped})
            if leave or epoch_ends or (settings.save_steps and state.step % settings.save_steps == 0):
                state.meters = dist.all_gather(meters.state())
                run_log.sync()
                checkpoints.save(engine, state)
            if leave:
                break
            if epoch_ends:
                validate(assistant, engine, recipe, state, checkpoints, run_log)
        if not leave:
            stop.close()  # from here on nothing is left to save
            finish(assistant, engine, recipe, state, run_log)
    log.info("%s at step %d of %d: %s", "stopped" if leave else "finished", state.step, total, recipe.run.folder)


def finish(assistant: Assistant, engine: Engine, recipe: Recipe, state: TrainState, run_log: RunLog) -> None:
    """Scores the final suites, where the recipe has some."""
    if recipe.eval.final_eval and recipe.eval.final_suites:
        with engine.gathered():
            run_log.write("final", state.step, score(assistant, recipe, recipe.eval.final_suites))


def owed(state: TrainState) -> tuple[str, ...]:
    """The kinds of lines that this start writes at the step where it begins: a run killed between a line and the note
    in its checkpoint has written them already."""
    return ("final",) if state.validated == state.step else ("final", "val")


def training_mixture(assistant: Assistant, recipe: Recipe) -> Mixture:
    """What is trained on, in the system's words and the model's views."""
    maker = SampleBuilder(
        assistant.system.task,
        assistant.encoder,
        assistant.views,
        ignore_region=recipe.loss.ignore_region,
        drop_long_rows=recipe.data.on_bad_sample == "skip",
    )
    return Mixture.build(recipe.data, maker, seed=recipe.train.seed, held_out=held_out(recipe))


def training_stream(mixture: Mixture, recipe: Recipe, state: TrainState) -> Stream:
    """The batches of this process, from where the state stands."""
    train = recipe.train
    return Stream(
        mixture,
        train.batch_size,
        image_tokens=mixture.builder.encoder.image_tokens,
        rank=dist.rank(),
        world=dist.world_size(),
        start=state.samples,
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        pin_memory=dist.device().type == "cuda",
    )


def seed_chance(*key: int) -> None:
    """Dropout depends on the key (seed, step, micro-batch of the step) alone: a resumed run needs no stored state, and
    another number of processes that share a step's micro-batches changes nothing.

    Called after the batch is drawn, for a loader that starts takes a number from the same generator.
    """
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def validate(
    assistant: Assistant, engine: Engine, recipe: Recipe, state: TrainState, checkpoints: Checkpoints, run_log: RunLog
) -> None:
    """At the end of an epoch, once: scores the validation suites and notes whether the checkpoint just saved is best.

    Without validation the newest checkpoint counts as best.
    """
    if not recipe.ends_epoch(state.step) or state.validated == state.step:
        return
    state.validated, best = state.step, not (recipe.eval.validate and recipe.eval.suites)
    out = recipe.run.folder / "validation"
    if not best and recipe.validates_after(state.step):
        with engine.gathered():
            scores = score(assistant, recipe, recipe.eval.suites, out=out)
        run_log.write("val", state.step, scores)
        if recipe.eval.num_examples and dist.is_main():
            run_log.picture("val", state.step, sample_grid(out, recipe.eval))
        value = next(iter(scores.values()))[recipe.eval.best_by]
        if value is not None and (state.best is None or value > state.best):
            state.best, best = value, True
    checkpoints.note(state, best=best)


def finished(recipe: Recipe) -> Assistant:
    """What eval_only scores: the checkpoint of a run that --resume names, else the weights of --version."""
    if recipe.train.resume:
        checkpoint = Path(recipe.train.resume).resolve()
        cache = {"embedding_cache": recipe.model.embedding_cache}
        return load(
            checkpoint.parents[1], checkpoint=checkpoint.name, system=recipe.system, model=cache, device=dist.device()
        )
    return build(recipe, device=dist.device(), trainable=False)


def score(assistant: Assistant, recipe: Recipe, suites: Sequence[str], out: Path | None = None) -> dict[str, Any]:
    """Suite -> metric -> value; the table goes to the terminal."""
    how = recipe.eval
    results = evaluate(
        assistant,
        suites,
        recipe.data.dataset_dir,
        how.protocol,
        how.limit,
        out,
        batch_size=how.batch_size,
        max_new_tokens=how.max_new_tokens,
        workers=recipe.data.val_workers,
        custom=recipe.eval.custom,
    )
    log.info("%s", as_table(results))
    if results["missing"]:
        raise ValueError("; ".join(f"{name}: {message}" for name, message in results["missing"].items()))
    if out and dist.is_main():
        write_report(results, [out / "predictions"], out / "report", how.custom)
    return summary(results)


def suites_of(recipe: Recipe) -> tuple[str, ...]:
    """Every suite that this command will need."""
    final = recipe.eval.final_suites if recipe.eval.final_eval else ()
    return (*(recipe.eval.suites if recipe.eval.validate or recipe.eval.eval_only else ()), *final)


def held_out(recipe: Recipe) -> list[DatasetConfig]:
    """The evaluation splits of the recipe, as sources; `data.exclude_val: eval_suites` keeps their pictures out."""
    names = (*recipe.eval.suites, *recipe.eval.final_suites)
    chosen = find_suites(names, recipe.eval.custom) if names else []
    return [DatasetConfig(suite.source or suite.name, options=suite.options) for suite in chosen]


def check_suites(recipe: Recipe) -> None:
    """Raises now, not after the first epoch, when a suite's data are not there or it has no figure to be best by."""
    protocol_named(recipe.eval.protocol)
    for suite in find_suites(suites_of(recipe), recipe.eval.custom) if suites_of(recipe) else ():
        suite.open(recipe.data.dataset_dir, source_options(recipe, suite))
    if recipe.eval.validate and recipe.eval.suites:
        first = find_suites(recipe.eval.suites, recipe.eval.custom)[0]
        figures = {figure.metric for figure in SCORERS[first.metric]().figures()}
        if recipe.eval.best_by not in figures:
            raise ValueError(f"eval.best_by: {unknown(f'figure of {first.name}', recipe.eval.best_by, figures)}")


if __name__ == "__main__":
    main()
    dist.stop()
