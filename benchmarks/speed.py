"""Seconds and memory of a training step, with what saves work switched on one thing after another, in one run.

    python benchmarks/speed.py --json speed.json
    python benchmarks/speed.py --tiny --repeats 1

all_off does as the original programs do: the tower sees a picture once a dialogue, every dialogue is a row of its own,
logits are computed at every position, and pictures are encoded and drawn on one by one. Each line adds one thing to the
line above; all_on is the training step itself. All give the same loss, or the program fails. Weights are random; LoRA,
the vocabulary, the text MLP and the mask decoder train, with AdamW in float32.

Each line has a process of its own. Memory is what a step takes at its highest, beyond what lies there between steps
(weights, gradients, optimizer): resident size on a CPU (Linux), allocated on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from data.types import IGNORE_ID, IMAGE_ID, Batch, Geometry
from model.adapt import prepare_training
from model.build import assemble
from model.losses import objective
from model.plan import Plan
from model.seg_model import SegModel, SegOutput
from utils.config import LoraConfig, LossConfig, ModelConfig

LADDER = ("vision_once", "packed_rows", "supervised_logits", "pictures_together")
MIB, MASK_TOKEN = 2**20, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESET_PEAK = "5"  # what /proc/self/clear_refs takes for it


@dataclass(frozen=True)
class Size:
    """Where the model dominates: 256 image tokens, SAM at 1024 pixels."""

    width: int = 512
    layers: int = 8
    vocabulary: int = 32000
    tower_width: int = 256
    tower_layers: int = 6
    tower_side: int = 224
    sam_width: int = 96
    sam_layers: int = 4
    sam_side: int = 1024
    picture: tuple[int, int] = (480, 640)
    opening: int = 40  # tokens before the picture
    text: int = 40  # tokens of a question and its answer, each


TINY = Size(32, 2, 200, 16, 2, 56, 16, 2, 128, (60, 80), 6, 6)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    names = ["all_off", *LADDER[:-1], "all_on"]
    results: dict[str, Any] = {}
    print(f"{'':<20}{'seconds':>9}{'speed-up':>10}{'peak MiB':>10}  share of time")
    for count, name in enumerate(names):
        with multiprocessing.get_context("fork").Pool(1) as process:  # nothing has run in this one that a fork breaks
            results[name] = process.apply(measure, (LADDER[:count], args))
        print(as_line(name, results[name], results["all_off"]), flush=True)
    losses = [result.pop("loss") for result in results.values()]
    tolerance = 1e-4 if args.precision == "fp32" else 3e-2
    if max(losses) - min(losses) > tolerance * abs(losses[0]):
        raise SystemExit(f"the losses differ: {dict(zip(results, losses, strict=True))}")
    off, on = results["all_off"], results["all_on"]
    figures = {
        "all_off": {key: off[key] for key in ("seconds", "peak_mib")},
        "all_on": {key: on[key] for key in ("seconds", "peak_mib")},
        "speedup": off["seconds"] / on["seconds"],
        "memory_ratio": on["peak_mib"] / off["peak_mib"],
        "parts": results,
        "setup": {**{key: value for key, value in vars(args).items() if key != "json"}, "size": asdict(size_of(args))},
    }
    print(f"speed-up {figures['speedup']:.2f}, memory {figures['memory_ratio']:.2f} of all_off's")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--tiny", action="store_true", help="a size at which nothing but the program is tested")
    parser.add_argument("--pictures", type=int, default=2, metavar="N")
    parser.add_argument("--dialogues", type=int, default=3, metavar="N", help="about each picture")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed steps, after one that is not")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in every line")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU; 0: as torch chooses")
    return parser.parse_args(argv)


def measure(on: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, its memory, its loss and the seconds of its parts, with these things on."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    model = build(args).to(device)
    model.vlm.pack_rows = "packed_rows" in on
    batch = dialogues(args, model.vlm.image_tokens).to(device, dtype)
    forward = model if len(on) == len(LADDER) else partial(plain_forward, model, on=on)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5)
    clock, seconds = Clock(model), []
    first = step(forward, batch, optimizer, clock)
    clock.seconds.clear()
    memory = Memory(device)
    for _ in range(args.repeats):
        began = clock.now()
        step(forward, batch, optimizer, clock)
        seconds.append(clock.now() - began)
    parts = {name: value / args.repeats for name, value in clock.seconds.items()}
    return {"seconds": statistics.median(seconds), "peak_mib": memory.peak_mib(), "loss": first, "parts": parts}


def step(forward: Callable[[Batch], SegOutput], batch: Batch, optimizer: torch.optim.Optimizer, clock: Clock) -> float:
    """Forward, backward, update; the loss. Gradients stay allocated from step to step."""
    losses = clock("forward", lambda: objective(forward(batch), batch, LossConfig()))
    clock("backward", losses.total.backward)
    clock("optimizer", lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=False)))
    return losses.total.item()


def plain_forward(model: SegModel, batch: Batch, on: Sequence[str]) -> SegOutput:
    """`SegModel.forward` without what is not on."""
    once = "vision_once" in on
    vision = model.vlm.encode_images(batch.pixels if once else batch.pixels[batch.row_image])
    row_image = batch.row_image if once else torch.arange(len(batch.ids), device=batch.ids.device)
    hidden = model.vlm(batch.ids, batch.attention, vision.states, row_image)
    targets = batch.labels[:, 1:]
    supervised = targets != IGNORE_ID
    if "supervised_logits" in on:
        logits = model.vlm.logits(hidden[:, :-1][supervised])
    else:
        logits = model.vlm.logits(hidden)[:, :-1][supervised]
    states = hidden[batch.mask_rows[:, None], batch.mask_positions]
    query_image = batch.row_image[batch.mask_rows]
    masks = []
    for index, place in enumerate(batch.geometry):
        features = model.head.features(replace(batch, seg_pixels=batch.seg_pixels[index : index + 1]), vision)
        mine = query_image == index
        masks += model.head.decode(features, model.project(states[mine]), query_image[mine] * 0, [place])
    return SegOutput(logits, targets[supervised], masks)


class Clock:
    """Seconds by part; the parts of the model are counted in their forward pass, and out of `forward`'s rest."""

    def __init__(self, model: SegModel):
        self.device = model.device
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}
        parts = {"tower": model.vlm.tower, "language model": model.vlm.language.model}
        parts |= {"mask encoder": model.head.encoder, "mask decoder": model.head.decoder}
        for name, part in parts.items():
            part.register_forward_pre_hook(lambda *_, name=name: self.began.update({name: self.now()}))
            part.register_forward_hook(lambda *_, name=name: self.add(name, self.now() - self.began[name], "forward"))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        began = self.now()
        result = work()
        self.add(name, self.now() - began)
        return result

    def add(self, name: str, seconds: float, out_of: str | None = None) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if out_of:
            self.add(out_of, -seconds)


