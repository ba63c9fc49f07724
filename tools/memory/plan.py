"""What a recipe takes of a GPU's memory, told without a GPU, without weights and without data.

    python scripts/plan_memory.py configs/lisa_7b.yaml --gpus 8 --gpu_memory 24
    python scripts/plan_memory.py configs/lasagna_7b.yaml --gpus 2 --gpu_memory 80 --set train.batch_size=4

The training step itself runs on tensors that have shapes and no values, and every storage it makes is counted; weights,
gradients and the optimizer's states follow DeepSpeed's arithmetic for each ZeRO stage. Where the recipe does not fit,
changes to it are tried one after another until it does. Exit status: 0 where it fits as it is, 1 where it does not.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from data.types import IGNORE_ID, IMAGE_ID, Batch
from data.views import ClipView, PaddedView
from model.checkpoints.load import assemble, dtype_of
from model.finetune.trainable import prepare_training
from model.runtime import training_options
from model.seg_model import SegModel
from model.vlm.prefix_packing import can_pack
from systems.base import build_system
from tools.memory.activation_memory import Footprint, footprint
from tools.memory.released_sizes import released_architecture
from tools.memory.zero_memory import DeviceMemory, ParameterCounts, count_parameters, device_memory
from utils.config import Recipe, from_dict, load_yaml, override, to_dict
from utils.log import log

GIB = 2**30
STAGES = (0, 1, 2, 3)
MAX_BATCH = 4096  # pictures a device; more are not looked for
CHANGES = (  # tried in this order, each on top of those before it
    "model.gradient_checkpointing=true",
    "loss.mask_size=decoder",
    "train.zero_stage=2",
    "train.batch_size=1",
    "model.train_vocabulary=new_tokens",
    "train.offload=optimizer",
    "train.zero_stage=3",
    "model.load_in_4bit=true",
)


@dataclass(frozen=True)
class Workload:
    """One picture's share of a batch."""

    dialogues: int
    length: int  # positions of a row, image tokens included
    masks: int  # of a dialogue
    picture: tuple[int, int]


