"""The figures and images of the demo: a toy run before and after training, on generated answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from data.collate import load_views
from evaluation.protocols import GENERATED, generate
from evaluation.report.draw import Panel, grid
from evaluation.report.panels import panel
from evaluation.results import EvaluationResults
from evaluation.runner import evaluate, source_options
from evaluation.suites import find_suites
from systems.assistant import Assistant, build, load
from utils.config import load_recipe
from utils.log import setup_logging
from utils.run_log import read_log

FIGURES = {  # name in the report -> suite and metric
    "miou": ("ade20k|val", "mIoU"),
    "present_accuracy": ("ade20k|val", "present_accuracy"),
    "absent_accuracy": ("ade20k|val", "absent_accuracy"),
    "refer_ciou": ("refcoco|unc|val", "cIoU"),
    "reason_giou": ("ReasonSeg|val", "gIoU"),
}
SUITES = tuple(dict.fromkeys(suite for suite, _ in FIGURES.values()))
GRID_EXAMPLES = {
    "ade20k|val": (0, 1, 2, 3),
    "refcoco|unc|val": (4, 5, 6),
    "ReasonSeg|val": (7, 8, 9),
}  # images of the grid


def run(args: argparse.Namespace) -> int:
    """Evaluates before and after training; writes figures and images into args.out."""
    setup_logging()
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(args.run)
    dataset_dir = args.dataset_dir or recipe.data.dataset_dir
    report: dict[str, Any] = {}
    for moment in ("before", "after"):
        print(f"Evaluating {moment} training, {args.limit} images per suite, generated answers")
        assistant = build(recipe, trainable=False) if moment == "before" else load(args.merged or args.run)
        results = score(assistant, dataset_dir, args)
        (args.out / f"results_{moment}.json").write_text(
            json.dumps(results.to_json(), indent=1) + "\n", encoding="utf-8"
        )
        values = results.summary()
        report[moment] = {name: values[suite][metric] for name, (suite, metric) in FIGURES.items()}
    report["train_seconds"] = round(train_seconds(args.run), 1)
    (args.out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows = [row for suite in SUITES for row in suite_panels(assistant, suite, dataset_dir, args.max_new_tokens)]
    page = grid(rows)
    Image.fromarray(page).save(args.out / "grid.png")
    print(score_table(report))
    print(f"figures: {args.out / 'metrics.json'}; images: {args.out / 'grid.png'}")
    return 0


def score(assistant: Assistant, dataset_dir: str, args: argparse.Namespace) -> EvaluationResults:
    """The results of all suites; missing data ends the program, because the report needs every suite."""
    results = evaluate(
        assistant,
        SUITES,
        dataset_dir,
        GENERATED,
        args.limit,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    if results.missing:
        raise SystemExit("\n".join(f"{name}: {message}" for name, message in results.missing.items()))
    return results


def suite_panels(assistant: Assistant, name: str, dataset_dir: str, max_new_tokens: int) -> list[Panel]:
    """Panels of some images of a suite: the first question about each, or all questions of a class list."""
    (suite,) = find_suites([name])
    source = suite.open(dataset_dir, source_options(assistant.recipe, suite))
    rows = []
    for index in GRID_EXAMPLES[name]:
        record = source[index % len(source)]
        queries = assistant.system.task.queries(record)
        if record.kind != "classes":
            queries = queries[:1]
        (replies,) = generate(assistant, [load_views(record.image, assistant.views)], [queries], max_new_tokens)
        rows.append(panel(record, queries, replies))
    return rows


def train_seconds(run: Path) -> float:
    """Time spent training, also over several processes of a resumed run.

    From the log: images between two lines, divided by images per second. Pauses between processes do not count.
    """
    train = load_recipe(run).train
    processes = json.loads((run / "meta.json").read_text(encoding="utf-8"))[-1]["processes"]
    images_per_step = train.batch_size * train.grad_accumulation_steps * processes
    seconds = 0.0
    last_step = 0
    for row in read_log(run / "log.jsonl"):
        if row["kind"] == "train":
            seconds += (row["step"] - last_step) * images_per_step / row["images_per_second"]
            last_step = row["step"]
    return seconds


def score_table(report: dict[str, Any]) -> str:
    """The figures before and after training, side by side."""
    lines = [f"{'':<18}{'before':>8}{'after':>8}"]
    for name, (suite, metric) in FIGURES.items():
        figures = (report[moment][name] for moment in ("before", "after"))
        values = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        lines.append(f"{name:<18}" + "".join(f"{value:>8}" for value in values) + f"   {metric} on {suite}, generated")
    return "\n".join([*lines, f"{'train_seconds':<18}{'':>8}{report['train_seconds']:>8}"])
