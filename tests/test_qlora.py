"""LoRA over 4-bit layers: what is small, what trains, and that merging gives plain weights. Needs bitsandbytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import merge_lora_weights_and_save_hf_model as merging
import train_ds
from model.finetune.trainable import prepare_training, trainable_names
from model.losses import objective
from systems.assistant import build, load
from tests.tiny_model import tiny_batch, tiny_model
from tests.tiny_run import train_log, write_reason_seg, write_recipe
from utils.config import LoraConfig, LossConfig, ModelConfig, load_recipe

CONFIG = ModelConfig(lora=LoraConfig(r=2, alpha=4, dropout=0.0), gradient_checkpointing=True, load_in_4bit=True)


@pytest.fixture(autouse=True)
def _bitsandbytes():
    pytest.importorskip("bitsandbytes")


def test_layers_are_small_and_only_adapters_of_them_train():
    model = prepare_training(tiny_model(), CONFIG).to("cpu")
    small = {name for name, weight in model.named_parameters() if weight.dtype == torch.uint8}
    assert small and all(name.startswith("vlm.language.model.layers.") for name in small)
    assert len(small) == 2 * 7  # layers, linears of each
    plain = prepare_training(tiny_model(), replace(CONFIG, load_in_4bit=False))
    assert trainable_names(model) == trainable_names(plain)
    batch = tiny_batch()
    objective(model(batch), batch, LossConfig()).total.backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert {name for name in trainable_names(model) if "lora_B" in name} <= reached
    assert not small & reached


def test_a_run_in_four_bits_trains_and_merges_into_plain_weights(tmp_path):
    write_reason_seg(tmp_path / "data", train=2, val=1)
    train = {"epochs": 1, "steps_per_epoch": 3, "grad_accumulation_steps": 1, "warmup_steps": 0, "lr": 1e-2}
    recipe = write_recipe(tmp_path, train=train)
    train_ds.main(["--config", str(recipe), "--no_eval", "--load_in_4bit"])
    run = tmp_path / "runs" / "tiny"
    assert len(train_log(run)) == 3
    merging.main(["--run", str(run), "--save_path", str(tmp_path / "merged")])
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(weight.is_floating_point() for weight in weights.values())
    file = run / "checkpoints" / "step_3" / "trainable.safetensors"
    words = ("--config", str(run / "recipe.yaml"), "--save_path", str(tmp_path / "of_file"))
    merging.main(["--weight", str(file), *words])
    of_file = load_file(tmp_path / "of_file" / "model.safetensors")
    assert of_file.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(of_file[name], weight, rtol=1e-5, atol=1e-6)
    merged = load(tmp_path / "merged")
    assert not merged.recipe.model.load_in_4bit
    answering = load(run)  # as the run's recipe says: the merged layers in 4 bits again
    name = "vlm.language.model.layers.0.self_attn.q_proj.weight"
    assert answering.model.get_parameter(name).dtype == torch.uint8
    assert merged.model.get_parameter(name).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lora": LoraConfig(r=0)}, r"lora\.r above 0"), ({"load_in_8bit": True}, "load_in_8bit is for inference")],
)
def test_what_cannot_train_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        prepare_training(tiny_model(), replace(CONFIG, **change))


def test_zero_3_is_refused_before_weights_are_read(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, model={"load_in_4bit": True}, train={"zero_stage": 3}))
    with pytest.raises(ValueError, match=r"zero_stage 0, 1 or 2"):
        build(replace(recipe, model=replace(recipe.model, version="nowhere")))
