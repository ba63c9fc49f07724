"""Scoring while a model trains: the suites at the end of an epoch, which checkpoint is best, the final suites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.metrics import SCORERS
from evaluation.protocols import protocol_named
from evaluation.report.examples import sample_grid
from evaluation.report.html import write_report
from evaluation.report.markdown import as_table
from evaluation.runner import evaluate, source_options
from evaluation.suites import find_suites
from systems.assistant import Assistant, build, load
from training.checkpoint import Checkpoints, TrainState
from training.engine import Engine
from utils import dist
from utils.config import DatasetConfig, Recipe
from utils.log import log
from utils.registry import unknown
from utils.run_log import RunLog


def validate(
    assistant: Assistant, engine: Engine, recipe: Recipe, state: TrainState, checkpoints: Checkpoints, run_log: RunLog
) -> None:
    """At the end of an epoch, once: scores the validation suites and notes whether the checkpoint just saved is best.

    Does nothing within an epoch, or where this step has been validated already. Without validation the newest
    checkpoint counts as best, until one has a score: it stays the best while validation is off. All processes call it.
    """
    if not recipe.ends_epoch(state.step) or state.validated == state.step:
        return
    state.validated = state.step
    settings = recipe.eval
    validates = settings.validate and settings.suites
    is_best = not validates and state.best is None
    if validates and recipe.validates_after(state.step):
        out = recipe.run.folder / "validation"
        with engine.gathered():
            scores = score(assistant, recipe, settings.suites, out=out)
        run_log.write("val", state.step, scores)
        if settings.num_examples and dist.is_main():
            run_log.picture("val", state.step, sample_grid(out, settings))
        value = next(iter(scores.values()))[settings.best_by]  # of the first suite
        is_best = value is not None and (state.best is None or value > state.best)
        if is_best:
            state.best = value
        if value is not None:  # a figure of which nothing was counted says neither
            state.no_better = 0 if is_best else state.no_better + 1
    checkpoints.note(state, best=is_best)


def score_final(assistant: Assistant, engine: Engine, recipe: Recipe, state: TrainState, run_log: RunLog) -> None:
    """Scores the final suites after the last step, where the recipe has some. All processes call it."""
    if recipe.eval.final_eval and recipe.eval.final_suites:
        with engine.gathered():
            run_log.rewrite("final", state.step, score(assistant, recipe, recipe.eval.final_suites))


def assistant_to_score(recipe: Recipe) -> Assistant:
    """For `eval_only`: the checkpoint of a run that --resume names, else the weights of --version."""
    if recipe.train.resume:
        checkpoint = Path(recipe.train.resume).resolve()
        cache = {"embedding_cache": recipe.model.embedding_cache}
        return load(
            checkpoint.parents[1], checkpoint=checkpoint.name, system=recipe.system, model=cache, device=dist.device()
        )
    last = Checkpoints(recipe.run.folder / "checkpoints").last()
    if last and recipe.train.auto_resume:
        raise ValueError(
            f"{recipe.run.folder} holds a run up to {last.name}: --resume {last} scores that, and --no_auto_resume the "
            "weights of --version"
        )
    return build(recipe, device=dist.device(), trainable=False)


def score(assistant: Assistant, recipe: Recipe, suites: Sequence[str], out: Path | None = None) -> dict[str, Any]:
    """Suite -> metric -> value, by the protocol of the recipe's `eval` section. Prints the table.

    out: folder for predictions and report. Raises ValueError where the data of a suite are missing.
    """
    settings = recipe.eval
    results = evaluate(
        assistant,
        suites,
        recipe.data.dataset_dir,
        settings.protocol,
        settings.limit,
        out,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        workers=recipe.data.val_workers,
        custom=settings.custom,
    )
    log.info("%s", as_table(results))
    if results.missing:
        raise ValueError("; ".join(f"{name}: {message}" for name, message in results.missing.items()))
    if out and dist.is_main():
        write_report(results, [out / "predictions"], out / "report", settings.custom)
    return results.summary()


def suites_needed(recipe: Recipe) -> tuple[str, ...]:
    """Every suite that this command will score."""
    settings = recipe.eval
    names: list[str] = []
    if settings.eval_only or settings.validate:
        names += settings.suites
    if settings.final_eval:
        names += settings.final_suites
    return tuple(names)


def evaluation_splits(recipe: Recipe) -> list[DatasetConfig]:
    """The suites of the recipe as sources; `data.exclude_val: eval_suites` keeps their images out of training."""
    names = (*recipe.eval.suites, *recipe.eval.final_suites)
    suites = find_suites(names, recipe.eval.custom) if names else []
    return [DatasetConfig(suite.source or suite.name, options=suite.options) for suite in suites]


def check_suites(recipe: Recipe) -> None:
    """Raises now, not after the first epoch, where the data of a suite are missing or it has no figure `best_by`."""
    settings = recipe.eval
    protocol_named(settings.protocol)
    names = suites_needed(recipe)
    suites = find_suites(names, settings.custom) if names else []
    for suite in suites:
        suite.open(
            recipe.data.dataset_dir,
            source_options(recipe, suite),
            keep_faults=recipe.data.on_bad_sample == "skip",
        )
    if settings.validate and settings.suites:
        first = find_suites(settings.suites, settings.custom)[0]
        figures = {figure.metric for figure in SCORERS[first.metric]().figures()}
        if settings.best_by not in figures:
            raise ValueError(f"eval.best_by: {unknown(f'figure of {first.name}', settings.best_by, figures)}")
