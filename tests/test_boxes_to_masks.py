"""Boxes of a detector become masks by a tiny SAM, and the judge scores them as any other predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SamConfig, SamModel

import test_sem
from data.collate import rasterize_target
from data.sources.base import image_size
from evaluation.export.coco import box_of
from evaluation.judge import judge
from evaluation.suites import SUITES
from tests.tiny_assistant import toy_world
from tools.box_masks import Sam
from tools.boxes_to_masks import main
from utils.images import read_image
from utils.masks import rle_to_mask

REFER = "refcoco|unc|val"


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Path:
    """A SAM of random weights with an input of 64 pixels."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    tower |= {"output_channels": 16, "global_attn_indexes": [0], "window_size": 2, "mlp_dim": 16}
    tower |= {"num_pos_feats": 8}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "image_embedding_size": 4}
    folder = tmp_path_factory.mktemp("sam")
    SamModel(SamConfig(vision_config=tower, mask_decoder_config=decoder, prompt_encoder_config=prompt)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), "refcoco", val_images=2)


def boxes(world: Path) -> list[dict]:
    source = SUITES[REFER].open(world)
    found = []
    for index in range(len(source)):
        size = image_size(source[index].image)
        for number in range(len(source[index].targets)):
            box = box_of(rasterize_target(source[index], number, size))
            found.append({"query": f"{REFER}/{index}/{number}", "bbox": box, "score": 0.25, "detector": "mine"})
    return found


def run(world: Path, sam: Path, folder: Path, entries: list[dict]) -> list[dict]:
    questions, file, out = folder / "questions.jsonl", folder / "boxes.json", folder / "masks.json"
    test_sem.main(["--write_questions", str(questions), "--suites", REFER, "--dataset_dir", str(world)])
    file.write_text(json.dumps(entries))
    words = [str(file), "--questions", str(questions), "--sam", str(sam), "--out", str(out), "--batch_size", "2"]
    assert main([*words, "--dataset_dir", str(world)]) == 0
    return json.loads(out.read_text())


def test_boxes_become_predictions_that_the_judge_scores(world, sam, tmp_path, capsys):
    given = boxes(world)
    entries = run(world, sam, tmp_path, [*given, {"image": "no.jpg", "bbox": [0, 0, 5, 5]}])
    assert "boxes of images that no question is about: 1" in capsys.readouterr().out
    assert [entry["query"] for entry in entries] == [entry["query"] for entry in given]
    source = SUITES[REFER].open(world)
    for entry in entries:
        index = int(entry["query"].split("/")[1])
        mask = rle_to_mask(entry["segmentation"], image_size(source[index].image))
        assert entry["area"] == mask.sum() and entry["bbox"] == box_of(mask)
        assert entry["score"] == 0.25 and entry["detector"] == "mine"
    result = judge([tmp_path / "masks.json"], [REFER], world).suites[REFER]
    assert result.queries == len(given) and result.notes == ["judged from masks.json"]
    assert all(figure.value is not None for figure in result.figures)


def test_masks_are_those_of_the_model_called_by_hand(world, sam):
    """One box alone, prepared by transformers' own processor, gives the mask that it has among others."""
    from transformers import SamImageProcessor, SamProcessor

    image = read_image(SUITES[REFER].open(world)[0].image)
    given = [(3.0, 4.0, 40.0, 50.0), (10.0, 10.0, 60.0, 30.0), (0.0, 0.0, 20.0, 20.0)]
    model = SamModel.from_pretrained(sam).eval()
    small = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    processor = SamProcessor(SamImageProcessor(**small))
    processor.target_size = 64
    for box, (mask, quality) in zip(given, Sam(str(sam))(image, given, 2), strict=True):
        inputs = processor(image, input_boxes=[[list(box)]], return_tensors="pt")
        with torch.no_grad():
            output = model(
                pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
            )
        (expected,) = processor.post_process_masks(
            output.pred_masks, inputs["original_sizes"].tolist(), inputs["reshaped_input_sizes"].tolist()
        )
        assert mask.shape == image.shape[:2]
        assert (mask == expected[0, 0].numpy()).mean() > 0.999  # batches round differently
        assert quality == pytest.approx(output.iou_scores.item(), abs=1e-4)
    assert not np.array_equal(*[mask for mask, _ in Sam(str(sam))(image, given[:2], 2)])


@pytest.mark.parametrize("bbox", [None, [1, 2, 3], [1, 2, 0, 4], [1, 2, float("inf"), 4], ["a", 1, 2, 3]])
def test_boxes_that_are_none_are_refused_with_their_place(world, sam, tmp_path, bbox):
    with pytest.raises(SystemExit, match=r"boxes\.json"):
        run(world, sam, tmp_path, [boxes(world)[0] | {"bbox": bbox}])
