"""Merges a training run, or a file of its weights, into a model folder of the project's or the published layout."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from model.checkpoints.files import read_tensors
from model.checkpoints.load import dtype_of
from model.checkpoints.save import check_target, read_from, save_folder, save_original
from model.finetune.trainable import (
    check_frozen,
    from_training_file,
    load_frozen_head,
    load_trainable,
    merge_lora,
)
from systems.assistant import Assistant, build, load
from systems.base import systems_accepting
from tools.portable.card import read_results, results_of_run
from tools.portable.folder import complete
from tools.portable.push import check_name, push
from utils.config import Recipe, load_recipe
from utils.flags import resolve
from utils.log import log


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Merges args.run or args.weight into args.save_path. flags: those of training."""
    if args.push_to_hub:
        check_name(args.push_to_hub, yes=args.yes)
    results = {folder: read_results(Path(folder)) for folder in args.results}
    log.info("reading %s", args.run or args.weight)
    recipe = load_recipe(args.run) if args.run else resolve(flags, systems_accepting)
    check_target(args.save_path, [args.run or args.weight, *read_from(recipe.model)], overwrite=args.overwrite)
    assistant = load_run(args.run, args.tag) if args.run else load_file(args.weight, recipe)
    precision = args.precision or assistant.recipe.model.precision
    assistant.model.to(dtype_of(precision))
    if args.format == "original":
        architectures = assistant.system.released.architectures
        architecture = architectures[0] if architectures else "LlavaLlamaForCausalLM"
        save_original(assistant.model, args.save_path, assistant.tokenizer, architecture, overwrite=args.overwrite)
    else:
        if args.run:
            results |= results_of_run(Path(args.run), args.tag)
        name = args.push_to_hub or Path(args.save_path).resolve().name
        more = partial(complete, assistant=assistant, name=name, results=results, licence=args.license)
        parts = (assistant.model, args.save_path, assistant.tokenizer, assistant.recipe)
        save_folder(*parts, more=more, overwrite=args.overwrite)
    log.info("wrote %s (%s, %s)", args.save_path, args.format, precision)
    if args.push_to_hub:
        push(Path(args.save_path), args.push_to_hub, public=args.public, yes=args.yes)


def load_run(run: str, tag: str) -> Assistant:
    """A run's assistant with its adapters merged, in fp32.

    Adapters trained on 4-bit layers are merged into the base's original weights, which are more precise. The recipe of
    the result keeps the precision of the run.
    """
    precision = load_recipe(run).model.precision
    unquantized = {"precision": "fp32", "load_in_4bit": False, "load_in_8bit": False}
    assistant = load(run, checkpoint=tag, model=unquantized, device="cpu")
    return replace(assistant, recipe=with_precision(assistant.recipe, precision))


def load_file(weight: str, recipe: Recipe) -> Assistant:
    """The assistant of a single file of full weights and the recipe of their training, adapters merged, in fp32.

    As of a run, adapters trained on 4-bit layers are merged into the base's original weights.
    """
    recipe = replace(recipe, model=replace(recipe.model, load_in_4bit=False, load_in_8bit=False))
    tensors = read_tensors(weight)  # what is wrong with a file is known before a model is built
    assistant = build(with_precision(recipe, "fp32"), device="cpu")
    try:
        load_trainable(assistant.model, from_training_file(assistant.model, tensors))
        load_frozen_head(assistant.model, tensors, assistant.recipe.model.head_options)
        check_frozen(assistant.model, tensors)
    except ValueError as error:
        raise ValueError(f"{weight}: {error}") from None
    merge_lora(assistant.model)
    assistant.model.requires_grad_(False).eval()
    return replace(assistant, recipe=recipe)


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    return replace(recipe, model=replace(recipe.model, precision=precision))
