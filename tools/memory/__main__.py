"""Plans the GPU memory of a recipe, without a GPU, without weights and without data.

    python -m tools.memory configs/lisa_7b.yaml --gpus 8 --gpu_memory 24
    python -m tools.memory configs/lasagna_7b.yaml --gpus 2 --gpu_memory 80 --set train.batch_size=4

The training step itself runs on tensors that have shapes and no values, and every allocation is counted; weights,
gradients and optimizer states follow DeepSpeed's arithmetic for each ZeRO stage. Where the recipe does not fit, changes
to it are tried one after another until it does. Exit status: 0 where it fits as it is, 1 where it does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tools.memory.plan import plan  # takes seconds, and `--help` does without

    return plan(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.memory", description=__doc__, formatter_class=style)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML of configs/, or a run folder's recipe.yaml")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="number of devices [8]")
    parser.add_argument("--gpu_memory", type=float, default=24, metavar="GIB", help="memory of each device [24]")
    parser.add_argument(
        "--reserve", type=float, default=1.5, metavar="GIB", help="kept free for CUDA, NCCL and fragmentation [1.5]"
    )
    parser.add_argument("--dialogues", type=int, metavar="N", help="dialogues per image [the recipe's maximum]")
    parser.add_argument("--length", type=int, metavar="N", help="positions of a row [the recipe's maximum, else 1024]")
    parser.add_argument("--masks", type=int, default=1, metavar="N", help="masks per dialogue [1]")
    parser.add_argument(
        "--picture", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="of an image [480 640]"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="change a field of the recipe")
    args = parser.parse_args(argv)
    for name in ("gpus", "gpu_memory", "masks"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0")
    if args.reserve >= args.gpu_memory:
        parser.error("--reserve leaves nothing of --gpu_memory")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
