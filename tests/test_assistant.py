"""Loading every kind of folder: published folders, run folders, merged folders; and refusing what does not fit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data.collate import collate, collate_prompts, load_views
from data.tokens import mask_ids
from data.types import Turn
from model.checkpoints.fingerprint import contents
from model.checkpoints.save import save_folder
from model.finetune.trainable import trainable_state
from systems.assistant import Assistant, build, find_checkpoint, load
from systems.lasagna import LasagnaTask, ListOptions
from tests.records import OWN
from tests.tiny_assistant import tiny
from utils.config import LoraConfig, ModelConfig, Recipe, save_recipe
from utils.images import read_image

TINY = {"head_options": {"decoder_heads": 4}}  # heads of the golden mask decoder, which no file tells
QUESTION, ANSWER = "<image>\n What is sky in this image? Please output segmentation mask.", ("it is ",)


def recipe(**options) -> Recipe:
    folder = OWN / "lasagna"
    lora = LoraConfig(r=2, alpha=4, dropout=0.1)
    model = ModelConfig(
        str(folder), str(folder / "clip"), precision="bf16", head_options={"decoder_heads": 4}, lora=lora
    )
    return Recipe("lasagna", {"num_all_classes": 30, **options}, model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose trained weights differ from the base's, and the assistant that was saved."""
    folder = tmp_path_factory.mktemp("run")
    assistant = build(recipe(), "cpu")
    with torch.no_grad():
        for parameter in assistant.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    for name in ("step_3", "step_6"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        state = {key: value.float().clone() for key, value in trainable_state(assistant.model).items()}
        save_file(state, folder / "checkpoints" / name / "trainable.safetensors")
    (folder / "checkpoints" / "last").write_text("step_6\n")
    save_recipe(assistant.recipe, folder)
    return folder, assistant


def logits(assistant) -> torch.Tensor:
    """Text logits of a fixed row about a fixed image."""
    sample = load_views(OWN / "lasagna" / "image0.png", assistant.views)
    sample.rows = [assistant.encoder.encode((Turn(QUESTION, ANSWER),))]
    sample.masks = torch.zeros(0, *sample.geometry.original)
    batch = collate([sample]).to("cpu", assistant.model.dtype)
    with torch.no_grad():
        return assistant.model(batch).token_logits.float()


@pytest.mark.parametrize("name", ["lisa", "lasagna"])
def test_a_published_folder_tells_its_system(name):
    assistant = load(OWN / name, model=TINY, device="cpu")
    assert assistant.system.name == assistant.recipe.system == name
    assert assistant.model.dtype == torch.float32 and not assistant.model.training
    assert not any(parameter.requires_grad for parameter in assistant.model.parameters())
    written = json.loads((OWN / name / "added_tokens.json").read_text())
    assert mask_ids(assistant.tokenizer, assistant.system.tokens) == (written[assistant.system.tokens.mask[0]],)
    assert assistant.encoder.prompt(QUESTION)[-1] == assistant.tokenizer("ASSISTANT:")["input_ids"][-1]
    assert assistant.views.language(np.zeros((40, 60, 3), np.uint8)).shape == (3, 224, 224)


def list_options(assistant: Assistant) -> ListOptions:
    assert isinstance(assistant.system.task, LasagnaTask)
    return assistant.system.task.lists.options


def test_a_run_folder_gives_the_trained_model_with_its_adapters_merged(run):
    folder, trained = run
    loaded = load(folder, device="cpu")
    assert loaded.system.name == "lasagna" and list_options(loaded).num_all_classes == 30
    assert not any("lora" in name for name in loaded.model.state_dict())
    expected = logits(build(loaded.recipe, "cpu", trainable=False))
    assert not torch.allclose(logits(loaded), expected, atol=1e-3), "training changed something"
    trained.model.float().eval()
    assert torch.allclose(logits(loaded), logits(trained), atol=1e-4)


def test_another_base_than_a_run_was_trained_on_is_warned_of(run, tmp_path, caplog):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "meta.json").write_text(json.dumps([{"content": contents(recipe().model)}]))
    load(folder, device="cpu")
    assert "does not hold" not in caplog.text
    base = shutil.copytree(OWN / "lasagna", tmp_path / "base")
    load(folder, model={"version": str(base)}, device="cpu")
    assert "does not hold" not in caplog.text, "a folder that was moved is the same"
    file = base / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    torch.save({name: value * 1.5 for name, value in weights.items()}, file)
    load(folder, model={"version": str(base)}, device="cpu")
    assert f"model.version={base} does not hold what the run was trained on" in caplog.text


