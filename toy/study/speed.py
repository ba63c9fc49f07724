"""Milliseconds per query of every trained system: one thread, one image at a time, the systems taking turns.

    python -m toy.study.speed --runs lisa=OUT/lisa/train gsva=OUT/gsva/train --dataset_dir OUT/dataset --out FILE

A query is a phrase (read the image, encode it, generate the answer, decode the mask), or a full label set in as many
questions as the system needs. Medians of interleaved queries: other load on the machine affects all systems equally.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from toy.study.timing import run  # takes seconds, and `--help` does without

    return run(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m toy.study.speed", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=RUN", help="run folders of train_ds.py")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="the toy data set")
    parser.add_argument("--out", type=Path, required=True, help="file for the figures")
    parser.add_argument("--most", type=int, default=0, help="upper limit of queries per kind (default 0: none)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