@dataclass(frozen=True)
class StepMemory:
    """Of a recipe: numbers of weights, and the steps of one and of two pictures, from which those of more follow."""

    counts: ParameterCounts
    one: Footprint
    two: Footprint

    def activations(self, pictures: int) -> int:
        return self.one.peak + (pictures - 1) * max(0, self.two.peak - self.one.peak)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    log.setLevel(logging.WARNING)
    values = load_yaml(args.recipe)
    for assignment in args.set:
        values = override(values, assignment)
    recipe = from_dict(Recipe, values)
    load = workload(recipe, args)
    need = measure_step(recipe, load)
    room = int((args.gpu_memory - args.reserve) * GIB)
    print(heading(recipe, need, load, args))
    print(memory_table(recipe, need, args.gpus, room))
    if fits(recipe, need, args.gpus, room):
        print(f"\nfits as it is: ZeRO {recipe.train.zero_stage}, {recipe.train.batch_size} pictures a GPU")
        return 0
    print(f"\ndoes not fit with ZeRO {recipe.train.zero_stage} and {recipe.train.batch_size} pictures a GPU")
    print(advice(recipe, load, args.gpus, room))
    return 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML of configs/, or a run folder's recipe.yaml")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="devices in all [8]")
    parser.add_argument("--gpu_memory", type=float, default=24, metavar="GIB", help="of each [24]")
    parser.add_argument(
        "--reserve", type=float, default=1.5, metavar="GIB", help="for CUDA, NCCL and what lies between blocks [1.5]"
    )
    parser.add_argument("--dialogues", type=int, metavar="N", help="about a picture [the recipe's most]")
    parser.add_argument("--length", type=int, metavar="N", help="positions of a row [the recipe's longest, else 1024]")
    parser.add_argument("--masks", type=int, default=1, metavar="N", help="in a dialogue [1]")
    parser.add_argument("--picture", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="[480 640]")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="change a field of the recipe")
    args = parser.parse_args(argv)
    for name in ("gpus", "gpu_memory", "masks"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0")
    if args.reserve >= args.gpu_memory:
        parser.error("--reserve leaves nothing of --gpu_memory")
    return args


def workload(recipe: Recipe, args: argparse.Namespace) -> Workload:
    """The longest rows that the recipe lets through, as many as its system asks about a picture."""
    dialogues = args.dialogues or recipe.options.get("num_classes_per_sample", 3)
    kept = recipe.data.long_rows == "keep"  # beyond model_max_length, too: what the language models are made for
    length = args.length or (2048 if kept else recipe.model.model_max_length) or 1024
    return Workload(dialogues, length, args.masks, tuple(args.picture))


def measure_step(recipe: Recipe, load: Workload) -> StepMemory:
    """Runs the step of one and of two pictures without values."""
    model = meta_model(recipe)
    counts = count_parameters(model, recipe.model.load_in_4bit)
    return StepMemory(counts, *(footprint(model, meta_batch(model, recipe, load, n), recipe.loss) for n in (1, 2)))


def meta_model(recipe: Recipe) -> SegModel:
    """The recipe's model prepared for training, all on meta, with gradients as they are after the first step."""
    system = build_system(recipe.system, recipe.options)
    added = len(system.tokens.all_added)
    head = recipe.model.mask_head or system.head
    architecture = released_architecture(recipe.model, head, len(system.tokens.mask), added)
    attention = "eager" if recipe.model.attn_implementation == "eager" else "sdpa"
    side, rows = architecture.tower["image_size"], architecture.language["vocab_size"]
    view = PaddedView(side) if recipe.model.tower.pad else ClipView(side)
    with torch.device("meta"):
        model = assemble(architecture, attention, view, range(rows - added, rows))
        model = model.to(dtype_of(recipe.model.precision))
        # 4-bit layers keep the same for the backward pass as plain ones, and their sizes are counted apart
        prepare_training(model, replace(recipe.model, load_in_4bit=False))
    model.configure(training_options(recipe, pack_rows=can_pack(recipe.model.pack_rows, attention)))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)
    return model


