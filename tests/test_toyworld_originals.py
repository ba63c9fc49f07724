"""The toy world's files hold what the papers' released loaders read: fields, counts, and images where they look.

Each check states what a released loader needs, as its specification gives it (the layout of LISA, SESAME, GSVA and
PixelLM; LaSagnA's own roots differ, lasagna.md 5.2, but its files are the same). None of them goes through our sources.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data.sources.label_maps import COCO_UNUSED
from toy.world import __main__ as make_toy_dataset

DRAWN = 3  # queries per image in the published commands: `num_classes_per_sample`
REFER = (
    *((name, "refs(unc).p") for name in ("refcoco", "refcoco+", "refclef")),
    ("refcocog", "refs(umd).p"),
    *((name, "refs(unc_exclude_unified).p") for name in ("refcoco", "refcoco+", "R-refcoco", "R-refcoco+")),
    *((name, "refs(umd_exclude_unified).p") for name in ("refcocog", "R-refcocog")),
    *((name, "refs(berkeley_exclude_unified).p") for name in ("fprefcoco", "fprefcoco+", "fprefcocog")),
    ("grefcoco", "grefs(unc).json"),
    ("refzom", "Ref_ZOM.p"),
)
LISTED = {"grefcoco": [-1], "refzom": []}  # sets whose `ann_id` is a list, and what it is for no target


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    assert make_toy_dataset.main([str(folder), "--images", "120", "--val_images", "6"]) == 0
    return folder


def read(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.suffix == ".p" else json.loads(path.read_text(encoding="utf-8"))


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size[::-1]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_reason_seg(root, split):
    """lisa.md 4.6; sesame.md 5.5: a false question for every true one that is sampled, and at least one to evaluate."""
    pictures = sorted((root / "reason_seg/ReasonSeg" / split).glob("*.jpg"))
    assert pictures
    flags = set()
    for picture in pictures:
        entry = read(picture.with_suffix(".json"))
        assert isinstance(entry["is_sentence"], bool) and 1 <= len(entry["text"]) <= 5
        for shape in entry["shapes"]:
            assert isinstance(shape["label"], str) and np.array(shape["points"], np.int32).shape[1:] == (2,)
        false = entry["false_premise_QA"]
        assert len(false) >= min(len(entry["text"]), DRAWN) and len(false) >= 1
        assert all([type(value) for value in item] == [str, bool, str] for item in false)
        flags |= {(entry["is_sentence"], item[1]) for item in false}
    assert (True, False) in flags or split != "train", "a false question has a flag of its own"


def test_explanations(root):
    entries = read(root / "reason_seg/ReasonSeg/explanatory/train.json")
    assert entries and all(entry.keys() >= {"image", "query", "outputs"} for entry in entries)
    assert all((root / "reason_seg/ReasonSeg/train" / entry["image"]).is_file() for entry in entries)


@pytest.mark.parametrize("split", ["train", "val", "test_less", "test_many"])
def test_muse(root, split):
    """pixellm.md 4.1, 4.4; the released evaluation reads rephrased name and box of every object of an answer."""
    entries = read(root / f"muse/muse_{split}.json")
    assert entries
    complete = True
    for entry in entries:
        year, name = (
            ("train2014", entry["file_name"])
            if "file_name" in entry
            else ("train2017" if "train2017" in entry["coco_url"] else "val2017", entry["coco_url"].split("/")[-1])
        )
        picture = root / "refer_seg/images/mscoco/images" / year / name
        assert size_of(picture) == (entry["height"], entry["width"])
        assert entry["ann_list"] and len(entry["questions"]) == len(entry["answers"]) == len(entry["text_answers"]) > 0
        for objects, text in zip(entry["answers"], entry["text_answers"], strict=True):
            assert objects and (text is None or text.format(seg="*").count("*") == len(objects))
            for thing in (*objects, *entry["ann_list"]):
                assert thing.keys() >= {"category_id", "category_name"} and len(thing["bbox"]) == 4
                complete &= "rephrased_name" in thing
                runs = coco_mask.frPyObjects(thing["segmentation"], entry["height"], entry["width"])
                assert coco_mask.decode(runs).any()
    assert complete == (split != "train"), "only training does without some of the rephrased names"


@pytest.mark.parametrize(("name", "file"), REFER)
def test_referring_sets(root, name, file):
    """lisa.md 4.4, sesame.md 4.2, gsva.md 4: the REFER toolkit's index, and the masks and flags of each set.

    All images but RefCLEF's lie in train2014, also those of Ref-ZOM that are called COCO_val2014.
    """
    images = root / "refer_seg/images" / ("saiapr_tc-12" if name == "refclef" else "mscoco/images/train2014")
    refs, instances = read(root / "refer_seg" / name / file), read(root / "refer_seg" / name / "instances.json")
    pictures, things, kinds = ({entry["id"]: entry for entry in instances[key]} for key in instances)
    assert list(instances) == ["images", "annotations", "categories"]
    assert len({ref["ref_id"] for ref in refs}) == len(refs)
    sentences = [sentence for ref in refs for sentence in ref["sentences"]]
    assert len({sentence["sent_id"] for sentence in sentences}) == len(sentences)
    for ref in refs:
        picture = pictures[ref["image_id"]]
        assert size_of(images / picture["file_name"]) == (picture["height"], picture["width"])
        numbers = _annotations(name, ref)
        for thing in (things[number] for number in numbers):
            assert thing["image_id"] == ref["image_id"] and thing["category_id"] in kinds
            assert thing.keys() >= {"bbox", "area", "iscrowd"} and _plane(thing, picture, name == "refclef").any()
        assert ref["sentences"] and all(s["sent"] == s["raw"] and s["tokens"] for s in ref["sentences"])
    _check_flags(name, sentences)
    assert {"train", "val"} < {ref["split"] for ref in refs}


def _annotations(name: str, ref: dict) -> list[int]:
    """Annotation numbers of a ref; of a set that lists them, -1 or nothing stands for no target."""
    if name not in LISTED:
        assert isinstance(ref["ann_id"], int)
        return [ref["ann_id"]]
    assert isinstance(ref["ann_id"], list) and isinstance(ref["category_id"], list)
    return [] if ref["ann_id"] == LISTED[name] else ref["ann_id"]


def _plane(thing: dict, picture: dict, runs: bool) -> np.ndarray:
    """RefCLEF holds a list of run lengths, every other set polygons of six or more numbers."""
    shapes = thing["segmentation"]
    if runs:
        return coco_mask.decode([{**shape, "counts": shape["counts"].encode()} for shape in shapes])
    assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in shapes)
    return coco_mask.decode(coco_mask.frPyObjects(shapes, picture["height"], picture["width"]))


def _check_flags(name: str, sentences: list[dict]) -> None:
    """The tests are `is True` and `is False`: Python booleans, and both of them."""
    key = "is_false_premise" if name.startswith("fp") else "exist" if name.startswith("R-") else None
    assert {type(sentence.get(key)) for sentence in sentences} == {bool if key else type(None)}
    if key:
        assert {sentence[key] for sentence in sentences} == {True, False}
    if name.startswith("fp"):
        assert all(bool(sentence["gt_sent"]) == sentence["is_false_premise"] for sentence in sentences)


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("vlpart/paco/annotations/paco_lvis_v1_train.json", "coco"),
        ("vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"),
    ],
)
def test_parts(root, file, images):
    """lisa.md 4.3: read by the COCO toolkit; a category is `object` or `object:part`, in PASCAL-Part the latter."""
    toolkit = COCO(str(root / file))
    names = [entry["name"].split(":") for entry in toolkit.loadCats(toolkit.getCatIds())]
    assert {len(parts) for parts in names} == ({2} if "pascal" in file else {1, 2}) and all(map(all, names))
    assert any(toolkit.getAnnIds(imgIds=number) for number in toolkit.getImgIds())
    for number in toolkit.getImgIds():
        (entry,) = toolkit.loadImgs([number])
        shape = size_of(root / images / entry["file_name"])
        for annotation in toolkit.loadAnns(toolkit.getAnnIds(imgIds=number)):
            plane = toolkit.annToMask(annotation)
            assert plane.shape == shape and plane.any() and annotation["category_id"] in toolkit.cats


def test_semantic_sets(root):
    """lisa.md 4.3, lasagna.md 5.3 to 5.5: 8-bit maps of known values; the image by replacing words in the path."""
    config = read(root / "mapillary/config_v2.0.json")["labels"]
    streets = read(root / "cityscapes/gtFine/cityscapes_panoptic_val.json")["categories"]
    assert len(config) == 124 and all(entry["readable"] for entry in config)
    assert len(streets) == 19 and {entry["id"] for entry in streets} < set(range(7, 34))
    known = {
        "ade20k/annotations/training": ("annotations", "images", ".jpg", range(151)),
        "cocostuff/train2017": ("cocostuff", "coco", ".jpg", {*range(182), 255} - COCO_UNUSED),
        "cityscapes/gtFine/train": ("gtFine", "leftImg8bit", ".png", range(34)),
        "mapillary/training/v2.0/labels": ("v2.0/labels", "images", ".jpg", range(len(config))),
    }
    for folder, (word, instead, suffix, values) in known.items():
        maps = sorted((root / folder).rglob("*.png"))
        assert maps
        for path in maps:
            below = path.relative_to(root).as_posix().replace("_labelIds", "").replace(word, instead)
            labels = np.asarray(Image.open(path))
            assert labels.dtype == np.uint8 and size_of(root / Path(below).with_suffix(suffix)) == labels.shape
            assert set(np.unique(labels).tolist()) <= set(values)


def test_open_images(root):
    """lasagna.md 5.6: mask files by image and class, the list of all classes next to them, 1-bit masks."""
    entries = read(root / "OpenImageV6/annotations/new/train_mask.json")
    classes = entries.pop("categories")
    assert entries and len(set(classes)) == len(classes)
    for name, found in entries.items():
        assert (root / "OpenImageV6/folder_train" / name[:2] / f"{name}.jpg").is_file() and set(found) <= set(classes)
        for file in (file for files in found.values() for file in files):
            with Image.open(root / "OpenImageV6/train-masks" / file) as mask:
                assert mask.mode == "1" and file.startswith(f"{name[0]}/")


def test_dialogues(root):
    """lisa.md 4.5: human and gpt take turns, images in coco/train2017."""
    entries = read(root / "llava_dataset/llava_instruct_150k.json")
    assert entries
    for entry in entries:
        turns = entry["conversations"]
        assert entry["id"] and (root / "coco/train2017" / entry["image"]).is_file()
        assert turns and [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert all(isinstance(turn["value"], str) for turn in turns)
