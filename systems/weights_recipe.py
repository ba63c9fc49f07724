"""The recipe in a folder of weights, of which only what gives the weights their meaning counts.

A merged folder may come from anywhere: its `recipe.yaml` must not choose where files of this machine are read or
written. A run folder is its owner's own, and needs its base by path.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from utils.config import DatasetConfig, ModelConfig, Recipe, TaskConfig, load_recipe
from utils.log import log
from utils.plain import leaves

RECIPE, CHECKPOINTS = "recipe.yaml", "checkpoints"
MEANING = ("conv_type", "model_max_length", "image_size", "out_dim", "precision", "attn_implementation", "pack_rows")
MEANING += ("use_mm_start_end", "head_options", "mask_head", "lora", "tokenization", "tokenizer_legacy")


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, not of weights alone."""
    return (folder / CHECKPOINTS).is_dir()


def recipe_in(folder: Path) -> Recipe:
    """The recipe of a run folder without its embedding cache, which whoever evaluates names himself.

    Of any other folder: the system with its options, the fields of MEANING, how the tower sees, and the mixture and
    suites as far as their options name no path outside the dataset folder (what does is named in a warning).
    """
    recipe = load_recipe(folder)
    if is_run(folder):
        return replace(recipe, model=replace(recipe.model, embedding_cache=None))
    told, dropped = {name: getattr(recipe.model, name) for name in MEANING}, []
    model = ModelConfig(vision_tower=None, tower=replace(recipe.model.tower, preprocessor=None), **told)
    mixture = tuple(_inside(task, dropped) for task in recipe.data.mixture)
    custom = tuple(suite for suite in recipe.eval.custom if not leaves(suite.options))
    dropped += [f"the suite {suite.name}" for suite in recipe.eval.custom if suite not in custom]
    if dropped:
        log.warning("%s names paths outside the dataset folder, which do not count: %s", folder, ", ".join(dropped))
    whole = Recipe(system=recipe.system, options=recipe.options, model=model)
    return replace(whole, data=replace(whole.data, mixture=mixture), eval=replace(whole.eval, custom=custom))


def check_options(folder: Path, recipe: Recipe, given: Collection[str]) -> None:
    """Refuses an option of the system that is a path elsewhere (a wording), unless it is among those `given` by
    whoever loads the folder: without it the words would be others."""
    for key, value in recipe.options.items():
        if key not in given and not is_run(folder) and leaves(value):
            raise ValueError(
                f"{folder / RECIPE}: options.{key} is the path {value!r}, which a folder of weights may not choose; if "
                f"you trust it, give it yourself: --set options.{key}=PATH"
            )


def _inside(task: TaskConfig, dropped: list[str]) -> TaskConfig:
    """The task without options that leave, which are noted in `dropped`."""
    sets: list[DatasetConfig] = []
    for part in task.sets:
        kept = {key: value for key, value in part.options.items() if not leaves(value)}
        dropped += [f"{key} of {part.source}" for key in part.options if key not in kept]
        sets.append(replace(part, options=kept))
    return replace(task, sets=tuple(sets))