def test_a_base_that_was_moved_can_be_named(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    moved = recipe()
    save_recipe(replace(moved, model=replace(moved.model, version=str(tmp_path / "gone"))), folder)
    with pytest.raises(
        FileNotFoundError, match=r"gone.*run/recipe\.yaml names it; .*--set model\.version=FOLDER says where"
    ):
        load(folder, device="cpu")


def test_a_training_file_does_not_go_over_a_run(run, tmp_path):
    with pytest.raises(ValueError, match=r"is a run, .*--weight"):
        load(run[0], model={"checkpoint_file": str(tmp_path / "x.bin")}, device="cpu")


def test_a_merged_folder_stands_alone(run, tmp_path):
    loaded = load(run[0], device="cpu")
    save_folder(loaded.model, tmp_path / "merged", loaded.tokenizer, loaded.recipe)
    merged = load(tmp_path / "merged", device="cpu", options={"classes_per_query": 7})
    assert torch.allclose(logits(loaded), logits(merged), atol=1e-5)
    assert list_options(merged).classes_per_query == 7
    assert list_options(merged).num_all_classes == 30
    assert merged.recipe.model.version == str(tmp_path / "merged")


def test_precision_is_the_recipes_unless_said(run):
    assert load(run[0], device="cpu", model={"precision": "bf16"}).model.dtype == torch.bfloat16
    assert load(run[0], device="cpu").model.dtype == torch.float32
    assert build(recipe(), "cpu", trainable=False).model.dtype == torch.bfloat16


def test_building_marks_what_trains():
    assistant = build(recipe(), "cpu")
    trained = [name for name, parameter in assistant.model.named_parameters() if parameter.requires_grad]
    assert assistant.model.training and any("lora_A" in name for name in trained)
    assert not any(name.startswith("vlm.tower") for name in trained)


def test_checkpoints_are_found_by_pointer_and_by_name(run):
    folder, _ = run
    assert find_checkpoint(folder).name == "step_6", "without a best one the last one counts"
    assert find_checkpoint(folder, "step_3").name == "step_3"
    (folder / "checkpoints" / "best").write_text("step_3\n")
    assert find_checkpoint(folder).name == "step_3" and find_checkpoint(folder, "last").name == "step_6"
    (folder / "checkpoints" / "best").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'step_9' .*have: best, last, step_3, step_6"):
        find_checkpoint(folder, "step_9")


def test_a_run_without_checkpoints_says_so(tmp_path):
    save_recipe(recipe(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load(tmp_path, device="cpu")


def test_trained_weights_of_another_recipe_are_refused(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    save_file({"project.0.bias": torch.zeros(48)}, tmp_path / "run/checkpoints/step_6/trainable.safetensors")
    with pytest.raises(ValueError, match=r"step_6/trainable.safetensors: .*missing: head.decoder"):
        load(tmp_path / "run", device="cpu")


@pytest.mark.parametrize("kind", ["published", "run"])
def test_another_system_than_asked_is_refused(kind, run):
    place = OWN / "lasagna" if kind == "published" else run[0]
    with pytest.raises(ValueError, match="holds a 'lasagna' assistant, 'lisa' was asked for"):
        load(place, system="lisa", model=TINY, device="cpu")
    with pytest.raises(KeyError, match="no system 'lisaa'"):
        load(place, system="lisaa", model=TINY, device="cpu")


def copied(name: str, folder: Path, **config) -> Path:
    """A golden folder with other fields in its `config.json`."""
    shutil.copytree(OWN / name, folder, ignore=shutil.ignore_patterns("*.npz", "*.png", "golden.json"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def test_tokens_tell_where_the_architecture_does_not(tmp_path):
    folder = copied("lasagna", tmp_path / "fork", architectures=["MyForkForCausalLM"])
    assert load(folder, model=TINY, device="cpu").system.name == "lasagna"


def test_a_folder_that_tells_nothing_lists_the_systems(tmp_path):
    folder = copied("lisa", tmp_path / "base", architectures=["LlavaLlamaForCausalLM"])
    added = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps({**added, "[OTHER]": 603}))
    with pytest.raises(ValueError, match=r"does not say which system it is of.*have: .*lasagna, lisa"):
        load(folder, model=TINY, device="cpu")


def test_wrong_vocabulary_is_another_systems_checkpoint(tmp_path):
    """A system claimed by the recipe, whose tokens the weights have no rows for."""
    folder = copied("lisa", tmp_path / "claimed")
    save_recipe(recipe(), folder)
    with pytest.raises(ValueError, match=r"checkpoint of another system.*<ins>"):
        load(folder, model=TINY, device="cpu")


def test_overrides_are_checked(run):
    with pytest.raises(ValueError, match=re.escape("no field in model 'precison' (did you mean 'precision'?)")):
        load(run[0], model={"precison": "fp32"}, device="cpu")
    with pytest.raises(ValueError, match="no field in options 'nope'"):
        load(run[0], options={"nope": 1}, device="cpu")


def test_missing_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load(tmp_path / "nowhere", device="cpu")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load(tmp_path, device="cpu")


def test_processes_that_share_weights_draw_masks_in_one_piece():
    """Under ZeRO-3 every pass is a collective; dialogues, and so pieces, differ in number between processes."""
    for stage, redraw in ((2, True), (3, False)):
        given = recipe()
        assert (
            build(replace(given, train=replace(given.train, zero_stage=stage)), "cpu").model.head.checkpoint_decoder
            == redraw
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_become_the_pixels_of_the_views_in_the_dtype_of_the_model(dtype):
    assistant = tiny("lisa")
    assistant.model.to(dtype)
    path = OWN / "lasagna" / "image0.png"
    sample = load_views(path, assistant.views)
    assert sample.pixels.dtype == sample.seg_pixels.dtype == torch.uint8
    batch = assistant.model.normalised(collate_prompts([sample, sample], [[], []]).to("cpu", dtype))
    image = read_image(path)
    for found, expected in (
        (batch.pixels, assistant.views.language(image)),
        (batch.seg_pixels, assistant.views.seg(image)[0]),
    ):
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype).expand_as(found))
