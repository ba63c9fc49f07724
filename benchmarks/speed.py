"""Time and memory of a training step, with the optimisations switched on one after another, in one run.

    python benchmarks/speed.py --json speed.json
    python benchmarks/speed.py --backbone qwen3_vl --json qwen.json
    python benchmarks/speed.py --shape tiny --repeats 1
    python benchmarks/speed.py --shape 7b --device cuda --precision bf16 --checkpointing --json 7b.json

all_off is the step of the original programs (benchmarks/plain_step.py). Each line adds one optimisation to the line
above. All lines up to `defaults`, the training step of recipes by default, give the same loss, or the program fails;
the lines after it are choices of recipes: loss.mask_size, model.train_vocabulary, model.embedding_cache (filled, as
from the second epoch on). Weights are random; LoRA, vocabulary, text MLP and mask decoder train, with AdamW.

Each line runs in a process of its own, and the lines take turns --rounds times; the fastest step of each counts, since
whatever else the machine does only makes a step slower. "Of peak" is the operations per second that the step needs (as
for MFU), as a share of what a product of large matrices reaches in the same process, precision and threads. Memory is
the peak of a step beyond what is in use between steps (weights, gradients, optimizer), in a step that is not timed:
resident size on a CPU (Linux), allocated on a GPU. Speed-ups are also given in CPU seconds, which are more reliable
where other programs run, above all with --threads 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.measuring import PartClock, PeakMemory, matrix_peak, step_flops, utilisation
from benchmarks.plain_step import LADDER, plain_loss, take_apart
from benchmarks.shapes import BACKBONES, SHAPES, make_batch, random_model
from data.types import Batch
from model.checkpoints.load import DTYPES
from model.finetune.trainable import prepare_training
from model.losses import objective
from model.seg_model import SegModel
from utils.config import CacheConfig, LoraConfig, LossConfig, ModelConfig

DEFAULTS = "defaults"
CHOICES = DECODER_MASKS, NEW_TOKENS, CACHED = "decoder_masks", "new_tokens", "cached_embeddings"
LINES = {"all_off": ()} | {name: LADDER[: index + 1] for index, name in enumerate(LADDER)}
LINES |= {DEFAULTS: (*LADDER, DEFAULTS), DECODER_MASKS: (*LADDER, DEFAULTS, DECODER_MASKS)}
LINES |= {NEW_TOKENS: (*LADDER, DEFAULTS, DECODER_MASKS, NEW_TOKENS), "all_on": (*LADDER, DEFAULTS, *CHOICES)}
TITLES = {DEFAULTS: "+ all images, decoder", "all_on": "+ cache: all_on"}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    results: dict[str, Any] = {}
    print(f"{'':<22}{'seconds':>9}{'speed-up':>10}{'in CPU s':>10}{'peak MiB':>10}{'of peak':>9}  share of time")
    context = multiprocessing.get_context("spawn" if args.device == "cuda" else "fork")
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for name in args.lines:
                with context.Pool(1) as process:  # torch has run nothing here yet, so that forking is safe
                    result = process.apply(measure_line, (LINES[name], args, folder))
                results[name] = faster(results.get(name, result), result)
                if turn + 1 == args.rounds:
                    print(result_line(name, results[name], results["all_off"]), flush=True)
    check_losses({name: result["loss"] for name, result in results.items()}, args.precision)
    off, on, defaults = results["all_off"], results["all_on"], results[DEFAULTS]
    figures = {
        **{name: {key: results[name][key] for key in ("seconds", "peak_mib")} for name in ("all_off", "all_on")},
        "speedup": off["seconds"] / on["seconds"],
        "speedup_of_defaults": off["seconds"] / defaults["seconds"],
        "memory_ratio": on["peak_mib"] / off["peak_mib"],
        "parts": results,
        "setup": {**{key: value for key, value in vars(args).items() if key != "json"}, **device_info(args)},
        "shape": asdict(SHAPES[args.shape]),
    }
    print(f"speed-up {figures['speedup']:.2f}, memory {figures['memory_ratio']:.2f} of all_off's")
    print("all_on: " + ", ".join(f"{on[key]:.4g} {key}" for key in RATES if on[key] is not None))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def faster(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of a line; CPU seconds are the fewest of both."""
    best = min(one, other, key=lambda result: result["seconds"])
    return best | {"cpu_seconds": min(one["cpu_seconds"], other["cpu_seconds"])}


