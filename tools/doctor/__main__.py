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

from utils.flags import at_least


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tools.doctor.checkup import run  # takes seconds, and `--help` does without

    return run(args)


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
    return args


if __name__ == "__main__":
    sys.exit(main())
