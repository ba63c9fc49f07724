"""Every recipe in configs/: what it names exists, and it gives a real system its first loss on toy images."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data.collate import SampleBuilder, collate
from data.llama_tokenizer import LLAMA
from data.mixture import Mixture
from data.sources import SOURCES
from data.templates import template
from evaluation.metrics import SCORERS
from evaluation.suites import find_suites
from model.losses import objective
from systems.assistant import build
from systems.base import SYSTEMS, build_system, systems_accepting
from tests.records import OWN
from tests.tiny_assistant import ON_PHOTOGRAPHS, toy_world
from tests.tiny_parts import Parts
from tools.memory.released_sizes import released_config
from utils.config import Recipe, TowerConfig, load_recipe
from utils.flags import resolve

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

SCRIPTS = [ROOT / "scripts" / f"train_{name}.sh" for name in SYSTEMS if (ROOT / f"configs/{name}_13b.yaml").is_file()]
LAYOUTS = ("ade20k", "cocostuff", "refcoco", "refcoco+", "refcocog", "refclef", "reason_seg", "llava_instruct")
LAYOUTS += ("grefcoco", "refzom", "R-refcoco", "R-refcoco+", "R-refcocog", "fprefcoco", "fprefcoco+", "fprefcocog")
LAYOUTS += ("pascal_part", "paco_lvis", "mapillary", "cityscapes", "openimage", "muse", "coco")
TOY_BASE = {
    "version": "assets/toy/llava",
    "vision_tower": None,
    "vision_pretrained": "assets/toy/sam_vit_toy.safetensors",
}
TOY_CLASSES = {"ade20k", "cocostuff", "mapillary", "cityscapes"}  # sets of which the toy world has a part


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), *LAYOUTS, images=60, val_images=1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_what_a_recipe_names_exists(path):
    recipe = load_recipe(path)
    assert build_system(recipe.system, recipe.options).name == recipe.system
    template(recipe.model.conv_type or LLAMA.template)
    assert recipe.data.mixture and recipe.run.exp_name != "run"
    for task in recipe.data.mixture:
        for entry in task.sets:
            choices = inspect.signature(SOURCES[entry.source.split("|")[0]]).parameters
            assert entry.options.keys() <= choices.keys()
    first, *_ = find_suites(recipe.eval.suites, recipe.eval.custom)
    find_suites(recipe.eval.final_suites or recipe.eval.suites, recipe.eval.custom)
    assert recipe.eval.best_by in {figure.metric for figure in SCORERS[first.metric]().figures()}


PAPERS = ("lisa", "lasagna", "gsva", "pixellm", "sesame")
PUBLISHED = [path for path in CONFIGS if path.stem.split("_")[0] in PAPERS and path.parent.name != "toy"]
SPELT = ("pascal_part", "paco_lvis", "muse")  # sets whose names are rewritten unless the recipe says otherwise


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_published_recipes_have_the_published_names(path):
    recipe = load_recipe(path)
    sets = [entry for task in recipe.data.mixture for entry in task.sets if entry.source in SPELT]
    assert all(entry.options.get("names") == "published" for entry in sets)
    assert bool(sets) == (recipe.system != "lasagna"), "LaSagnA trains on none of them"


# The sizes, in which the recipes of a system differ most, are those of the toy weights here: CI takes the released
# recipe of each system, and one of each kind that has none.
ALSO_FAST = {"unified_7b", "real_mini", "lisa_qwen3_2b"}
ON_TOY_WEIGHTS = [
    path if path.parent.name == "released" or path.stem in ALSO_FAST else pytest.param(path, marks=pytest.mark.slow)
    for path in CONFIGS
    if path.stem not in ON_PHOTOGRAPHS
]


@pytest.mark.parametrize("path", ON_TOY_WEIGHTS, ids=name_of)
def test_a_recipe_gives_a_loss_and_gradients_on_toy_weights(path, world, parts):
    recipe = on_toy_weights(load_recipe(path), world, parts)
    assistant = build(recipe, device="cpu")
    maker = SampleBuilder(assistant.system.task, assistant.encoder, assistant.views, drop_long_rows=True)
    samples = []
    for task in recipe.data.mixture:
        one = replace(recipe.data, mixture=(replace(task, rate=1.0),), on_bad_sample="skip")  # also one at rate 0
        samples.append(Mixture.build(one, maker, seed=1).sample(0))
    for sample in samples:
        batch = collate([sample])
        losses = objective(assistant.model(batch), batch, recipe.loss)
        losses.total.backward()
        assert torch.isfinite(losses.total) and losses.parts["ce"] > 0
        assert (losses.parts["mask"] > 0) == bool(len(sample.masks))
    assert any(len(sample.masks) for sample in samples)
    grown = [name for name, p in assistant.model.named_parameters() if p.grad is not None and np.any(p.grad.numpy())]
    assert any("embed_tokens" in name for name in grown) and any(name.startswith("project") for name in grown)


@pytest.mark.parametrize(
    ("name", "patches", "ids"),
    [
        ("released/lisa", 256, 257),
        ("released/gsva", 256, 769),
        ("released/sesame", 576, 257),
        ("lisa_7b", 256, 257),
        ("sesame_13b", 576, 257),
    ],
)
def test_recipes_cut_rows_where_the_releases_do(name, patches, ids):
    """model_max_length - 255 ids, of which one stands for the image (lisa.md 3.2, gsva.md 5.4, sesame.md 5.2)."""
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    assert recipe.data.long_rows == "cut" and recipe.model.model_max_length - patches + 1 == ids


def test_recipes_lose_no_data_that_the_release_loses_to_its_limit():
    """PixelLM stops at 512 where an answer's mask tokens are cut off; LaSagnA is given 1024 and cuts nothing."""
    pixellm, lasagna = (
        load_recipe(ROOT / "configs" / f"{name}.yaml") for name in ("released/pixellm", "released/lasagna")
    )
    assert pixellm.data.long_rows == "cut" and pixellm.model.model_max_length >= 1024
    assert lasagna.data.long_rows == "keep" and lasagna.model.model_max_length == 1024
    longer = load_recipe(ROOT / "configs" / "lasagna_7b.yaml")
    assert longer.data.long_rows == "cut" and longer.model.model_max_length > 790 + 486  # lasagna.md 2.4


