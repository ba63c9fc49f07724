"""Evaluates a trained row: every toy benchmark, class lists of four kinds, multi-target questions, by generation.

    python -m toy.study.exam --run OUT/lisa/train --dataset_dir OUT/dataset --out OUT/lisa [--lists_only]

Writes below --out one folder per part (results.json, predictions) and exam.json, the figures of all parts. An
interrupted evaluation resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from toy.study.exam_parts import run  # takes seconds, and `--help` does without

    return run(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m toy.study.exam", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder of train_ds.py")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="the toy data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for answers and figures")
    parser.add_argument("--lists_only", action="store_true", help="class lists only, as for ablations")
    parser.add_argument("--most", type=int, default=0, help="upper limit of images per suite (default 0: none)")
    parser.add_argument("--batch_size", type=int, default=4, help="images per batch (default 4)")
    parser.add_argument("--max_new_tokens", type=int, default=160, help="token limit of an answer (default 160)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
