"""Plans the GPU memory of a recipe, without a GPU, without weights and without data.

    python -m tools.memory configs/lisa_7b.yaml --gpus 8 --gpu_memory 24
    python -m tools.memory configs/lasagna_7b.yaml --gpus 2 --gpu_memory 80 --set train.batch_size=4

The training step itself runs on tensors that have shapes and no values, and every allocation is counted; weights,
gradients and optimizer states follow DeepSpeed's arithmetic for each ZeRO stage. Where the recipe does not fit, changes
to it are tried one after another until it does. Exit status: 0 where it fits as it is, 1 where it does not, 2 where
the recipe cannot be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.flags import at_least


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tools.memory.plan import plan  # takes seconds, and `--help` does without

    return plan(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.memory", description=__doc__, formatter_class=style)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML of configs/, or a run folder")
    parser.add_argument("--gpus", type=at_least(1), default=8, metavar="N", help="number of devices [8]")
    parser.add_argument("--gpu_memory", type=float, default=24, metavar="GIB", help="memory of each device [24]")
    parser.add_argument(
        "--reserve", type=float, default=1.5, metavar="GIB", help="kept free for CUDA, NCCL and fragmentation [1.5]"
    )
    parser.add_argument("--dialogues", type=at_least(1), metavar="N", help="dialogues per image [the recipe's maximum]")
    parser.add_argument(
        "--length", type=at_least(1), metavar="N", help="positions of a row [the recipe's maximum, else 1024]"
    )
    parser.add_argument("--masks", type=at_least(1), default=1, metavar="N", help="masks per dialogue [1]")
    parser.add_argument(
        "--picture", type=at_least(1), nargs=2, default=(480, 640), metavar=("H", "W"), help="of an image [480 640]"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="change a field of the recipe")
    args = parser.parse_args(argv)
    if args.gpu_memory <= 0 or args.reserve < 0:
        parser.error("--gpu_memory must be above 0, and --reserve 0 or more")
    if args.reserve >= args.gpu_memory:
        parser.error("--reserve leaves nothing of --gpu_memory")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
