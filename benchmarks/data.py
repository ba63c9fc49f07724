"""Samples per second of the full data path on one core, and where the time goes.

    python benchmarks/data.py configs/released/lasagna.yaml --tokenizer LLAVA --dataset_dir ./dataset
    python benchmarks/data.py RECIPE --tokenizer LLAVA --set 'data.mixture=[{task: own, sets: [...]}]' --workers 0 2

The path is that of training: facts from the source, words from the system, ids, reading and decoding the image, both
views, masks, a batch. Times are CPU times of one thread (other programs do not change them), after a first round that
warms the page cache. --workers also measures a real loader, by wall clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from data.collate import Sample, SampleBuilder, collate, rasterize_masks
from data.encode import Encoder
from data.mixture import Mixture, Stream
from data.readers.index import set_index_folder
from data.tokens import load_tokenizer
from data.types import Record
from data.views import ClipView, SamView, SegView, Views
from systems.base import build_system
from utils.config import Recipe, from_dict, load_recipe, to_dict, with_overrides
from utils.images import read_image

PATCH, SAM_SIDE = 14, 1024
STEPS = ("facts", "words", "ids", "read and decode", "language-side view", "mask-side view", "masks", "batch")


class CpuClock:
    """CPU seconds of this thread per step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)

    def __call__(self, step: str, work: Callable[..., Any], *values: Any, **named: Any) -> Any:
        began = time.thread_time()
        result = work(*values, **named)
        self.seconds[step] += time.thread_time() - began
        return result


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    recipe = read_recipe(args)
    set_index_folder(recipe.data.index_dir)
    mixture = build_mixture(recipe, args)
    for warm in (True, False):
        clock = CpuClock()
        pixels = [build_sample(mixture, index, clock, args) for index in range(args.samples)]
        if not warm:
            break
    total = sum(clock.seconds.values())
    figures: dict[str, Any] = {
        "samples": args.samples,
        "megapixels_each": float(np.mean(pixels)) / 1e6,
        "samples_per_core_second": args.samples / total,
        "ms_each": {step: 1e3 * seconds / args.samples for step, seconds in clock.seconds.items()},
        "loader_samples_per_second": {workers: loader_speed(mixture, workers, args) for workers in args.workers},
    }
    print(as_table(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="a LLaVA folder")
    parser.add_argument("--dataset_dir", type=Path, metavar="ROOT", help="dataset folder (default: the recipe's)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="set any recipe field")
    parser.add_argument("--clip_size", type=int, default=224, help="side of the language-side view (default 224)")
    parser.add_argument("--samples", type=int, default=200, help="number of samples (default 200)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[], metavar="N", help="also measure a loader with N workers"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the figures there")
    return parser.parse_args(argv)


def read_recipe(args: argparse.Namespace) -> Recipe:
    values = with_overrides(to_dict(load_recipe(args.recipe)), args.set)
    if args.dataset_dir:
        values["data"]["dataset_dir"] = str(args.dataset_dir)
    return from_dict(Recipe, values)


def build_mixture(recipe: Recipe, args: argparse.Namespace) -> Mixture:
    """The recipe's mixture with rows of any length; needs no model."""
    system = build_system(recipe.system, recipe.options)
    choices = {"release": recipe.model.tokenization, "legacy": recipe.model.tokenizer_legacy}
    tokenizer = load_tokenizer(args.tokenizer, system.tokens, 10**9, **choices)
    encoder = Encoder(tokenizer, system.tokens, recipe.model.conv_type)
    views = Views(ClipView(args.clip_size, cell=PATCH), SamView(recipe.model.image_size or SAM_SIDE))
    return Mixture.build(recipe.data, SampleBuilder(system.task, encoder, views), seed=recipe.train.seed)


def build_sample(mixture: Mixture, index: int, clock: CpuClock, args: argparse.Namespace) -> int:
    """Makes sample `index` as `Mixture.sample` does, each step timed; returns the image's number of pixels."""
    rng = np.random.default_rng((mixture.seed, index))
    maker = mixture.builder
    dialogues = []
    while not dialogues:
        part, position = mixture.pick(index, rng, None)
        record: Record = clock("facts", part.source.__getitem__, position)
        dialogues = clock("words", maker.task.converse, record, rng)
    rows = clock("ids", lambda: [maker.encoder(dialogue) for dialogue in dialogues])
    image = clock("read and decode", read_image, record.image)
    pixels = clock("language-side view", maker.views.language.show, image)
    seg = cast(SegView, maker.views.seg)
    seg_pixels, geometry = clock("mask-side view", seg.show, image), seg.geometry(*image.shape[:2])
    holes = [hole for row in rows for hole in row.holes]
    masks = clock("masks", rasterize_masks, record, holes, geometry.original)
    sample = Sample(str(record.image), pixels, seg_pixels, geometry, maker.views.language.most_tokens, rows, masks)
    clock("batch", collate, [sample])
    return image.shape[0] * image.shape[1]


def loader_speed(mixture: Mixture, workers: int, args: argparse.Namespace, batch_size: int = 2) -> float:
    """Samples per second by wall clock, after the workers have started."""
    stream = Stream(mixture, batch_size, workers=workers)
    for _ in range(2 * max(1, workers)):
        next(stream)
    batches = args.samples // batch_size
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * batch_size / (time.perf_counter() - began)


def as_table(figures: dict[str, Any]) -> str:
    total = sum(figures["ms_each"].values())
    lines = ["| step | ms per sample | share |", "| --- | ---: | ---: |"]
    lines += [f"| {step} | {ms:.2f} | {100 * ms / total:.0f} % |" for step, ms in figures["ms_each"].items()]
    lines.append(f"| all | {total:.2f} | {figures['samples_per_core_second']:.1f} samples per core and second |")
    lines.append(f"\n{figures['samples']} samples, {figures['megapixels_each']:.2f} megapixels each")
    for workers, speed in figures["loader_samples_per_second"].items():
        lines.append(f"loader with {workers} workers: {speed:.1f} samples per second")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
