"""The recipe in a folder of weights, reduced to what gives the weights their meaning.

A merged folder may come from a stranger: its `recipe.yaml` must not choose where files of this machine are read or
written. A run folder is the user's own, and it names its base model by path.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from utils.config import DatasetConfig, ModelConfig, Recipe, TaskConfig, load_recipe
from utils.log import log
from utils.plain import leaves

RECIPE, CHECKPOINTS = "recipe.yaml", "checkpoints"
MEANING = (  # fields of `model`
    *("conv_type", "model_max_length", "image_size", "out_dim", "precision", "attn_implementation", "pack_rows"),
    *("use_mm_start_end", "head_options", "mask_head", "lora", "tokenization", "tokenizer_legacy"),
    *("text_projection", "prompts_per_token"),
)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, not of weights alone."""
    return (folder / CHECKPOINTS).is_dir()


def recipe_in(folder: Path) -> Recipe:
    """The recipe of a run folder without its embedding cache, which the caller may name.

    Of any other folder: the system with its options, the fields of MEANING, the tower's input settings, and of mixture
    and suites what names no path outside the dataset folder (a warning lists the rest).
    """
    recipe = load_recipe(folder)
    if is_run(folder):
        return replace(recipe, model=replace(recipe.model, embedding_cache=None))
    fields = {name: getattr(recipe.model, name) for name in MEANING}
    model = ModelConfig(vision_tower=None, tower=replace(recipe.model.tower, preprocessor=None), **fields)
    dropped: list[str] = []
    mixture = tuple(_inside(task, dropped) for task in recipe.data.mixture)
    custom = tuple(suite for suite in recipe.eval.custom if not leaves(suite.options))
    dropped += [f"the suite {suite.name}" for suite in recipe.eval.custom if suite not in custom]
    if dropped:
        log.warning("%s names paths outside the dataset folder, which do not count: %s", folder, ", ".join(dropped))
    reduced = Recipe(system=recipe.system, options=recipe.options, model=model)
    return replace(reduced, data=replace(reduced.data, mixture=mixture), eval=replace(reduced.eval, custom=custom))


def check_options(folder: Path, recipe: Recipe, overrides: Collection[str]) -> None:
    """Raises ValueError for an option of the system that is a path elsewhere (a wording), unless it is among the
    options that the caller overrides. It cannot just be dropped: the model was trained with the words of that file."""
    for key, value in recipe.options.items():
        if key not in overrides and not is_run(folder) and leaves(value):
            raise ValueError(
                f"{folder / RECIPE}: options.{key} is the path {value!r}, which a folder of weights may not choose; if "
                f"you trust it, give it yourself: --set options.{key}=PATH"
            )


def _inside(task: TaskConfig, dropped: list[str]) -> TaskConfig:
    """The task without options that name a path outside; those are added to `dropped`."""
    sets: list[DatasetConfig] = []
    for part in task.sets:
        options = {key: value for key, value in part.options.items() if not leaves(value)}
        dropped += [f"{key} of {part.source}" for key in part.options if key not in options]
        sets.append(replace(part, options=options))
    return replace(task, sets=tuple(sets))