def on_toy_weights(recipe: Recipe, world: Path, parts: Parts) -> Recipe:
    """The same recipe in fp32, on the toy world, and on tiny weights: those in the published format of its system, or
    the toy base where there are none; or of its own backbone and mask head, where these are not the system's."""
    folder = OWN / recipe.system
    backbone = released_config(recipe.model.version).get("model_type", "llava")
    head = recipe.model.mask_head or build_system(recipe.system).head
    tiny = {"head_options": {"decoder_heads": 4}}
    if backbone != "llava" or head not in ("sam", "pixel"):
        tiny = parts(backbone, head)
        tiny["tower"] = TowerConfig(**tiny.get("tower", {}))
    elif folder.is_dir():
        tiny |= {"version": str(folder), "vision_tower": str(folder / "clip"), "vision_pretrained": None}
    else:
        tiny |= TOY_BASE
    tiny["head_options"] = {**tiny.get("head_options", {}), **recipe.model.head_options}
    model = replace(recipe.model, **tiny, precision="fp32", gradient_checkpointing=False, model_max_length=0)
    mixture = [replace(task, sets=tuple(map(_on_toy_classes, task.sets))) for task in recipe.data.mixture]
    data = replace(recipe.data, dataset_dir=str(world), mixture=tuple(mixture))
    return replace(recipe, model=model, data=data)


def _on_toy_classes(entry):
    if entry.source not in TOY_CLASSES:
        return entry
    return replace(entry, options={"classes": f"toy_classes/{entry.source}.txt"})


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_every_training_script_starts_its_recipe(path, tmp_path):
    """With a launcher that only prints its arguments: the recipe is there, the flags after the size follow."""
    (tmp_path / "deepspeed").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    launchers = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"  # a python with the packages is on it
    given = ["base", "data"] if path.stem == "train_pixellm" else ["base", "sam.pth", "data"]
    run = partial(subprocess.run, env={"PATH": launchers}, capture_output=True, text=True)
    words = run(["bash", path, *given, "13b", "--lr", "1e-4"], check=True).stdout.split()
    config = words[words.index("--config") + 1]
    assert config == f"configs/{path.stem.removeprefix('train_')}_13b.yaml" and (ROOT / config).is_file()
    recipe = resolve(words[1:], systems_accepting)
    assert (recipe.model.version, recipe.data.dataset_dir, recipe.train.lr) == ("base", "data", 1e-4)
    assert recipe.model.vision_pretrained == ("sam.pth" if "sam.pth" in given else None)
    assert "7b.yaml" in run(["bash", path, *given], check=True).stdout
    failed = run(["bash", path, *given[:-1]])
    assert failed.returncode and f"usage: {path.name}" in failed.stderr
