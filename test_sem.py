"""Evaluates an assistant on suites (benchmarks), by default on the semantic ones.

    python test_sem.py --version runs/mine --dataset_dir ./dataset
    python test_sem.py --version runs/mine-merged --suites 'refcoco*' ReasonSeg'|val' --protocol teacher_forced
    torchrun --nproc_per_node 8 test_sem.py --version CHECKPOINT --val_dataset_list cityscapes,ade20k,cocostuff
    python test_sem.py --from runs/evaluation/mine/generate/predictions/refcoco_unc_val.jsonl
    python test_sem.py --version runs/mine --suite_file my_suites.yaml --dataset_dir ./mine
    python test_sem.py --list
    python test_sem.py --write_questions questions.jsonl --suites 'refcoco|unc|val'   # for any other program
    python test_sem.py --predictions theirs.json --suites 'refcoco|unc|val' --out runs/theirs
    python test_sem.py --compare runs/evaluation/mine/generate runs/theirs --out runs/difference

Prints a table and writes OUT/results.json, OUT/results.md, OUT/report/index.html (a page that needs nothing else) and
OUT/predictions/<suite>.jsonl; every figure names its protocol and variant. The same command resumes an interrupted
evaluation; --from scores predictions again, without model or data. --predictions judges those of any program against
the data (docs/judge.md). --export writes COCO results, semantic and panoptic PNG files, too.
The exit status is 1 when the data of a suite are missing; the other suites are evaluated nevertheless.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.mixture import ON_BAD_SAMPLE
from evaluation import suites
from evaluation.asked import write_questions
from evaluation.cli import Parser, add_model_flags, load_assistant
from evaluation.compare import compare, comparison_table
from evaluation.export.suites import FORMS, export
from evaluation.identity import NotNumbers
from evaluation.judge import ON_MISSING, judge
from evaluation.protocols import GENERATED, PROTOCOLS
from evaluation.report.differences import write_comparison
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
    count = write_questions(file, chosen, args.dataset_dir, limit=args.limit, classes=args.classes, custom=own)
    print(f"{count} questions: {file}")
    return 0


def image_folders(args: argparse.Namespace) -> list[Path]:
    """The folders whose images may be shown of predictions that somebody else may have made."""
    return [Path(args.dataset_dir)] if args.dataset_dir else []


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_model_flags(parser)
    what = parser.add_argument_group("what to evaluate on")
    what.add_argument(
        "--dataset_dir",
        metavar="FOLDER",
        help="root of all datasets [./dataset]; with --from or --compare, where the images of a page may lie [none]",
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
        "--export",
        nargs="+",
        default=[],
        choices=FORMS,
        metavar="FORM",
        help="also write predictions as coco (results JSON), semantic or panoptic (PNG, of class lists) into --out",
    )
    results.add_argument(
        "--from",
        nargs="+",
        dest="rescored",
        metavar="JSONL",
        help="only score these predictions again (files or folders)",
    )
    others = parser.add_argument_group("predictions of any program, without a model (docs/judge.md)")
    others.add_argument(
        "--predictions",
        nargs="+",
        metavar="FILE",
        help="judge these on --suites: JSON lines or COCO results, or folders of this program's predictions",
    )
    others.add_argument(
        "--on_missing",
        default=ON_MISSING[0],
        choices=ON_MISSING,
        help="a query without an entry: empty scores it as an answer without a mask and counts it, error refuses "
        f"[{ON_MISSING[0]}]",
    )
    others.add_argument(
        "--write_questions", metavar="FILE", help="write the questions of --suites as JSON lines, for --predictions"
    )
    others.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="B minus A, two results of this program or the judge (folders or files), with paired intervals; --out "
        "gets a page of the queries on which they differ most",
    )
    results.add_argument(
        "--eval_only", action="store_true", help="accepted for compatibility with the original; has no effect"
    )
    args = parser.parse(argv)
    if not (args.rescored or args.compare):
        args.dataset_dir = args.dataset_dir or "./dataset"
    modes = [name for name in ("rescored", "predictions", "write_questions", "compare") if getattr(args, name)]
    if len(modes) > 1:
        parser.error("--from, --predictions, --write_questions and --compare are one at a time")
    if not (args.list or modes or args.version):
        parser.error("--version is needed: a run folder, a merged folder or a published checkpoint")
    if args.export and modes and not args.out:
        parser.error("--export needs --out: the folder that it writes into")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
