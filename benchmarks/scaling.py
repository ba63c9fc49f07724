"""Time and memory of a training step by dialogues per image, classes in the list, image size, number of processes.

    python benchmarks/scaling.py --json scaling.json --plot docs/scaling.png
    python benchmarks/scaling.py --shape tiny --repeats 1 --plot /tmp/scaling.png

The step of recipes by default, against the one of the original programs (benchmarks/plain_step.py), each point in a
process of its own; both give the same loss, or the program fails. The fastest of --repeats counts. Memory is the peak
of a step that is not timed, beyond what is in use between steps (benchmarks/speed.py). "Of peak" is the operations per
second that the step needs, as a share of what a product of large matrices reaches in the same process. For the number
of processes, each has one thread and its own images and trains through DeepSpeed as in train_ds.py; the figures are the
images per second of all of them and the memory of one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measuring import PeakMemory, matrix_peak, step_flops
from benchmarks.plain_step import plain_loss, take_apart
from benchmarks.shapes import SHAPES, ModelShape, make_batch, random_model
from benchmarks.speed import check_losses
from data.types import Batch
from model.finetune.trainable import prepare_training
from model.losses import objective
from model.runtime import RuntimeOptions
from model.seg_model import SegModel
from utils.config import LoraConfig, LossConfig, ModelConfig, Recipe, TrainConfig

DIALOGUES, CLASSES, PROCESSES = (1, 2, 4, 8), (10, 80, 150), (1, 2)
GROWTH = (0.5, 1.0, 2.0)  # of both sides of the image
MASKS = 4  # present among the classes of a list
PANELS = {"dialogues": "dialogues per image", "classes": "classes in the list", "pixels": "pixels of the image"}
WAYS = {"published": "as published", "product": "this program"}
MODEL = ModelConfig(gradient_checkpointing=False, lora=LoraConfig(dropout=0.0), precision="fp32")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    figures: dict[str, Any] = {panel: {way: {} for way in WAYS} for panel in PANELS}
    fork = multiprocessing.get_context("fork")
    print(f"{'':<34}{'seconds':>9}{'peak MiB':>10}{'of peak':>9}")
    for panel, value, shape, contents in points(SHAPES[args.shape]):
        for way, title in WAYS.items():
            with fork.Pool(1) as process:  # torch has run nothing here yet, so that forking is safe
                figures[panel][way][value] = point = process.apply(measure_step, (shape, contents, way, args))
            print(f"{PANELS[panel]:<24}{value:>9} {measured(point)}  {title}", flush=True)
        old, new = (figures[panel][way][value] for way in WAYS)
        check_losses({"published": old["loss"], "product": new["loss"]}, MODEL.precision)
        print(f"{'':<34}{old['seconds'] / new['seconds']:>8.2f}x", flush=True)
    figures["processes"] = {world: measure_processes(world, args) for world in PROCESSES}
    for world, point in figures["processes"].items():
        rate = world / point["seconds"]
        print(f"{'processes':<24}{world:>9} {measured(point)}  {rate:.3f} images per second", flush=True)
    figures["setup"] = {"shape": args.shape, "repeats": args.repeats, "torch": torch.__version__}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot_scaling(figures, args.plot)
    return 0


def measured(point: dict[str, float]) -> str:
    return f"{point['seconds']:>9.3f}{point['peak_mib']:>10.0f}{100 * point['share_of_matrix_peak']:>7.0f} %"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also plot them")
    parser.add_argument("--shape", choices=("issue", "tiny"), default="issue")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed steps, after a warm-up step")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    return parser.parse_args(argv)


def points(shape: ModelShape) -> Iterator[tuple[str, int, ModelShape, dict[str, int]]]:
    """(panel, value on its axis, sizes, options of `make_batch` for one image)."""
    for each in DIALOGUES:
        yield "dialogues", each, shape, {"each": each}
    for classes in CLASSES:
        yield "classes", classes, shape, {"each": 1, "classes": classes, "masks": MASKS}
    for factor in GROWTH:
        height, width = (round(side * factor) for side in shape.picture)
        yield "pixels", height * width, replace(shape, picture=(height, width)), {"each": 2}


def measure_step(shape: ModelShape, contents: dict[str, int], way: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the fastest step, its peak memory, its share of the matrix products' peak, and the first loss."""
    if args.threads:
        torch.set_num_threads(args.threads)
    model, batch = prepare(shape, contents)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-5, fused=True)
    if way == "published":
        take_apart(model, ())

    def step() -> float:
        if way == "published":
            loss = plain_loss(model, batch, LossConfig(), ())
        else:
            loss = objective(model(batch), batch, LossConfig()).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.item()

    return measure(step, args.repeats, step_flops(model, batch))


