"""configs/camvid.yaml joins a real tower, the toy base's language model and a pixel head, and they learn together."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, LlamaForCausalLM, LlavaForConditionalGeneration

from data.sources import build_source
from systems.assistant import build
from tests.tiny_run import start, train_log
from toy.base import language
from toy.base.blank_parts import TOKENIZER
from utils.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("REAL_DIR") or "real")


def test_the_language_model_of_the_toy_base_is_a_llama_folder(tmp_path):
    language.main([str(tmp_path / "language")])
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "language")
    base = LlavaForConditionalGeneration.from_pretrained(TOKENIZER).model.language_model
    weights = ours.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    with pytest.raises(SystemExit):
        language.main([str(tmp_path / "language")])


def test_the_recipe_joins_its_parts(tmp_path):
    language.main([str(tmp_path / "language")])
    sizes = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "tower")
    recipe = load_recipe(ROOT / "configs/camvid.yaml")
    parts = {"version": str(tmp_path / "language"), "vision_tower": str(tmp_path / "tower")}
    parts["embedding_cache"] = replace(recipe.model.embedding_cache, folder=str(tmp_path / "embeddings"))
    assistant = build(replace(recipe, model=replace(recipe.model, **parts)), device="cpu")
    view, model = assistant.model.vlm.view, assistant.model
    assert view.size == 448 and view.shows_all and view.tokens(360, 480) == 16 * 16
    trained = {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad}
    assert {"projector", "language"} <= trained and "tower" not in trained
    assert model.vlm.cache is not None and model.head.levels == (-1, -5)


@pytest.mark.skipif(not (REAL / "coco").is_dir(), reason="photographs: set REAL_DIR to the folder that holds coco/")
def test_the_recipe_of_coco_photographs_has_its_classes_in_order(tmp_path):
    (tmp_path / "coco").symlink_to((REAL / "coco").resolve())
    recipe = load_recipe(ROOT / "configs/coco_photographs.yaml")
    (task,) = recipe.data.mixture
    sources = [build_source(entry.source, tmp_path, **entry.options) for entry in (*task.sets, *recipe.eval.custom)]
    for source in sources:
        assert (
            source.vocabulary == sources[0].vocabulary and len(source.vocabulary) == recipe.options["num_all_classes"]
        )
        assert len(source) >= 40 and source[0].ignore is not None


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "camvid").is_dir(), reason="photographs: set REAL_DIR to the folder that holds camvid/")
def test_class_lists_of_street_scenes_are_learned(tmp_path):
    """The recipe of `scripts/camvid.sh`, a seventh of its images: with a tenth no mask has been learned yet."""
    language.main([str(tmp_path / "language")])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/camvid").symlink_to((REAL / "camvid").resolve())  # the index is written next to it
    words = ["--dataset_dir", tmp_path / "data", "--log_base_dir", tmp_path, "--exp_name", "train", "--workers", "0"]
    words += ["--version", tmp_path / "language", "--vision_tower", REAL / "towers/vits14", "--steps_per_epoch", "150"]
    words += [
        "--epochs",
        "1",
        "--batch_size",
        "4",
        "--no_eval",
        "--set",
        f"model.embedding_cache.folder={tmp_path}/embeddings",
    ]
    start("train_ds.py", "--config", "configs/camvid.yaml", *words, timeout=1800)
    first, *_, last = train_log(tmp_path / "train")
    assert last["ce"] < 0.2 * first["ce"], "which classes are there"
    assert last["dice"] < 0.9 * first["dice"], "and where"