RATES = ("tokens_per_second", "images_per_second", "mfu", "share_of_matrix_peak")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--backbone", choices=BACKBONES, default="llava")
    parser.add_argument("--shape", choices=SHAPES, default="issue", help="tiny: only tests the program")
    parser.add_argument("--pictures", type=int, default=2, metavar="N", help="images per step")
    parser.add_argument("--dialogues", type=int, default=3, metavar="N", help="dialogues per image")
    parser.add_argument("--repeats", type=int, default=4, metavar="N", help="timed steps, after a warm-up step")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of each line")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in every line")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's default")
    parser.add_argument("--compile", default="", metavar="BACKEND", help="model.compile, in every line")
    parser.add_argument("--only_ends", action="store_true", help="only all_off, defaults and all_on")
    args = parser.parse_args(argv)
    args.lines = ["all_off", DEFAULTS, "all_on"] if args.only_ends else list(LINES)
    return args


def measure_line(on: Sequence[str], args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Seconds of the fastest step, its peak memory, loss, seconds per part and rates, with the optimisations in `on`.

    folder: for cached embeddings.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device, shape = torch.device(args.device), SHAPES[args.shape]
    model = random_model(shape, args.precision, args.attention, device, args.backbone)
    vocabulary = "new_tokens" if NEW_TOKENS in on else "full"
    prepare_training(
        model,
        ModelConfig(
            gradient_checkpointing=args.checkpointing,
            lora=LoraConfig(dropout=0.0),
            train_vocabulary=vocabulary,
            compile=args.compile,
        ),
    )
    take_apart(model, on)
    if CACHED in on:
        model.head.use_cache(CacheConfig(folder, max_gib=1.0))
    batch = make_batch(shape, model.vlm.view, images=args.pictures, each=args.dialogues)
    batch = batch.to(device, DTYPES[args.precision])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-5)
    loss = loss_of(model, batch, on)
    clock = PartClock(model)
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    first = train_step(loss, optimizer, clock)
    clock.seconds.clear()
    for _ in range(args.repeats):
        began, cpu_began = clock.now(), time.process_time()
        train_step(loss, optimizer, clock)
        seconds.append(clock.now() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    parts = {name: value / args.repeats for name, value in clock.seconds.items()}
    memory = PeakMemory(device)
    train_step(loss, optimizer, clock)
    result: dict[str, Any] = {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}
    result |= {"peak_mib": memory.peak_mib(), "loss": first, "parts": parts}
    return result | rates(model, batch, result["seconds"], device)


def loss_of(model: SegModel, batch: Batch, on: Sequence[str]) -> Callable[[], Tensor]:
    """The forward pass with the optimisations in `on`, as a function."""
    config = LossConfig(mask_size="decoder" if DECODER_MASKS in on else "full")
    model.configure(replace(model.runtime, full_size_masks=config.mask_size == "full"))
    if DEFAULTS in on:
        return lambda: objective(model(batch), batch, config).total
    return lambda: plain_loss(model, batch, config, on)


def train_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, clock: PartClock) -> float:
    """Forward, backward, update; returns the loss. Gradients stay allocated from step to step."""
    total = clock("forward", loss)
    clock("backward", total.backward)
    clock("optimizer", lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=False)))
    return total.item()


def rates(model: SegModel, batch: Batch, seconds: float, device: torch.device) -> dict[str, Any]:
    """Tokens and images per second, MFU, and the share of what matrix products reach in this process. Tokens are those
    of the rows with image tokens, before packing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    flops, peak = step_flops(model, batch), matrix_peak(device, model.dtype)
    return {
        "tokens_per_second": int(batch.attention.sum()) / seconds,
        "images_per_second": len(batch) / seconds,
        "mfu": utilisation(flops, seconds, name),
        "flops": flops,
        "matrix_peak": peak,
        "share_of_matrix_peak": flops / seconds / peak,
    }


def check_losses(losses: dict[str, float], precision: str) -> None:
    """Raise where the lines up to `defaults` differ; the choices after it may change the loss."""
    same = [loss for name, loss in losses.items() if name not in (*CHOICES, "all_on")]
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    if max(same) - min(same) > tolerance * abs(same[0]):
        raise SystemExit(f"the losses differ: {losses}")


def device_info(args: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device_name": name, "torch": torch.__version__}


def result_line(name: str, result: dict[str, Any], off: dict[str, Any]) -> str:
    total = sum(result["parts"].values())
    shares = ", ".join(f"{part} {100 * value / total:.0f}%" for part, value in result["parts"].items())
    label = TITLES.get(name, name if name == "all_off" else f"+ {name.replace('_', ' ')}")
    times, cpu_times = (off[key] / result[key] for key in ("seconds", "cpu_seconds"))
    reached = 100 * result["share_of_matrix_peak"]
    figures = f"{result['seconds']:>9.3f}{times:>10.2f}{cpu_times:>10.2f}{result['peak_mib']:>10.0f}{reached:>7.0f} %"
    return f"{label:<22}{figures}  {shares}"


if __name__ == "__main__":
    raise SystemExit(main())
