"""Exports: COCO results that pycocotools reads, PNG files that give back the classes, names that never collide."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import chat
from data.types import Claim, Query
from evaluation.export.answers import export_answers
from evaluation.export.coco import box_of, coco_result, coco_results
from evaluation.export.label_maps import panoptic_image, read_panoptic, read_semantic, semantic_image
from evaluation.export.suites import export
from evaluation.predictor import Predictor, Segment
from evaluation.protocols import FORCED, Reply
from evaluation.runner import evaluate
from systems.assistant import build
from tests.records import OWN
from tests.tiny_assistant import CLASSES, tiny, toy_world
from utils.config import load_recipe

IMAGE = OWN / "lisa" / "image0.png"
REFER, LIST = "refcoco|unc|val", "ade20k|val"


def load(images: Path, results: Path) -> COCO:
    """The results as pycocotools loads them."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(images)).loadRes(str(results))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    world = toy_world(folder / "world", "ade20k", "refcoco", val_images=2)
    evaluate(tiny("lasagna", eager=8), [REFER, LIST], world, FORCED, 0, folder, workers=0, classes=CLASSES)
    export([folder / "predictions"], folder, ["coco", "semantic", "panoptic"])
    return folder


def lines(folder: Path, stem: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions" / f"{stem}.jsonl").read_text().splitlines()]


def test_pycocotools_loads_the_results(exported):
    for stem in ("refcoco_unc_val", "ade20k_val"):
        file = exported / "coco" / f"{stem}.json"
        loaded = load(file.with_suffix(".images.json"), file)
        entries = loaded.loadAnns(loaded.getAnnIds())
        assert entries and len(loaded.imgs) == 2
        for entry in entries:
            mask = coco_mask.decode(entry["segmentation"])
            assert isinstance(entry["segmentation"]["counts"], str) and entry["score"] == 1.0
            assert loaded.cats[entry["category_id"]]["name"] == entry["category"]
            assert mask.shape == (loaded.imgs[entry["image_id"]]["height"], loaded.imgs[entry["image_id"]]["width"])
            assert entry["bbox"] == pytest.approx(coco_mask.toBbox(entry["segmentation"]).tolist())


def test_exported_masks_are_the_predicted_ones(exported):
    entries = json.loads((exported / "coco" / "refcoco_unc_val.json").read_text())
    written = [mask for line in lines(exported, "refcoco_unc_val") for a in line["answers"] for mask in a["masks"]]
    assert [entry["segmentation"] for entry in entries] == written
    assert all(entry["area"] == coco_mask.area(mask) for entry, mask in zip(entries, written, strict=True))


def test_semantic_and_panoptic_files_say_the_same_as_the_coco_results(exported):
    semantic = exported / "semantic" / "ade20k_val"
    about = json.loads((semantic / "classes.json").read_text())
    panoptic = json.loads((exported / "panoptic" / "ade20k_val" / "panoptic.json").read_text())
    entries = json.loads((exported / "coco" / "ade20k_val.json").read_text())
    assert about["void"] == 255 and len(about["files"]) == 2 == len(panoptic["annotations"])
    assert about["classes"] == lines(exported, "ade20k_val")[0]["counts"]["classes"]
    for file, annotation in zip(about["files"], panoptic["annotations"], strict=True):
        classes = read_semantic(semantic / file["file_name"])
        segments = read_panoptic(exported / "panoptic" / "ade20k_val" / annotation["file_name"])
        assert (classes >= 0).any() and ((segments == 0) == (classes == -1)).all()
        for info in annotation["segments_info"]:
            assert ((segments == info["id"]) == (classes == info["category_id"])).all()
            assert info["area"] == (segments == info["id"]).sum() and info["bbox"] == box_of(segments == info["id"])
        for entry in entries:
            if entry["image_id"] == file["image_id"]:
                mask = coco_mask.decode(entry["segmentation"]).astype(bool)
                assert (mask == (classes == entry["category_id"])).all()
    cells = np.zeros(0, int)
    for line in lines(exported, "ade20k_val"):  # pixels per predicted class, as they were scored
        table = np.array(line["counts"]["standard"])
        file = next(file for file in about["files"] if file["image"] == line["image"])
        cells = read_semantic(semantic / file["file_name"])
        for number in set(table[:, 1]) - {len(about["classes"])}:
            assert (cells == number).sum() >= table[table[:, 1] == number, 2].sum()


@pytest.mark.parametrize("classes", [3, 255, 256, 5000])
def test_label_maps_come_back(tmp_path, classes):
    numbers = np.random.default_rng(0).integers(-1, classes, size=(40, 50))
    semantic_image(numbers, classes).save(tmp_path / "semantic.png")
    assert (read_semantic(tmp_path / "semantic.png") == numbers).all()
    with Image.open(tmp_path / "semantic.png") as image:
        assert (image.mode == "L") == (classes <= 255)
    image, segments = panoptic_image(numbers)
    image.save(tmp_path / "panoptic.png")
    ids = read_panoptic(tmp_path / "panoptic.png")
    category = {segment["id"]: segment["category_id"] for segment in segments} | {0: -1}
    assert (np.vectorize(category.get)(ids) == numbers).all()


def test_results_of_an_image(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[5:9, 10:12] = True
    entry = coco_result(mask, image_id=7, category_id=1, score=0.5, phrase="cup")
    assert entry["bbox"] == [10, 5, 2, 4] and entry["area"] == 8 and entry["phrase"] == "cup"
    assert coco_result(~np.ones((2, 2), bool), image_id=7, category_id=1)["bbox"] == [0, 0, 0, 0]
    segments = [Segment("cup", mask, 0.75, ""), Segment("dog", None, None, ""), Segment("", mask, None, "")]
    results = coco_results(segments, 7, names=("dog", "cup"))
    assert [(r["category"], r["category_id"], r["score"]) for r in results] == [("cup", 1, 0.75), ("object", 2, 1.0)]
    (tmp_path / "r.json").write_text(json.dumps(results))
    images = {"images": [{"id": 7}], "categories": [{"id": n} for n in range(3)], "annotations": [], "info": {}}
    (tmp_path / "i.json").write_text(json.dumps(images))
    assert len(load(tmp_path / "i.json", tmp_path / "r.json").anns) == 2


def test_label_map_of_the_predictor_holds_the_classes_that_it_marks():
    predictor = Predictor(
        build(load_recipe("configs/toy/lasagna.yaml"), device="cpu", trainable=False), max_new_tokens=24
    )
    names = ["road", "sky"]
    numbers = predictor.label_map(IMAGE, names)
    segments = predictor.classes(IMAGE, names)
    assert numbers.shape == np.asarray(Image.open(IMAGE)).shape[:2]
    covered = np.zeros(numbers.shape, bool)
    for place, segment in enumerate(segments):
        inside = segment.mask if segment.present else np.zeros(numbers.shape, bool)
        assert not ((numbers == place) & ~inside).any()
        covered |= inside
    assert ((numbers >= 0) == covered).all()


def test_chat_exports_next_to_its_answers_without_colliding(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "load_assistant", lambda args: tiny("lisa", eager=5))
    (tmp_path / "image0_coco.json").write_text("mine")  # as if an image were called image0_coco
    words = ["--version", "any", "--vis_save_path", str(tmp_path), "--max_new_tokens", "8", "--image", str(IMAGE)]
    assert chat.main([*words, "--classes", "dog,sky", "--export", "coco", "semantic", "panoptic"]) == 0
    assert (tmp_path / "image0_coco.json").read_text() == "mine" and not (tmp_path / "image0.json").exists()
    report = json.loads((tmp_path / "image0_2.json").read_text())
    assert [Path(file).name for file in report["exports"]] == [
        "image0_2_coco.json",
        "image0_2_semantic.png",
        "image0_2_panoptic.png",
        "image0_2_panoptic.json",
    ]
    entries = json.loads((tmp_path / "image0_2_coco.json").read_text())
    assert len(entries) == len(report["masks"]) and {entry["category"] for entry in entries} <= {"dog", "sky"}
    assert [entry["area"] for entry in entries] == [mask["area"] for mask in report["masks"]]
    info = json.loads((tmp_path / "image0_2_panoptic.json").read_text())
    ids = read_panoptic(tmp_path / "image0_2_panoptic.png")
    assert {s["id"] for s in info["segments_info"]} == set(np.unique(ids).tolist()) - {0}
    with pytest.raises(SystemExit, match="of a class list"):
        chat.main([*words, "--prompt", "Where?", "--export", "semantic"])


def test_files_of_others_stay_and_a_photograph_of_coco_has_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "load_assistant", lambda args: tiny("lisa", eager=5))
    image = Path(shutil.copy(IMAGE, tmp_path / "COCO_val2014_000000581857.png"))
    mine = [tmp_path / f"{image.stem}{ending}" for ending in ("_mask_0.png", "_2_overlay.png")]
    for file in mine:
        file.write_text("mine")
    words = ["--version", "any", "--vis_save_path", str(tmp_path), "--max_new_tokens", "8", "--image", str(image)]
    assert chat.main([*words, "--classes", "dog,sky", "--export", "coco"]) == 0
    assert [file.read_text() for file in mine] == ["mine", "mine"]
    entries = json.loads((tmp_path / f"{image.stem}_3_coco.json").read_text())
    assert entries and {entry["image_id"] for entry in entries} == {581857}


def test_an_answer_that_cannot_be_saved_is_still_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "load_assistant", lambda args: tiny("lisa", eager=5))
    (tmp_path / "file").touch()
    words = ["--version", "any", "--vis_save_path", str(tmp_path / "file" / "x"), "--max_new_tokens", "8"]
    assert chat.main([*words, "--image", str(IMAGE), "--classes", "dog,sky"]) == 1
    said = capsys.readouterr().out
    assert "[SEG]" in said and "Cannot save the answer: " in said


def test_a_class_has_the_number_of_its_place_however_the_answer_spells_it(tmp_path):
    """The reading of an answer strips the full stop of `misc.`."""
    query = Query("Segment.", (), phrases=("sky", "misc.", "traffic light"))
    claims = tuple(Claim(name, place) for place, name in enumerate(("misc", "Trafficlight", "sky", "bus")))
    reply = Reply("", claims, torch.ones(4, 2, 2))
    (file,) = export_answers(tmp_path / "a", [query], [reply], ["coco"])
    entries = [(entry["category"], entry["category_id"]) for entry in json.loads(file.read_text())]
    assert entries == [("misc.", 1), ("traffic light", 2), ("sky", 0), ("bus", 3)]
