"""Writes what a toy run trained as the small assistant of assets/toy: fp16 weights on the toy base, and the recipe.

    python -m toy.publish_assistant --run runs/demo/train --out assets/toy/assistant

The folder is that of a run with one checkpoint and without optimizer states, so every program loads it by `--version`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toy.publish_assistant", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    from toy.base.publish import save_assistant  # takes seconds, and `--help` does without

    save_assistant(args.run, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
