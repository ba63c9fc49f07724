"""Evaluates an assistant on suites (benchmarks), by default on the semantic ones.

    python test_sem.py --version runs/mine --dataset_dir ./dataset
    python test_sem.py --version runs/mine-merged --suites 'refcoco*' ReasonSeg'|val' --protocol teacher_forced
    torchrun --nproc_per_node 8 test_sem.py --version CHECKPOINT --val_dataset_list cityscapes,ade20k,cocostuff
    python test_sem.py --from runs/evaluation/mine/generate/predictions/refcoco_unc_val.jsonl
    python test_sem.py --version runs/mine --suite_file my_suites.yaml --dataset_dir ./mine
    python test_sem.py --list

Prints a table and writes OUT/results.json, OUT/results.md, OUT/report/index.html (a page that needs nothing else) and
OUT/predictions/<suite>.jsonl; every figure names its protocol and variant. The same command resumes an interrupted
evaluation; --from scores predictions again, without model or data.
The exit status is 1 when the data of a suite are missing; the other suites are evaluated nevertheless.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.mixture import ON_BAD_SAMPLE
from evaluation import suites
from evaluation.cli import Parser, add_model_flags, load_assistant
from evaluation.identity import NotNumbers
from evaluation.protocols import GENERATED, PROTOCOLS
from evaluation.report.html import write_report
from evaluation.report.markdown import as_table
from evaluation.results import write_results
from evaluation.runner import evaluate
from evaluation.score import rescore
from systems.weights_recipe import RECIPE, recipe_in
from utils import dist
from utils.config import SuiteConfig
from utils.flags import at_least
from utils.log import setup_logging

DEFAULT_SUITES = ("cityscapes", "ade20k", "cocostuff")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.predictions:
        return score_again(args)
    try:
        own = own_suites(args)
        if args.list:
            print(suites.table(own))
            return 0
        chosen = args.suites or ([suites.OWN_GROUP] if args.suite_file else args.val_dataset_list.split(","))
        suites.find_suites(chosen, own)
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
    folders = [Path(args.dataset_dir)] if args.dataset_dir else []
    try:
        results = rescore(args.predictions)
        print(as_table(results))
        if args.out:
            write_results(results, Path(args.out))
            write_report(results, args.predictions, Path(args.out) / "report", image_folders=folders)
    except (OSError, ValueError) as error:
        raise SystemExit(f"test_sem.py: {error}") from None
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_model_flags(parser)
    what = parser.add_argument_group("what to evaluate on")
    what.add_argument(
        "--dataset_dir",
        metavar="FOLDER",
        help="root of all datasets [./dataset]; with --from, the folder whose images the report may show [none]",
    )
    what.add_argument("--suites", nargs="+", metavar="NAME", help="names, sets, groups or globs; see --list")
    what.add_argument(
        "--suite_file", metavar="YAML", help="defines own suites; all of them are evaluated, or those of --suites"
    )
    what.add_argument(
        "--val_dataset_list",
        default=",".join(DEFAULT_SUITES),
        metavar="A,B,C",
        help=f"as --suites, in the original's spelling [{','.join(DEFAULT_SUITES)}]",
    )
    what.add_argument("--list", action="store_true", help="only print all suites")
    what.add_argument(
        "--classes", metavar="FILE", help="class list of the semantic suites; {source} stands for the source's name"
    )
    what.add_argument("--limit", type=at_least(0), default=0, metavar="N", help="first images per suite; 0: all [0]")
    what.add_argument(
        "--on_bad_sample",
        choices=ON_BAD_SAMPLE,
        help="a record that cannot be read, or whose mask is empty: raise gives up its suite, skip leaves the image "
        "out and counts it [as the checkpoint's recipe says]",
    )
    how = parser.add_argument_group("how to answer")
    how.add_argument("--protocol", default=GENERATED, choices=PROTOCOLS, help=f"how answers come about [{GENERATED}]")
    how.add_argument(
        "--batch_size", "--val_batch_size", type=at_least(1), default=1, metavar="N", help="images per batch [1]"
    )
    how.add_argument(
        "--max_new_tokens", type=at_least(1), default=512, metavar="N", help="token limit of an answer [512]"
    )
    how.add_argument("--workers", type=at_least(0), default=2, metavar="N", help="threads that read images ahead [2]")
    results = parser.add_argument_group("results")
    results.add_argument("--out", metavar="FOLDER", help="for results [runs/evaluation/<name of version>]")
    results.add_argument(
        "--fresh", action="store_true", help="start from scratch instead of resuming an interrupted evaluation"
    )
    results.add_argument(
        "--from",
        nargs="+",
        dest="predictions",
        metavar="JSONL",
        help="only score these predictions again (files or folders)",
    )
    results.add_argument(
        "--eval_only", action="store_true", help="accepted for compatibility with the original; has no effect"
    )
    args = parser.parse(argv)
    if not args.predictions:
        args.dataset_dir = args.dataset_dir or "./dataset"
    if not (args.list or args.predictions or args.version):
        parser.error("--version is needed: a run folder, a merged folder or a published checkpoint")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
