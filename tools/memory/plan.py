"""What a training step of a recipe takes of a GPU's memory, measured without a GPU, weights or data."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.collate import join_pixels
from data.tokens import added_tokens
from data.types import IGNORE_ID, IMAGE_ID, Batch
from model.checkpoints.load import assemble, dtype_of
from model.finetune.trainable import prepare_training
from model.runtime import training_options
from model.seg_model import SegModel
from model.vlm import VLMS
from model.vlm.llava_released import size_in
from model.vlm.prefix_packing import can_pack
from systems.assistant import system_of
from tools.memory.activation_memory import Footprint, footprint
from tools.memory.released_sizes import base_config, released_architecture
from tools.memory.zero_memory import DeviceMemory, ParameterCounts, count_parameters, device_memory
from utils.config import Recipe, from_dict, load_recipe, to_dict, with_overrides
from utils.log import log

GIB = 2**30
STAGES = (0, 1, 2, 3)
MAX_BATCH = 4096  # images per device at which the search for the largest batch ends
CHANGES = (  # tried in this order, each on top of the previous ones
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
    """What a batch has per image."""

    dialogues: int
    length: int  # positions of a row, image tokens included
    masks: int  # per dialogue
    picture: tuple[int, int]  # height and width of the image


@dataclass(frozen=True)
class StepMemory:
    """The parameter counts of a recipe, and the footprint of a step on one and on two images.

    The activations of n images grow linearly: one + (n - 1) * (two - one).
    """

    counts: ParameterCounts
    one: Footprint
    two: Footprint

    def activations(self, images: int) -> int:
        return self.one.peak + (images - 1) * max(0, self.two.peak - self.one.peak)


def plan(args: argparse.Namespace) -> int:
    """Prints the plan and what to change; returns the exit status: 2 where the recipe cannot be read."""
    log.setLevel(logging.WARNING)
    try:
        recipe = from_dict(Recipe, with_overrides(to_dict(load_recipe(args.recipe)), args.set))
        system_of(recipe)
    except (OSError, ValueError, KeyError) as error:
        print(f"plan_memory.py: {error}", file=sys.stderr)
        return 2
    if recipe.model.precision == "auto":  # on the GPU that is planned for, not on the device that plans
        recipe = replace(recipe, model=replace(recipe.model, precision="bf16"))
    load = workload(recipe, args)
    memory = measure_step(recipe, load)
    room = int((args.gpu_memory - args.reserve) * GIB)
    print(heading(recipe, memory, load, args))
    if not base_config(recipe.model.version) and not size_in(recipe.model.version):
        print(
            f"model.version {recipe.model.version!r} is no folder with a config.json, nor the name of a released base: "
            "planned with the sizes of LLaVA 7B\n"
        )
    print(memory_table(recipe, memory, args.gpus, room))
    if fits(recipe, memory, args.gpus, room):
        print(f"\nfits as it is: ZeRO {recipe.train.zero_stage}, {recipe.train.batch_size} images per GPU")
        return 0
    print(f"\ndoes not fit with ZeRO {recipe.train.zero_stage} and {recipe.train.batch_size} images per GPU")
    print(advice(recipe, load, args.gpus, room))
    return 1


def workload(recipe: Recipe, args: argparse.Namespace) -> Workload:
    """The largest batch that the recipe allows: the longest rows, and as many per image as its system makes."""
    dialogues = args.dialogues or recipe.options.get("num_classes_per_sample", 3)
    kept = recipe.data.long_rows == "keep"  # beyond model_max_length, too: what the language models are made for
    length = args.length or (2048 if kept else recipe.model.model_max_length) or 1024
    return Workload(dialogues, length, args.masks, tuple(args.picture))


def measure_step(recipe: Recipe, load: Workload) -> StepMemory:
    """Run the step on one and on two images without values."""
    model = meta_model(recipe)
    counts = count_parameters(model, recipe.model.load_in_4bit)
    one, two = (footprint(model, meta_batch(model, recipe, load, images), recipe.loss) for images in (1, 2))
    return StepMemory(counts, one, two)


def meta_model(recipe: Recipe) -> SegModel:
    """The recipe's model prepared for training, on the meta device, with gradients as after the first step."""
    system = system_of(recipe)
    architecture, view = released_architecture(recipe.model, system.head, system.tokens)
    attention = "eager" if recipe.model.attn_implementation == "eager" else "sdpa"
    backbone = VLMS[architecture.vlm]
    added = len(added_tokens(backbone.FAMILY, system.tokens))
    rows = backbone.sizes(architecture.vlm_config).vocabulary  # which of them are trained apart makes no difference
    with torch.device("meta"):
        model = assemble(architecture, attention, view, added_ids=range(rows - added, rows))
        model = model.to(dtype_of(recipe.model.precision))
        # A 4-bit layer keeps the same activations as a plain one; its weights are counted in `count_parameters`.
        prepare_training(model, replace(recipe.model, load_in_4bit=False))
    model.configure(training_options(recipe, pack_rows=can_pack(recipe.model.pack_rows, attention, model.vlm.packs)))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)
    return model


