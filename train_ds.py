"""Trains a segmentation assistant; the loop is in training/loop.py.

    deepspeed train_ds.py --version=LLAVA --vision_pretrained=SAM --dataset_dir=./dataset --exp_name=mine ...
    python train_ds.py --config configs/toy/lasagna.yaml
    torchrun --nproc_per_node 2 train_ds.py --config RECIPE --set train.zero_stage=3

Writes runs/<exp_name>/: recipe.yaml, meta.json, log.jsonl, tensorboard/, checkpoints/{step_*, last, best}.
"""

from __future__ import annotations

import sys

from utils.flags import check_flags


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    check_flags(words)
    from training.loop import run  # takes seconds, and `--help` does without

    run(words)


if __name__ == "__main__":
    main()
    from utils import dist

    dist.stop()
