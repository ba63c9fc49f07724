"""Write the language model of the toy base as a plain LLaMA folder, for a LLaVA with another vision tower.

python -m toy.base.language runs/llama
python -m toy.base.language runs/llama --base runs/base   # of a base that python -m toy.base --out runs/base has made
"""

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from toy.base.language_part import write_language  # takes seconds, and `--help` does without

    write_language(args.out, args.base)
    print(f"wrote {args.out}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m toy.base.language", description=__doc__, formatter_class=style)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--base", type=Path, default=Path("assets/toy"), help="a base of toy.base (%(default)s)")
    args = parser.parse_args(argv)
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"{args.out} is there already; give another OUT, or remove it")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