def measure_processes(world: int, args: argparse.Namespace) -> dict[str, float]:
    """Of `world` processes with one image each, the slowest: the others wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    processes = [spawn.Process(target=run_rank, args=(rank, world, port, args, results)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a process of {world} ended with code {process.exitcode}")
    return max((results.get() for _ in processes), key=lambda point: point["seconds"])


def run_rank(rank: int, world: int, port: int, args: argparse.Namespace, results: Any) -> None:
    """One process of a distributed run, as a launcher starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    from training.engine import Engine
    from utils import dist

    dist.start()
    model, batch = prepare(SHAPES[args.shape], {"each": 2})
    flops = step_flops(model, batch)
    engine = Engine(
        model, Recipe(model=MODEL, train=TrainConfig(batch_size=1, grad_accumulation_steps=1, steps_per_epoch=100))
    )
    engine.train()

    def step() -> float:
        loss = objective(engine(batch), batch, LossConfig()).total
        engine.backward(loss)
        engine.step()
        return loss.item()

    results.put(measure(step, args.repeats, flops))
    dist.stop()


def prepare(shape: ModelShape, contents: dict[str, int]) -> tuple[SegModel, Batch]:
    model = prepare_training(random_model(shape, "fp32", "sdpa", torch.device("cpu")), MODEL)
    model.configure(RuntimeOptions(pack_rows=True, checkpoint_decoder=True))
    return model, make_batch(shape, model.vlm.view, images=1, **contents)


def measure(step: Callable[[], float], repeats: int, flops: float) -> dict[str, float]:
    """Of a step that needs `flops` operations and returns its loss."""
    loss = step()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    device = torch.device("cpu")
    share = flops / min(seconds) / matrix_peak(device, torch.float32)
    memory = PeakMemory(device)
    step()
    peak = memory.peak_mib()
    return {"seconds": min(seconds), "peak_mib": peak, "share_of_matrix_peak": share, "loss": loss}


def plot_scaling(figures: dict[str, Any], path: Path) -> None:
    """Time above, memory below: by dialogues, classes and pixels both ways, and by processes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 6.4), layout="constrained", sharex="col")
    for column, (panel, label) in enumerate(PANELS.items()):
        for way, title in WAYS.items():
            points = figures[panel][way]
            for axis, key in zip(axes[:, column], ("seconds", "peak_mib"), strict=True):
                axis.plot(list(points), [point[key] for point in points.values()], "o-", label=title)
        axes[1, column].set(xlabel=label)
    worlds = figures["processes"]
    rates = [world / point["seconds"] for world, point in worlds.items()]
    axes[0, 3].plot(list(worlds), rates, "o-", color="tab:orange")
    axes[1, 3].plot(list(worlds), [point["peak_mib"] for point in worlds.values()], "o-", color="tab:orange")
    axes[1, 3].set(xlabel="processes of one thread", xticks=list(worlds))
    for column, axis in enumerate(axes[0]):
        axis.set(ylabel="seconds per step" if column < 3 else "images per second")
    for column, axis in enumerate(axes[1]):
        axis.set(ylabel="peak MiB of a step" if column < 3 else "peak MiB of a process")
    for axis in axes.flat:
        axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
