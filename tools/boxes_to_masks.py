"""Masks of a detector's boxes by a SAM, as a file of predictions: a baseline for any suite of phrases or classes.

    python test_sem.py --write_questions questions.jsonl --suites 'refcoco|unc|val'
    python -m tools.boxes_to_masks boxes.json --questions questions.jsonl --sam facebook/sam-vit-huge --out masks.json
    python test_sem.py --predictions masks.json --suites 'refcoco|unc|val'

BOXES are COCO results (a JSON list or JSON lines) with `bbox` [x, y, width, height] in pixels; an entry says which
question it answers as docs/judge.md describes, and may have a `score`. The output keeps every field of an entry and
adds `segmentation` and `area`. --sam is a folder or hub name of SAM in the form of transformers (SamModel). Images are
those of the questions, below --dataset_dir.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.flags import at_least


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tools.box_masks import run  # takes seconds, and `--help` does without

    return run(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.boxes_to_masks", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("boxes", type=Path, metavar="BOXES", help="COCO results with bbox, JSON or JSON lines")
    parser.add_argument(
        "--questions", type=Path, required=True, metavar="JSONL", help="of test_sem.py --write_questions: which images"
    )
    parser.add_argument("--sam", required=True, metavar="FOLDER", help="SAM of transformers: folder or hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file of predictions to write")
    parser.add_argument(
        "--dataset_dir", type=Path, default=Path("dataset"), metavar="FOLDER", help="root of all datasets [./dataset]"
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=32, metavar="N", help="boxes of an image decoded at once [32]"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
