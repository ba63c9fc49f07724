"""Write a small backbone and mask head with random weights, for recipes that train from scratch.

    python -m toy.base.blank runs/blank                          # llava/ and sam_vit_toy.safetensors
    python -m toy.base.blank runs/blank --backbone qwen3_vl      # qwen3_vl/ and sam2/

The architectures are the real ones, at sizes that two CPU cores can train in full. LLaVA's tokenizer is the toy base's
(assets/toy), Qwen's is learned from the project's own words. The same seed gives the same weights.
"""

import argparse
from pathlib import Path

BACKBONES = ("llava", "qwen3_vl")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from toy.base.blank_parts import write  # takes seconds, and `--help` does without

    print(f"wrote {args.folder} and {write(args.backbone, args.folder, args.seed)}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m toy.base.blank", description=__doc__, formatter_class=style)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument(
        "--backbone", choices=BACKBONES, default="llava", help="llava (with SAM) or qwen3_vl (with SAM 2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the weights (default 0)")
    args = parser.parse_args(argv)
    args.folder = args.out / args.backbone
    if args.folder.is_dir() and any(args.folder.iterdir()):
        parser.error(f"{args.folder} is there already; give another OUT, or remove it")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
