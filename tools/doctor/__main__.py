"""Checks a dataset folder against a recipe: is everything there that the recipe uses, and is it complete?

    python scripts/data_doctor.py configs/lisa_7b.yaml --dataset_dir ./dataset --fix-hints
    python scripts/data_doctor.py configs/toy/lisa.yaml --sample 4 --out sheets    # images, masks and exact words

Prints a table of the sources that the recipe trains and evaluates on, then what is wrong with them. Exit status 1 if
anything is (with --strict also for warnings), 2 if the recipe itself cannot be read. Every record that is checked goes
through all that training does with it: words, ids (where the tokenizer of model.version is on this machine), masks,
views. No model is loaded. Annotation files are indexed on the way, so that training starts at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.encode import Encoder
from data.readers.index import set_index_folder
from systems.base import SYSTEMS, build_system
from tools.doctor.examine import WARNING, Report, examine
from tools.doctor.overlap import check_overlap
from tools.doctor.plan import TRAIN, needs_of
from tools.doctor.rehearsal import Rehearsal
from tools.doctor.sheets import Speaker, write_sheet
from tools.doctor.table import as_table, findings, fix_hints
from utils.config import Recipe, from_dict, load_recipe, to_dict, with_overrides
from utils.flags import at_least
from utils.log import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    setup_logging()
    try:
        recipe = read(args)
        rehearsal = Rehearsal.of(recipe)
        needs = needs_of(recipe)
    except (ValueError, KeyError, OSError) as error:
        print(f"data_doctor.py: {args.recipe}: {error}", file=sys.stderr)
        return 2
    root = Path(recipe.data.dataset_dir)
    set_index_folder(recipe.data.index_dir)
    reports = [examine(need, root, rehearsal, None if args.full else args.check) for need in needs]
    check_overlap(reports, recipe, root)
    print(f"{args.recipe} on {root.resolve()}\n\n{as_table(reports)}\n")
    if text := findings(reports):
        print(f"{text}\n")
    if args.fix_hints and (text := fix_hints(reports)):
        print(f"{text}\n")
    if args.sample:
        write_sheets(reports, recipe, rehearsal.maker.encoder, args)
    if rehearsal.unchecked:
        print(f"not checked: {rehearsal.unchecked}")
    faults = sum(report.faults for report in reports)
    warnings = sum(finding.level == WARNING for report in reports for finding in report.findings)
    print(f"{faults} faults, {warnings} warnings" if faults or warnings else "all well")
    return int(bool(faults or (args.strict and warnings)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML of configs/, or a run folder")
    parser.add_argument("--dataset_dir", type=Path, metavar="ROOT", help="the dataset folder, if not the recipe's")
    parser.add_argument(
        "--check", type=at_least(1), default=50, metavar="N", help="records to check per source (default 50)"
    )
    parser.add_argument("--full", action="store_true", help="check all records")
    parser.add_argument("--strict", action="store_true", help="exit status 1 also for warnings")
    parser.add_argument("--fix-hints", action="store_true", help="say where missing data are downloaded and unpacked")
    parser.add_argument(
        "--sample", type=at_least(0), default=0, metavar="N", help="write a sheet of N records per source"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the sheets go; needed with --sample")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="systems that the sheets show (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which records the sheets show (default 0)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="set any recipe field")
    args = parser.parse_args(argv)
    if args.sample and not args.out:
        parser.error("--sample needs --out DIR")
    for name in args.systems or ():
        if name not in SYSTEMS:
            parser.error(f"no system {name!r}; have: {', '.join(SYSTEMS)}")
    return args


def read(args: argparse.Namespace) -> Recipe:
    values = with_overrides(to_dict(load_recipe(args.recipe)), args.set)
    if args.dataset_dir:
        values["data"]["dataset_dir"] = str(args.dataset_dir)
    return from_dict(Recipe, values)


def write_sheets(reports: Sequence[Report], recipe: Recipe, encoder: Encoder, args: argparse.Namespace) -> None:
    """A sheet per training source. The system of the recipe has its options there, the others have their defaults."""
    names = args.systems or [recipe.system, *(name for name in SYSTEMS if name != recipe.system)]
    options = {recipe.system: recipe.options}
    words = encoder.template, encoder.tokenizer.family
    speakers = [Speaker(build_system(name, options.get(name)), *words) for name in names]
    for number, report in enumerate(reports):
        if report.need.role == TRAIN and report.images:
            rng = np.random.default_rng((args.seed, number))
            name = f"{number:02d} {report.need.label}"
            try:
                path = write_sheet(name, report.opened, speakers, count=args.sample, out=args.out, rng=rng)
            except (OSError, ValueError) as error:
                print(f"no sheet of {report.need.label}: {error}")
            else:
                print(f"sheet of {report.need.label}: {path}")


if __name__ == "__main__":
    sys.exit(main())
