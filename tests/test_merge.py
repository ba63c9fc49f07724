"""A training run becomes one folder with the same answers, in either layout, from a run folder or a given file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import merge_lora_weights_and_save_hf_model as program
import train_ds
from data.collate import Maker, collate
from data.sources import build_source
from model.heads import HEADS
from model.legacy import published_table
from systems.assistant import Assistant, load
from tests.tiny_run import BASE, write_reason_seg, write_recipe
from utils.config import load_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of training, at a rate that moves every adapter."""
    folder = tmp_path_factory.mktemp("merge")
    write_reason_seg(folder / "data", train=2, val=1)
    train = {"epochs": 1, "grad_accumulation_steps": 1, "warmup_steps": 0, "lr": 1e-2, "steps_per_epoch": 4}
    recipe = write_recipe(folder, train=train)
    train_ds.main(["--config", str(recipe), "--no_eval"])
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def truth(run):
    """The run's own answers, adapters merged in memory, in fp32."""
    return answers(load(run, checkpoint="last"))


@torch.no_grad()
def answers(assistant: Assistant) -> torch.Tensor:
    """Token logits and mask logits of one picture, teacher forced, in one row."""
    source = build_source("ReasonSeg|val", assistant.recipe.data.dataset_dir)
    maker = Maker(assistant.system.task, assistant.encoder, assistant.views)
    sample = maker.make_sample(source[0], np.random.default_rng(0))
    output = assistant.model(collate([sample], assistant.model.vlm.image_tokens))
    return torch.cat([output.token_logits.flatten(), *(masks.flatten() for masks in output.masks)])


def merge(*words) -> None:
    program.main([str(word) for word in words])


def place(assistant: Assistant, run) -> Assistant:
    """The same assistant, asked about the run's data (a folder of weights does not choose data)."""
    return replace(assistant, recipe=load_recipe(run))


def test_merged_folder_answers_as_the_run(run, truth, tmp_path):
    merge("--run", run, "--save_path", tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.model", "recipe.yaml"} <= names
    assert not any(".lora_" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(answers(place(load(tmp_path / "merged"), run)), truth, rtol=1e-5, atol=1e-5)


def test_training_changed_the_answers(run, truth):
    base = load(BASE, model={"vision_tower": str(BASE / "clip"), "decoder_heads": 4})
    assert (answers(place(base, run)) - truth).abs().max() > 1e-2


def test_original_layout_answers_as_the_run(run, truth, tmp_path):
    merge("--run", run, "--save_path", tmp_path / "original", "--format", "original")
    names = torch.load(tmp_path / "original" / "pytorch_model.bin", weights_only=True).keys()
    published = (line.split()[0] for line in (BASE / "keys.txt").read_text().splitlines() if line.strip())
    assert set(names) == {name for name in published if not name.endswith("inv_freq") and "vision_tower" not in name}
    assert json.loads((tmp_path / "original" / "config.json").read_text())["architectures"] == ["LISAForCausalLM"]
    found = load(tmp_path / "original", model={"decoder_heads": 4})
    torch.testing.assert_close(answers(place(found, run)), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["ours", "original names"])
def test_one_file_of_whole_weights(run, truth, tmp_path, wrapped):
    """What zero_to_fp32 makes of this program's shards, and of the original programs'."""
    weights = load_file(run / "checkpoints" / "step_4" / "trainable.safetensors")
    if wrapped:
        table = published_table(HEADS["sam"].NAMES, 1)
        weights = {f"base_model.model.{table.theirs(name)}": value for name, value in weights.items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    recipe = run / "recipe.yaml"
    merge("--weight", tmp_path / "pytorch_model.bin", "--config", recipe, "--save_path", tmp_path / "merged")
    torch.testing.assert_close(answers(place(load(tmp_path / "merged"), run)), truth, rtol=1e-5, atol=1e-5)


def test_precision_of_the_written_weights(run, tmp_path):
    merge("--run", run, "--save_path", tmp_path / "half", "--precision", "bf16", "--tag", "step_4")
    kinds = {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}


def test_wrong_input_is_refused(run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"step_7.*have"):
        merge("--run", run, "--tag", "step_7", "--save_path", tmp_path / "x")
    with pytest.raises(SystemExit):
        merge("--run", run, "--lr", "3", "--save_path", tmp_path / "x")
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="not this recipe's; missing"):
        merge("--weight", tmp_path / "other.bin", "--config", run / "recipe.yaml", "--save_path", tmp_path / "x")
    assert not (tmp_path / "x").exists()
