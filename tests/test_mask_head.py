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
from data.collate import SampleBuilder, collate, load_views
from data.sources import build_source
from data.types import IMAGE_PLACEHOLDER, Mask, Query, Record
from evaluation.predictions import answers_of
from evaluation.protocols import teacher_forced
from model.checkpoints.files import read_tensors
from model.checkpoints.save import save_original
from systems.assistant import load
from tests.tiny_base import GOLDEN, base_tensors, write_base, write_sam
from tests.tiny_run import write_reason_seg, write_recipe
from tests.tiny_sam2 import SIDES, stock

STEP = {"epochs": 1, "steps_per_epoch": 1, "grad_accumulation_steps": 1, "warmup_steps": 0, "lr": 1e-2}
PIXEL = {"mask_head": "pixel", "tower": {"pad": True}, "head_options": {"levels": [-2], "width": 32, "mlp_dim": 64}}
OTHER = {"sam": "pixel", "pixel": "sam", "sam2": "sam", "sam3": "sam2"}


@pytest.fixture(scope="module", params=list(OTHER))
def merged(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """Name of the head, run and merged folder of LISA with it, trained for one step."""
    folder = tmp_path_factory.mktemp(request.param)
    write_reason_seg(folder / "data", train=2, val=1)
    published = {name: tensor.float() for name, tensor in read_tensors(GOLDEN).items()}
    base = write_base(folder / "llava", base_tensors(published))
    if request.param == "pixel":
        head = PIXEL
    elif request.param == "sam":
        head = {"vision_pretrained": str(write_sam(folder / "sam.pth", published))}
    else:
        stock(request.param).save_pretrained(folder / "weights")
        head = {"mask_head": request.param, "vision_pretrained": str(folder / "weights")}
        head |= {"image_size": SIDES[request.param], "head_options": {"masks": "best_of_three"}}
    model = {"version": str(base), **head}
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


def test_scores_reach_replies_and_predictions_of_a_head_that_has_them(merged):
    head, run, folder = merged
    assistant = load(folder, device="cpu")
    place = run.parents[1] / "data" / "reason_seg" / "ReasonSeg" / "val" / "0.jpg"
    query = Query(f"{IMAGE_PLACEHOLDER}\nWhere is it?", ("It is ", Mask(0), "."))
    ((reply,),) = teacher_forced(assistant, [load_views(place, assistant.views)], [[query]])
    (line,) = answers_of(Record(place, "reason"), [query], [reply])
    if head in ("sam2", "sam3"):
        assert reply.scores is not None and 0 < float(reply.scores[0]) < 1
        assert line["scores"] == [pytest.approx(float(reply.scores[0]), abs=1e-6)]
    else:
        assert reply.scores is None and "scores" not in line


def test_the_published_layout_is_written_and_read_with_any_head(merged, tmp_path):
    head, _, folder = merged
    if head == "pixel":
        pytest.skip("the published layout has no fields for its padded tower; tests/test_pixel.py writes PixelLM's own")
    assistant = load(folder, device="cpu")
    save_original(assistant.model, tmp_path / "original", assistant.tokenizer, "LISAForCausalLM")
    options = {"decoder_heads": 4}
    if head in SIDES:
        config = assistant.model.architecture.head_config
        options["sizes"] = {key: value for key, value in config.items() if key != "decoding"}
    given = {"mask_head": head, "head_options": options, "vision_tower": str(tmp_path / "original" / "clip")}
    again = load(tmp_path / "original", device="cpu", model=given).model.state_dict()
    for name, value in assistant.model.state_dict().items():
        assert torch.equal(again[name], value), name


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