def meta_batch(model: SegModel, recipe: Recipe, load: Workload, pictures: int) -> Batch:
    """Pictures with dialogues that differ right behind the picture, the last half of each of them supervised."""
    rows, queries = pictures * load.dialogues, pictures * load.dialogues * load.masks
    tokens, side = model.vlm.image_tokens, model.vlm.view.size
    if load.length < tokens + 8:
        raise SystemExit(f"--length {load.length}: a row holds {tokens} image tokens and some words")
    ids = torch.ones(rows, load.length, dtype=torch.long)
    ids[:, 1 : 1 + tokens] = IMAGE_ID
    ids[:, 1 + tokens] = 2 + torch.arange(rows) % load.dialogues
    labels = ids.clone()
    labels[:, : (load.length + tokens) // 2] = IGNORE_ID
    view, ghostly = model.head.view, {"device": "meta", "dtype": model.dtype}
    per_mask = len(build_system(recipe.system, recipe.options).tokens.mask)
    return Batch(
        pixels=torch.empty(pictures, 3, side, side, **ghostly),
        seg_pixels=torch.empty(pictures, 3, view.size, view.size, **ghostly) if view else None,
        ids=ids,
        labels=labels,
        attention=torch.ones_like(ids, dtype=torch.bool),
        row_image=torch.arange(pictures).repeat_interleave(load.dialogues),
        mask_rows=torch.arange(rows).repeat_interleave(load.masks),
        mask_positions=torch.full((queries, per_mask), load.length - 2),
        masks=[torch.empty(load.dialogues * load.masks, *load.picture, device="meta")] * pictures,
        geometry=[(view or PaddedView(side)).geometry(*load.picture)] * pictures,
        names=[str(index) for index in range(pictures)],
    )


def recipe_memory(recipe: Recipe, need: StepMemory, stage: int, gpus: int) -> DeviceMemory:
    return device_memory(need.counts, stage, gpus, recipe.model.precision, recipe.train.offload)


def fits(recipe: Recipe, need: StepMemory, gpus: int, room: int) -> bool:
    activations = need.activations(recipe.train.batch_size)
    return recipe_memory(recipe, need, recipe.train.zero_stage, gpus).peak(activations) <= room


def largest_batch(place: DeviceMemory, need: StepMemory, room: int) -> int:
    """Pictures a device."""
    pictures = 0
    while pictures < MAX_BATCH and place.peak(need.activations(pictures + 1)) <= room:
        pictures += 1
    return pictures


def heading(recipe: Recipe, need: StepMemory, load: Workload, args: argparse.Namespace) -> str:
    counts = need.counts
    billions = [
        f"{number / 1e9:.2f} B {what}"
        for number, what in zip(
            (counts.trained, counts.frozen, counts.four_bit), ("trained", "frozen", "frozen in 4 bits"), strict=True
        )
        if number
    ]
    return (
        f"{args.recipe}: {recipe.system}, {recipe.model.precision}, weights: {', '.join(billions)}\n"
        f"{recipe.train.batch_size} pictures a GPU of {load.picture[0]} x {load.picture[1]} pixels, {load.dialogues} "
        f"dialogues a picture of {load.length} positions and {load.masks} mask(s)\n"
        f"GiB on each of {args.gpus} GPU(s) of {args.gpu_memory:g} GiB, {args.reserve:g} of it kept free\n"
    )


def memory_table(recipe: Recipe, need: StepMemory, gpus: int, room: int) -> str:
    """Parts and their sum by stage, and the largest batch of each."""
    activations = need.activations(recipe.train.batch_size)
    places = [recipe_memory(recipe, need, stage, gpus) for stage in STAGES]
    rows: list[tuple[str, list[str]]] = [
        (name, [f"{getattr(place, name) / GIB:.2f}" for place in places])
        for name in ("weights", "gradients", "optimizer", "buffers")
    ]
    rows.append(("activations, highest", [f"{activations / GIB:.2f}"] * len(places)))
    rows.append(("or, at the update", [f"{place.update / GIB:.2f}" for place in places]))
    rows.append(("together", [f"{place.peak(activations) / GIB:.2f}" for place in places]))
    rows.append(("largest batch a GPU", [str(largest_batch(place, need, room) or "none") for place in places]))
    lines = [f"{'':<22}" + "".join(f"{f'ZeRO {stage}':>10}" for stage in STAGES)]
    lines += [f"{name:<22}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in rows]
    return "\n".join(lines)


def advice(recipe: Recipe, load: Workload, gpus: int, room: int) -> str:
    """The first changes, one on top of another, with which the recipe fits; without those that proved needless."""
    made: list[str] = []
    for change in CHANGES:
        changed = with_changes(recipe, [*made, change])
        if changed is None or changed == with_changes(recipe, made):
            continue
        made.append(change)
        if fits(changed, measure_step(changed, load), gpus, room):
            break
    else:
        return "no change of the recipe makes it fit: more GPUs, larger ones, or shorter rows (--length, --dialogues)"
    for change in list(made[:-1]):
        fewer = with_changes(recipe, [other for other in made if other != change])
        if fewer is not None and fits(fewer, measure_step(fewer, load), gpus, room):
            made.remove(change)
    return "fits with: --set " + " --set ".join(made)


def with_changes(recipe: Recipe, changes: Sequence[str]) -> Recipe | None:
    """None where they contradict one another or leave the batch below one picture."""
    values = to_dict(recipe)
    for change in changes:
        values = override(values, change)
    changed = from_dict(Recipe, values)
    if changed.model.load_in_4bit and (changed.train.zero_stage == 3 or changed.model.lora.r <= 0):
        return None
    return changed


if __name__ == "__main__":
    raise SystemExit(main())
