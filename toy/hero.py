"""The strip of answers at the top of the README: a class list, a referring phrase, a reasoning query, a refusal.

    python -m toy.hero --version runs/demo/merged --dataset_dir runs/demo/dataset --out assets/hero.png

Of the validation images it shows, per kind of question, the one that the model answers best; `assets/demo.png` shows
images that were not selected.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from toy.hero_panels import run  # takes seconds, and `--help` does without

    return run(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m toy.hero", description=__doc__, formatter_class=style)
    parser.add_argument("--version", default="runs/demo/merged", help="assistant to ask (default runs/demo/merged)")
    parser.add_argument("--dataset_dir", default="runs/demo/dataset", help="toy dataset (default runs/demo/dataset)")
    parser.add_argument("--images", type=int, default=20, help="images to choose from, per kind (default 20)")
    parser.add_argument("--out", type=Path, default=Path("assets/hero.png"), help="default assets/hero.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