class Memory:
    """Highest memory from now on, beyond what is held now."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated() / MIB
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
            self.base = self._resident()

    def peak_mib(self) -> float:
        now = torch.cuda.max_memory_allocated() / MIB if self.device.type == "cuda" else self._resident()
        return now - self.base

    def _resident(self) -> float:
        """The high-water mark, which `clear_refs` has put to the resident size."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def build(args: argparse.Namespace) -> SegModel:
    """A model of that size with random weights, trained as recipes do without being told otherwise."""
    size = size_of(args)
    torch.manual_seed(0)
    language = {"vocab_size": size.vocabulary, "hidden_size": size.width, "intermediate_size": size.width * 8 // 3}
    language |= {"num_hidden_layers": size.layers, "num_attention_heads": max(2, size.width // 64)}
    tower = {"hidden_size": size.tower_width, "intermediate_size": 4 * size.tower_width, "patch_size": 14}
    tower |= {"num_hidden_layers": size.tower_layers, "num_attention_heads": 4, "image_size": size.tower_side}
    prompt = 16 if args.tiny else 256
    encoder = {"hidden_size": size.sam_width, "mlp_dim": 4 * size.sam_width, "num_hidden_layers": size.sam_layers}
    encoder |= {"num_attention_heads": 4, "image_size": size.sam_side, "output_channels": prompt}
    encoder |= {"global_attn_indexes": [size.sam_layers - 1], "num_pos_feats": prompt // 2, "initializer_range": 0.02}
    decoder = {"hidden_size": prompt, "mlp_dim": 8 * prompt, "num_attention_heads": 8, "iou_head_hidden_dim": prompt}
    prompts = {"hidden_size": prompt, "image_size": size.sam_side}
    sam = {"vision_config": encoder, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
    model = assemble(Plan(language, tower, 2, -2, "sam", sam), args.attention).to(DTYPES[args.precision])
    nn.init.normal_(model.head.prompts.shared_embedding.positional_embedding)
    lora = LoraConfig(dropout=0.0)
    return prepare_training(model, ModelConfig(gradient_checkpointing=args.checkpointing, lora=lora))


def dialogues(args: argparse.Namespace, image_tokens: int) -> Batch:
    """Pictures with dialogues that open alike, ask in other words and answer with one mask each."""
    size, generator = size_of(args), torch.Generator().manual_seed(0)
    rows, pictures = args.pictures * args.dialogues, args.pictures

    def words(*shape: int) -> Tensor:
        return torch.randint(MASK_TOKEN + 1, size.vocabulary, shape, generator=generator)

    opening = [words(size.opening), torch.full((image_tokens,), IMAGE_ID)]
    begin = torch.cat(opening).expand(rows, -1)
    ids = torch.cat([begin, words(rows, 2 * size.text)], dim=1)
    ids[:, -2] = MASK_TOKEN
    labels = ids.clone()
    labels[:, : -size.text] = IGNORE_ID
    scale = size.sam_side / max(size.picture)
    place = Geometry(size.picture, tuple(round(side * scale) for side in size.picture))
    return Batch(
        pixels=torch.randn(pictures, 3, size.tower_side, size.tower_side, generator=generator),
        seg_pixels=torch.randn(pictures, 3, size.sam_side, size.sam_side, generator=generator),
        ids=ids,
        labels=labels,
        attention=torch.ones_like(ids, dtype=torch.bool),
        row_image=torch.arange(pictures).repeat_interleave(args.dialogues),
        mask_rows=torch.arange(rows),
        mask_positions=torch.full((rows, 1), ids.shape[1] - 3),
        masks=[(torch.rand(args.dialogues, *size.picture, generator=generator) > 0.5).float()] * pictures,
        geometry=[place] * pictures,
        names=[f"picture {index}" for index in range(pictures)],
    )


def size_of(args: argparse.Namespace) -> Size:
    return TINY if args.tiny else Size()


def as_line(name: str, result: dict[str, Any], off: dict[str, Any]) -> str:
    total = sum(result["parts"].values())
    shares = ", ".join(f"{part} {100 * value / total:.0f}%" for part, value in result["parts"].items())
    label = name if name.startswith("all") else f"+ {name}"
    times = off["seconds"] / result["seconds"]
    return f"{label:<20}{result['seconds']:>9.3f}{times:>10.2f}{result['peak_mib']:>10.0f}  {shares}"


if __name__ == "__main__":
    raise SystemExit(main())
