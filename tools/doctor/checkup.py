"""Examines all that a recipe needs of a dataset folder, prints the findings and writes sample sheets."""

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
from utils.log import setup_logging
from utils.registry import unknown


def run(args: argparse.Namespace) -> int:
    """Examines, prints and writes sheets; returns the exit status: 1 for faults, 2 where the recipe cannot be read."""
    setup_logging()
    for name in args.systems or ():
        if name not in SYSTEMS:
            raise SystemExit(f"data_doctor.py: --systems: {unknown('system', name, SYSTEMS)}")
    try:
        recipe = read(args)
        rehearsal = Rehearsal.of(recipe)
        needs = needs_of(recipe)
    except (ValueError, KeyError, OSError) as error:
        text = str(error)
        named = text if text.startswith(str(args.recipe)) else f"{args.recipe}: {text}"
        print(f"data_doctor.py: {named}", file=sys.stderr)
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
