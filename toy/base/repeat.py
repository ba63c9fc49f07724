"""A short last stage: the language model of the toy base learns to repeat phrases of a question in its answer.

    python -m toy.base.repeat runs/base              # about 15 minutes on one CPU core

Every real LLaVA can do that; the toy base was taught to name classes and places. GSVA and SESAME write a phrase before
its mask, and the mask follows what was repeated. Vision tower and projector stay as they are, and every second step
has images and turns of the LLaVA stage, so that nothing is forgotten. Writes OUT/llava.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from toy.base.repeat_stage import teach  # takes seconds, and `--help` does without

    figures = teach(args.out, args.base, 60 * args.minutes, args.seed, resume=args.resume)
    print(f"wrote {args.out / 'llava'}: {', '.join(f'{name} {value:.3f}' for name, value in figures.items())}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m toy.base.repeat", description=__doc__, formatter_class=style)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--base", type=Path, default=Path("assets/toy"), help="the base to start from (%(default)s)")
    parser.add_argument("--minutes", type=float, default=15, help="training time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and words (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in OUT")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
