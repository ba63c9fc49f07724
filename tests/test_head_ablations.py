"""The papers' ablations of the mask side, each with what it changes: LoRA on the mask encoder and a mask head that was
not pre-trained (both LISA, lisa.md 9.3), over every head with an encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge_lora_weights_and_save_hf_model as program
import train_ds
from model.checkpoints.files import read_tensors
from model.finetune.trainable import adapt_head, mark_trainable, merge_lora, trainable_names
from model.heads import HEADS
from systems.assistant import build, load
from tests.tiny_base import GOLDEN, base_tensors, write_base, write_sam
from tests.tiny_model import SAM, tiny_batch, tiny_model
from tests.tiny_run import write_reason_seg, write_recipe
from tests.tiny_sam2 import DECODER, SIDES, TRUNK, VIT, WIDTH
from utils.config import LoraConfig, ModelConfig, load_recipe

ADAPTED = {"encoder_lora_rank": 2}
SMALL = {"prompt_encoder_config": {"hidden_size": WIDTH, "mask_input_channels": 8}}
SMALL |= {"vision_config": {"fpn_hidden_size": WIDTH}}
SMALL |= {"mask_decoder_config": {key: value for key, value in DECODER.items() if "dynamic" not in key}}
VIT_SIZES = {key: value for key, value in VIT.items() if key != "image_size"}
SIZES = {  # of a head without a file, over those of a released size
    "sam": ("vit_b", SAM),
    "sam2": ("hiera_tiny", {**SMALL, "backbone_config": TRUNK}),
    "sam3": ("sam3", {**SMALL, "backbone_config": VIT_SIZES}),
}


def test_adapters_sit_in_the_encoder_s_attention_and_start_as_nothing():
    plain, adapted, batch = tiny_model(), tiny_model(), tiny_batch()
    adapt_head(adapted, ADAPTED)
    mark_trainable(adapted, ModelConfig(lora=LoraConfig(r=0), train_language=False, head_options=ADAPTED))
    names = [name for name in trainable_names(adapted) if ".lora_" in name]
    layers = len(adapted.head.encoder.layers)
    assert len(names) == 2 * layers and all(name.startswith("head.encoder.layers.") for name in names)
    assert all(".attn.qkv.lora_" in name for name in names)
    assert not [name for name in trainable_names(adapted) if name.startswith("head.encoder") and ".lora_" not in name]
    for one, other in zip(plain(batch).masks, adapted(batch).masks, strict=True):
        assert torch.equal(one, other)  # the second factor is zero


def test_adapters_learn_and_merge_into_the_encoder():
    model, batch = tiny_model(), tiny_batch()
    adapt_head(model, ADAPTED)
    mark_trainable(model, ModelConfig(lora=LoraConfig(r=0), train_language=False, head_options=ADAPTED))
    sum(mask.mean() for mask in model.train()(batch).masks).backward()
    factors = {name: weight for name, weight in model.named_parameters() if name.endswith("lora_B.default.weight")}
    assert factors and all(weight.grad.abs().max() > 0 for weight in factors.values())
    with torch.no_grad():
        for weight in factors.values():
            weight.add_(0.1)
        before = model.eval()(batch).masks
        merge_lora(model)
        after = model(batch).masks
    assert not any(".lora_" in name for name in model.state_dict())
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_without_the_option_nothing_is_adapted():
    model = tiny_model()
    names = list(model.state_dict())
    adapt_head(model, {})
    assert list(model.state_dict()) == names


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_reason_seg(folder / "data", train=2, val=1)
    published = {name: tensor.float() for name, tensor in read_tensors(GOLDEN).items()}
    write_base(folder / "llava", base_tensors(published))
    return folder


def recipe(folder: Path, base: Path, head: str, **options):
    size, sizes = SIZES[head]
    made = {"from_scratch": size, "sizes": sizes, "train_encoder": True, "decoder_heads": 4, **options}
    model = {"version": str(base / "llava"), "mask_head": head, "head_options": made}
    step = {"epochs": 1, "steps_per_epoch": 3, "grad_accumulation_steps": 1, "warmup_steps": 0, "lr": 1e-3}
    if head in SIDES:
        model["image_size"] = SIDES[head]
    return write_recipe(folder, model=model, train=step, data={"dataset_dir": str(base / "data")})


@pytest.mark.parametrize("head", list(SIZES))
def test_a_head_from_nothing_is_all_new_and_trains_with_its_encoder(tmp_path, base, head):
    file = recipe(tmp_path, base, head)
    model = build(load_recipe(file), device="cpu").model
    own = {name for name in model.state_dict() if name.startswith("head.")}
    assert {name for name in model.report.fresh if name.startswith("head.")} == own
    assert {name for name in own if name.startswith("head.encoder.")} <= set(trainable_names(model))
    again = build(load_recipe(file), device="cpu").model.state_dict()  # a seed keeps its meaning
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_head_from_nothing_is_trained_and_saved_with_its_encoder(tmp_path, base):
    file = recipe(tmp_path, base, "sam2")
    initial = build(load_recipe(file), device="cpu").model.state_dict()
    train_ds.main(["--config", str(file), "--no_eval"])
    run = tmp_path / "runs" / "tiny"
    program.main(["--run", str(run), "--tag", "last", "--save_path", str(tmp_path / "merged")])
    merged = load(tmp_path / "merged", device="cpu").model.state_dict()
    kept = load(run, checkpoint="last", device="cpu").model.state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in kept.items() if name.startswith("head."))
    encoder = [name for name in initial if name.startswith("head.encoder.")]
    moved = [name for name in encoder if not torch.equal(initial[name], merged[name])]
    assert len(moved) > 10, "the encoder learns"


def test_an_adapted_run_is_merged_with_its_adapters(tmp_path, base):
    published = {name: tensor.float() for name, tensor in read_tensors(GOLDEN).items()}
    model = {"version": str(base / "llava"), "vision_pretrained": str(write_sam(tmp_path / "sam.pth", published))}
    model |= {"head_options": {"decoder_heads": 4, **ADAPTED}}
    step = {"epochs": 1, "steps_per_epoch": 3, "grad_accumulation_steps": 1, "warmup_steps": 0, "lr": 1e-2}
    data = {"dataset_dir": str(base / "data")}
    train_ds.main(["--config", str(write_recipe(tmp_path, model=model, train=step, data=data)), "--no_eval"])
    run = tmp_path / "runs" / "tiny"
    checkpoint = next((run / "checkpoints").glob("*/trainable.safetensors"))
    assert any(name.startswith("head.encoder") and ".lora_" in name for name in load_file(checkpoint))
    program.main(["--run", str(run), "--tag", "last", "--save_path", str(tmp_path / "merged")])
    encoder = load(tmp_path / "merged", device="cpu").model.head.encoder.state_dict()
    base_encoder = {name: tensor for name, tensor in published.items() if "visual_model.image_encoder" in name}
    assert not any(".lora_" in name for name in encoder) and len(encoder) == len(base_encoder)
    qkv = encoder["layers.0.attn.qkv.weight"]
    assert not torch.equal(qkv, base_encoder["model.visual_model.image_encoder.blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("head", list(SIZES))
def test_a_contradicting_recipe_is_refused(tmp_path, base, head):
    with pytest.raises(ValueError, match="a random image encoder must train; set train_encoder=true"):
        build(load_recipe(recipe(tmp_path, base, head, train_encoder=False)), device="cpu")
    with pytest.raises(ValueError, match=r"no released size 'vit_g'.*have: "):
        build(load_recipe(recipe(tmp_path, base, head, from_scratch="vit_g")), device="cpu")
    both = load_recipe(recipe(tmp_path, base, head))
    both = replace(both, model=replace(both.model, vision_pretrained=str(base)))
    with pytest.raises(ValueError, match=r"would not be read; set model\.vision_pretrained=null"):
        build(both, device="cpu")
    nothing = load_recipe(recipe(tmp_path, base, head, from_scratch=None))
    with pytest.raises(ValueError, match=r"name the head's weights in model\.vision_pretrained"):
        build(nothing, device="cpu")


def test_every_head_with_an_encoder_names_layers_that_it_has():
    for name, (size, sizes) in SIZES.items():
        config = HEADS[name].released(size, sizes)
        if name in SIDES:
            config["prompt_encoder_config"]["image_size"] = SIDES[name]
        with torch.device("meta"):
            head = HEADS[name].build(config, "sdpa")
        adapted = head.adapted_encoder(ADAPTED)
        assert adapted is not None and adapted.rank == 2
        have = {part.rpartition(".")[2] for part, _ in adapted.module.named_modules()}
        assert set(adapted.layers) <= have
