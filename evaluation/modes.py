"""What test_sem.py does: evaluates an assistant, scores predictions again, judges or compares those of any program."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evaluation import suites
from evaluation.asked import write_questions
from evaluation.cli import load_assistant
from evaluation.compare import compare, comparison_table
from evaluation.export.suites import export
from evaluation.identity import NotNumbers
from evaluation.judge import judge
from evaluation.report.differences import write_comparison
from evaluation.report.html import write_report
from evaluation.report.markdown import as_table
from evaluation.results import write_results
from evaluation.runner import evaluate
from evaluation.score import rescore
from systems.weights_recipe import RECIPE, recipe_in
from utils import dist
from utils.config import SuiteConfig
from utils.log import setup_logging


def run(args: argparse.Namespace) -> int:
    """What the flags of test_sem.py ask for; returns the exit status. Ends the program with a message at bad input."""
    try:
        if args.rescored:
            return score_again(args)
        own = own_suites(args)
        if args.list:
            print(suites.table(own))
            return 0
        if args.compare:
            return compare_two(args, own)
        chosen = args.suites or ([suites.OWN_GROUP] if args.suite_file else args.val_dataset_list.split(","))
        suites.find_suites(chosen, own)
        if args.write_questions:
            return questions_of(args, chosen, own)
        if args.predictions:
            return judge_files(args, chosen, own)
    except (OSError, ValueError) as error:
        raise SystemExit(f"test_sem.py: {error}") from None
    dist.start(timeout_minutes=24 * 60)  # the fastest process waits for the slowest at the end of each suite
    setup_logging(dist.is_main())
    assistant = load_assistant(args)
    out = Path(args.out or Path("runs") / "evaluation" / Path(args.version).name) / args.protocol
    try:
        results = evaluate(
            assistant,
            chosen,
            args.dataset_dir,
            args.protocol,
            args.limit,
            out,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            workers=args.workers,
            classes=args.classes,
            resume=not args.fresh,
            custom=own,
            on_bad_sample=args.on_bad_sample,
        )
    except NotNumbers as error:
        raise SystemExit(f"test_sem.py: {error}") from None
    if dist.is_main():
        print(as_table(results))
        write_report(results, [out / "predictions"], out / "report", own)
        export([out / "predictions"], out, args.export)
        print(f"results: {out / 'results.json'}; predictions: {out / 'predictions'}")
    dist.stop()
    return 1 if results.missing else 0


def own_suites(args: argparse.Namespace) -> tuple[SuiteConfig, ...]:
    """The suites that the recipe of --version and --suite_file define."""
    folder = Path(args.version or "")
    custom = suites.read_custom(args.suite_file) if args.suite_file else ()
    return (*(recipe_in(folder).eval.custom if args.version and (folder / RECIPE).is_file() else ()), *custom)


def score_again(args: argparse.Namespace) -> int:
    """Scores files of predictions; with --out results and report are written, too. The report shows the images that
    lie below --dataset_dir, and none without it."""
    results = rescore(args.rescored)
    print(as_table(results))
    if args.out:
        write_results(results, Path(args.out))
        write_report(results, args.rescored, Path(args.out) / "report", image_folders=image_folders(args))
        export(args.rescored, Path(args.out), args.export, image_folders(args))
    return 0


def judge_files(args: argparse.Namespace, chosen: Sequence[str], own: Sequence[SuiteConfig]) -> int:
    """Judges predictions of any program; with --out results, predictions with the judge's counts, and report are
    written, too."""
    setup_logging()
    out = Path(args.out) if args.out else None
    results = judge(
        args.predictions,
        chosen,
        args.dataset_dir,
        limit=args.limit,
        out_dir=out,
        classes=args.classes,
        custom=own,
        system=args.system,
        on_missing=args.on_missing,
        on_bad_sample=args.on_bad_sample or "raise",
    )
    print(as_table(results))
    if out and results.suites:
        write_report(results, [out / "predictions"], out / "report", own)
        export([out / "predictions"], out, args.export)
        print(f"results: {out / 'results.json'}; predictions: {out / 'predictions'}")
    return 1 if results.missing else 0


def compare_two(args: argparse.Namespace, own: Sequence[SuiteConfig]) -> int:
    """Compares two folders or files of predictions; with --out a page shows where they differ most."""
    first, second = args.compare
    compared = compare(first, second, args.suites)
    print(comparison_table(compared))
    if args.out:
        page = write_comparison(compared, Path(args.out), own, image_folders(args))
        print(f"page: {page}")
    return 0


def questions_of(args: argparse.Namespace, chosen: Sequence[str], own: Sequence[SuiteConfig]) -> int:
    """Writes the questions of the suites as JSON lines."""
    setup_logging()
    file = Path(args.write_questions)
    count = write_questions(
        file,
        chosen,
        args.dataset_dir,
        limit=args.limit,
        classes=args.classes,
        custom=own,
        on_bad_sample=args.on_bad_sample or "raise",
    )
    print(f"{count} questions: {file}")
    return 0


def image_folders(args: argparse.Namespace) -> list[Path]:
    """The folders whose images may be shown of predictions that somebody else may have made."""
    return [Path(args.dataset_dir)] if args.dataset_dir else []
