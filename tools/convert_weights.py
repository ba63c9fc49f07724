"""Converts a finished checkpoint to the project's folder or back to the published layout; accounts for each weight.

    python -m tools.convert_weights --version LISA-7B-v1 --save_path lisa-7b
    python -m tools.convert_weights --version LLAVA --weight gsva-7b-ft-gres.bin --system gsva --save_path gsva-7b
    python -m tools.convert_weights --version lisa-7b --format original --save_path lisa-7b-published

Reads what chat.py and test_sem.py read: published folders of .bin or .safetensors shards, a bare training file on top
of its base (LoRA is merged with --set model.lora.alpha divided by its rank), run folders, merged folders. Writes fp32
unless --precision says otherwise. SAVE_PATH/conversion.json lists the weights that were ignored (with the reason),
newly initialised, or missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from evaluation.cli import Parser, add_model_flags

FORMATS = ("project", "original")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tools.conversion import run  # takes seconds, and `--help` does without

    return run(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m tools.convert_weights", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    add_model_flags(parser)
    parser.add_argument("--save_path", help="folder to write")
    parser.add_argument(
        "--format", choices=FORMATS, default="project", help="project: safetensors; original: as released"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a --save_path that this did not write")
    args = parser.parse(argv)
    if not args.version or not args.save_path:
        parser.error("--version (what to convert) and --save_path (where to) are needed")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
