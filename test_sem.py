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

from evaluation.cli import Parser, add_model_flags
from evaluation.names import FORMS, GENERATED, ON_MISSING, PROTOCOL_NAMES
from utils.config import DataConfig, choices
from utils.flags import at_least

DEFAULT_SUITES = ("cityscapes", "ade20k", "cocostuff")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from evaluation.modes import run  # takes seconds, and `--help` does without

    return run(args)


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
        choices=choices(DataConfig, "on_bad_sample"),
        help="a record that cannot be read, or whose mask is empty: raise gives up its suite, skip leaves the image "
        "out and counts it [as the checkpoint's recipe says]",
    )
    how = parser.add_argument_group("how to answer")
    how.add_argument(
        "--protocol", default=GENERATED, choices=PROTOCOL_NAMES, help=f"how answers come about [{GENERATED}]"
    )
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
