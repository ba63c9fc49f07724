"""Write the language model of the toy base as a plain LLaMA folder, for a LLaVA with another vision tower.

python -m toy.base.language runs/llama
"""

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    out = parse(argv).out
    from toy.base.language_part import write_language  # takes seconds, and `--help` does without

    write_language(out)
    print(f"wrote {out}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m toy.base.language", description=__doc__, formatter_class=style)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    args = parser.parse_args(argv)
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"{args.out} is there already; give another OUT, or remove it")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
