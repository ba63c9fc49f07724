"""Scores a toy run before and after training, and renders example answers.

    python -m toy.demo_report --run runs/demo/train --merged runs/demo/merged --dataset_dir runs/demo/dataset

"Before" is the base model as the run's recipe builds it, untrained. All answers are generated. Writes into --out:
metrics.json ({"before", "after", "train_seconds"}), results_before.json and results_after.json with every figure, and
grid.png (input, answer, predicted and true masks).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from toy.demo_scores import run  # takes seconds, and `--help` does without

    return run(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m toy.demo_report", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder of train_ds.py")
    parser.add_argument("--merged", type=Path, help="merged folder of that run; default: the run's best checkpoint")
    parser.add_argument("--dataset_dir", help="default: that of training")
    parser.add_argument("--out", type=Path, default=Path("runs/demo/report"), help="default: runs/demo/report")
    parser.add_argument("--limit", type=int, default=80, help="images per suite (default 80; 0: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="images per batch (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=192, help="token limit of an answer (default 192)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
