"""Any system with any mask head: what a recipe, a folder's config.json and a system's default decide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import merge_lora_weights_and_save_hf_model as program
import train_ds
from data.collate import SampleBuilder, collate
from data.sources import build_source
from model.checkpoints.files import read_tensors
from systems.assistant import load
from tests.tiny_base import GOLDEN, base_tensors, write_base, write_sam
from tests.tiny_run import write_reason_seg, write_recipe

STEP = {"epochs": 1, "steps_per_epoch": 1, "grad_accumulation_steps": 1, "warmup_steps": 0, "lr": 1e-2}
PIXEL = {"mask_head": "pixel", "tower": {"pad": True}, "head_options": {"levels": [-2], "width": 32, "mlp_dim": 64}}
OTHER = {"sam": "pixel", "pixel": "sam"}


@pytest.fixture(scope="module", params=["sam", "pixel"])
def merged(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """Name of the head, run and merged folder of LISA with it, trained for one step."""
    folder = tmp_path_factory.mktemp(request.param)
    write_reason_seg(folder / "data", train=2, val=1)
    published = {name: tensor.float() for name, tensor in read_tensors(GOLDEN).items()}
    base = write_base(folder / "llava", base_tensors(published))
    sam = {"vision_pretrained": str(write_sam(folder / "sam.pth", published))}
    model = {"version": str(base), **(sam if request.param == "sam" else PIXEL)}
    train_ds.main(["--config", str(write_recipe(folder, model=model, train=STEP)), "--no_eval"])
    run = folder / "runs" / "tiny"
    program.main(["--run", str(run), "--tag", "last", "--save_path", str(folder / "merged")])
    return request.param, run, folder / "merged"


@torch.no_grad()
def answers(folder: Path, data: Path, **model) -> torch.Tensor:
    """Token logits and mask logits of one image, teacher forced."""
    assistant = load(folder, checkpoint="last", model=model, device="cpu")
    maker = SampleBuilder(assistant.system.task, assistant.encoder, assistant.views)
    sample = maker.build(build_source("ReasonSeg|val", str(data))[0], np.random.default_rng(0))
    output = assistant.model(collate([sample]))
    return torch.cat([output.token_logits.flatten(), *(masks.flatten() for masks in output.masks)])


def test_a_system_trains_merges_and_loads_with_any_head(merged):
    head, run, folder = merged
    assert load(folder, device="cpu").model.architecture.head == head
    data = run.parents[1] / "data"
    torch.testing.assert_close(answers(folder, data), answers(run, data), rtol=1e-5, atol=1e-5)


def test_the_head_of_a_folder_overrides_the_default_of_the_system(merged):
    """A recipe that says nothing about the mask head does not turn another head's weights into SAM's."""
    head, _, folder = merged
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"].pop("mask_head", None)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert load(folder, device="cpu").model.architecture.head == head


def test_a_head_that_the_weights_do_not_fit_is_refused(merged):
    head, _, folder = merged
    with pytest.raises(ValueError, match=rf"holds the weights of the mask head '{head}'.*do not fit '{OTHER[head]}'"):
        load(folder, device="cpu", model={"mask_head": OTHER[head]})


def test_published_weights_of_another_head_are_refused():
    with pytest.raises(ValueError, match=r"lisa holds the weights of the mask head 'sam'.*do not fit 'pixel'"):
        load(GOLDEN, device="cpu", model={"mask_head": "pixel", "head_options": {"decoder_heads": 4}})


@pytest.mark.parametrize("value", ["mask2former", 7])
def test_an_unknown_head_in_config_json_is_refused(merged, value):
    _, _, folder = merged
    text = (folder / "config.json").read_text()
    values = json.loads(text)
    values["segmentation"]["head"] = value
    (folder / "config.json").write_text(json.dumps(values))
    try:
        with pytest.raises(ValueError, match=r"config\.json.*mask head"):
            load(folder, device="cpu")
    finally:
        (folder / "config.json").write_text(text)