def meta_batch(model: SegModel, recipe: Recipe, load: Workload, images: int) -> Batch:
    """Images with dialogues that differ right after the image tokens, the last half of each of them supervised.

    Prefix packing shares the opening, so this is the worst case: the shortest one that dialogues can share.
    """
    rows = images * load.dialogues
    queries = rows * load.masks
    look = model.vlm.view
    tokens = look.tokens(*load.picture)
    if load.length < tokens + 8:
        raise SystemExit(f"--length {load.length}: a row holds {tokens} image tokens and some words")
    ids = torch.ones(rows, load.length, dtype=torch.long)
    ids[:, 1 : 1 + tokens] = IMAGE_ID
    ids[:, 1 + tokens] = 2 + torch.arange(rows) % load.dialogues
    labels = ids.clone()
    labels[:, : (load.length + tokens) // 2] = IGNORE_ID
    view, blank = model.head.view, np.zeros((*load.picture, 3), np.uint8)
    per_mask = len(system_of(recipe).tokens.mask)
    return Batch(
        pixels=join_pixels([look(blank)] * images).to("meta", model.dtype),
        seg_pixels=_meta_pixels(images, view.size, model.dtype) if view else None,
        ids=ids,
        labels=labels,
        attention=torch.ones_like(ids, dtype=torch.bool),
        row_image=torch.arange(images).repeat_interleave(load.dialogues),
        mask_rows=torch.arange(rows).repeat_interleave(load.masks),
        mask_positions=torch.full((queries, per_mask), load.length - 2),
        masks=[torch.empty(load.dialogues * load.masks, *load.picture, device="meta")] * images,
        geometry=[(view or look).geometry(*load.picture)] * images,
        names=[str(index) for index in range(images)],
    )


def _meta_pixels(images: int, side: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(images, 3, side, side, device="meta", dtype=dtype)


def recipe_memory(recipe: Recipe, memory: StepMemory, stage: int, gpus: int) -> DeviceMemory:
    return device_memory(memory.counts, stage, gpus, recipe.model.precision, recipe.train.offload)


def fits(recipe: Recipe, memory: StepMemory, gpus: int, room: int) -> bool:
    activations = memory.activations(recipe.train.batch_size)
    return recipe_memory(recipe, memory, recipe.train.zero_stage, gpus).peak(activations) <= room


def largest_batch(device: DeviceMemory, memory: StepMemory, room: int) -> int:
    """Images per device that fit into `room` bytes."""
    images = 0
    while images < MAX_BATCH and device.peak(memory.activations(images + 1)) <= room:
        images += 1
    return images


def heading(recipe: Recipe, memory: StepMemory, load: Workload, args: argparse.Namespace) -> str:
    counts = memory.counts
    billions = [
        f"{number / 1e9:.2f} B {what}"
        for number, what in zip(
            (counts.trained, counts.frozen, counts.four_bit), ("trained", "frozen", "frozen in 4 bits"), strict=True
        )
        if number
    ]
    return (
        f"{args.recipe}: {recipe.system}, {recipe.model.precision}, weights: {', '.join(billions)}\n"
        f"{recipe.train.batch_size} images per GPU of {load.picture[0]} x {load.picture[1]} pixels, {load.dialogues} "
        f"dialogues per image of {load.length} positions and {load.masks} mask(s)\n"
        f"GiB on each of {args.gpus} GPU(s) of {args.gpu_memory:g} GiB, {args.reserve:g} of it kept free\n"
    )


def memory_table(recipe: Recipe, memory: StepMemory, gpus: int, room: int) -> str:
    """The parts of the memory and their sum per ZeRO stage, and the largest batch of each."""
    activations = memory.activations(recipe.train.batch_size)
    places = [recipe_memory(recipe, memory, stage, gpus) for stage in STAGES]
    rows: list[tuple[str, list[str]]] = [
        (name, [f"{getattr(place, name) / GIB:.2f}" for place in places])
        for name in ("weights", "gradients", "optimizer", "buffers")
    ]
    rows.append(("activations, highest", [f"{activations / GIB:.2f}"] * len(places)))
    rows.append(("or, at the update", [f"{place.update / GIB:.2f}" for place in places]))
    rows.append(("total peak", [f"{place.peak(activations) / GIB:.2f}" for place in places]))
    rows.append(("largest batch per GPU", [str(largest_batch(place, memory, room) or "none") for place in places]))
    lines = [f"{'':<22}" + "".join(f"{f'ZeRO {stage}':>10}" for stage in STAGES)]
    lines += [f"{name:<22}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in rows]
    return "\n".join(lines)


def advice(recipe: Recipe, load: Workload, gpus: int, room: int) -> str:
    """The first changes, each on top of the others, with which the recipe fits; without needless ones."""
    changes: list[str] = []
    for change in CHANGES:
        changed = with_changes(recipe, [*changes, change])
        if changed is None or changed == with_changes(recipe, changes):
            continue
        changes.append(change)
        if fits(changed, measure_step(changed, load), gpus, room):
            break
    else:
        return "no change of the recipe makes it fit: more GPUs, larger ones, or shorter rows (--length, --dialogues)"
    for change in list(changes[:-1]):  # an early change may be needless with the later, larger ones
        fewer = with_changes(recipe, [other for other in changes if other != change])
        if fewer is not None and fits(fewer, measure_step(fewer, load), gpus, room):
            changes.remove(change)
    return "fits with: --set " + " --set ".join(changes)


def with_changes(recipe: Recipe, changes: Sequence[str]) -> Recipe | None:
    """The recipe with these changes; None where they contradict each other."""
    values = with_overrides(to_dict(recipe), changes)
    changed = from_dict(Recipe, values)
    if changed.model.load_in_4bit and (changed.train.zero_stage == 3 or changed.model.lora.r <= 0):
        return None
    return changed
