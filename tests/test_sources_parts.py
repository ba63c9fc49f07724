"""PACO-LVIS, PASCAL-Part, PartImageNet and Open Images, in tiny files of their layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import build_source
from utils.masks import encode_rle

SIZE = (10, 12)
BOX, OTHER = [1, 1, 4, 1, 4, 4, 1, 4], [6, 5, 10, 5, 10, 9, 6, 9]
LAYOUTS = {
    "paco_lvis": ("vlpart/paco/annotations/paco_lvis_v1_train.json", "coco"),
    "paco_lvis old": ("paco_lvis_v1/paco_lvis_v1_train.json", "coco"),
    "pascal_part": ("vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"),
    "pascal_part old": ("pascal_part/train.json", "VOCdevkit/VOC2010/JPEGImages"),
    "partimagenet": ("partimagenet/annotations/train.json", "partimagenet/images/train"),
}
CATEGORIES = ["car_(automobile)", "trash_can", "car_(automobile):wheel", "trash_can:lid_(cover)"]
FILE = "train2017/a b é.jpg"


def put(path: Path, size=SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)


def write(root: Path, layout="paco_lvis", edit=None, file_name=FILE, categories=CATEGORIES) -> Path:
    path, folder = root / LAYOUTS[layout][0], root / LAYOUTS[layout][1]
    square = np.zeros(SIZE, bool)
    square[:2, :3] = True
    shapes = [
        (1, [BOX]),
        (3, [BOX]),
        (3, [OTHER]),
        (2, encode_rle(square)),
        (4, {"size": [10, 12], "counts": [0, 2, 118]}),
    ]
    names = [entry if isinstance(entry, dict) else {"name": entry} for entry in categories]
    data = {
        "annotations": [
            {"id": i, "image_id": 5, "category_id": c, "segmentation": s} for i, (c, s) in enumerate(shapes)
        ],
        "images": [{"id": i, "file_name": file_name, "height": SIZE[0], "width": SIZE[1]} for i in (5, 6)],
        "categories": [{"id": i, **entry} for i, entry in enumerate(names, start=1)],
    }
    if edit:
        edit(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    put(folder / file_name)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_objects_and_parts(tmp_path, layout):
    write(tmp_path, layout)
    source = build_source(layout.split()[0], tmp_path)
    record = source[0]
    assert len(source) == 1, "images without annotations are left out"
    assert record.kind == "classes" and record.image.name == "a b é.jpg"
    assert record.vocabulary == ("car", "trash can", "car wheel", "trash can lid")
    found = {target.phrase: (target.aliases, int(target.mask().sum())) for target in record.targets}
    assert found == {
        "car": ((), 9), "car wheel": (("the wheel of the car",), 25), "trash can": ((), 6),
        "trash can lid": (("the lid of the trash can",), 2),
    }  # fmt: skip


def test_instances_apart_and_names_as_published(tmp_path):
    write(tmp_path)
    source = build_source("paco_lvis|train", tmp_path, instances="separate", names="published")
    assert [(t.phrase, int(t.mask().sum())) for t in source[0].targets] == [
        ("car", 9), ("car wheel", 9), ("car wheel", 16), ("trash_can", 6), ("trash_can lid", 2),
    ]  # fmt: skip
    assert source[0].vocabulary == ("car", "trash_can", "car wheel", "trash_can lid")
    assert source[0].vocabulary_aliases == ((), (), ("the wheel of the car",), ("the lid of the trash_can",))
    for option, value in (("instances", "both"), ("names", "nice")):
        with pytest.raises(ValueError, match=f"no {option} of a part set '{value}'; have"):
            build_source("paco_lvis", tmp_path, **{option: value})


def test_part_names_of_a_supercategory(tmp_path):
    names = [{"name": f"{a} {b}", "supercategory": a} for a, b in (("Quadruped", "Head"), ("Car", "Side Mirror"))]
    names += [{"name": "Boat", "supercategory": "Boat"}, {"name": "Bottle cap", "supercategory": ""}]
    write(tmp_path, "partimagenet", categories=names)
    source = build_source("partimagenet", tmp_path)
    assert source.vocabulary == ("quadruped head", "car side mirror", "boat", "bottle cap")
    assert source[0].targets[0].aliases == ("the head of the quadruped",)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["annotations"][0].update(category_id=9), "annotation 0: names category 9, which is not in"),
        (lambda d: d["annotations"][0].update(image_id=9), "names image 9, which is not in"),
        (lambda d: d["annotations"][1].update(id=0), r"annotations\[1\]: the id 0 is given twice"),
        (lambda d: d["annotations"][2].pop("segmentation"), "annotation 2: no 'segmentation'"),
        (lambda d: d["categories"][0].update(name=" :wheel"), "category 1: the name ' :wheel' has no object"),
        (lambda d: d.pop("categories"), "no categories .*it has annotations, images"),
        (lambda d: d["annotations"].clear(), "no annotations .or an empty list"),
    ],
)
def test_files_that_disagree_say_where(tmp_path, edit, says):
    path = write(tmp_path, edit=edit)
    with pytest.raises(ValueError, match=rf"{path.name}: .*{says}|{path.name}: {says}"):
        build_source("paco_lvis", tmp_path)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "train2017/../../x.jpg", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    write(tmp_path, edit=lambda data: data["images"][0].update(file_name=name))
    with pytest.raises(ValueError, match=r"image 5: (the path .* leaves|names no image)"):
        build_source("paco_lvis", tmp_path)[0]


def test_runs_of_another_size_are_refused(tmp_path):
    write(tmp_path, edit=lambda d: d["annotations"][4]["segmentation"].update(size=[12, 10]))
    target = build_source("paco_lvis", tmp_path)[0].targets[-1]
    with pytest.raises(ValueError, match=r"train.json: annotation 4: the RLE is of size \[12, 10\]"):
        target.mask()


def test_a_truncated_file_names_itself(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=r"paco_lvis_v1_train\.json: not valid JSON, perhaps cut off"):
        build_source("paco_lvis", tmp_path)


# --- Open Images

MASK = "0/0a_m.png"


def write_open(root: Path, entry=None, size=(5, 6), layout="annotations/new/train_mask.json", mask=MASK) -> np.ndarray:
    base = root / "OpenImageV6"
    put(base / "folder_train/0a/0a1b.jpg")
    small = np.zeros(size, bool)
    small[0, 0] = small[-1, -1] = True
    path = base / "train-masks" / mask
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).save(path)
    data = {"0a1b": entry or {"Cat": [mask], "Dog": []}, "categories": ["Zebra", "Cat", "Dog"]}
    (base / layout).parent.mkdir(parents=True, exist_ok=True)
    (base / layout).write_text(json.dumps(data))
    return small


@pytest.mark.parametrize("layout", ["annotations/new/train_mask.json", "train_mask.json"])
@pytest.mark.parametrize("times", [2, 1, 0.5])
def test_masks_of_another_size_come_to_the_picture_by_nearest_neighbour(tmp_path, times, layout):
    shape = (int(SIZE[0] / times), int(SIZE[1] / times))
    write_open(tmp_path, {"Cat": [MASK], "Dog": []}, shape, layout)
    record = build_source("openimage", tmp_path)[0]
    assert record.vocabulary == ("zebra", "cat", "dog") and record.kind == "classes"
    (cat,) = record.targets
    mask = cat.mask()
    assert mask.shape == SIZE and mask.dtype == bool and mask[0, 0] and mask.sum() == {2: 8, 1: 2, 0.5: 1}[times]


def test_masks_are_paired_by_name_and_joined(tmp_path):
    write_open(tmp_path)
    for name, place in (("1/dog.png", (0, 11)), ("2/cat.png", (9, 0))):
        path = tmp_path / "OpenImageV6/train-masks" / name
        path.parent.mkdir()
        full = np.zeros(SIZE, bool)
        full[place] = True
        Image.fromarray(full).save(path)
    for entry in (
        {"Dog": ["1/dog.png"], "Cat": [MASK, "2/cat.png"]},
        {"Cat": ["2/cat.png", MASK], "Dog": ["1/dog.png"]},
    ):
        write_open(tmp_path, entry)
        found = {target.phrase: target.mask() for target in build_source("openimage", tmp_path)[0].targets}
        assert found["dog"].sum() == 1 and found["dog"][0, 11]
        assert found["cat"].sum() == 9 and found["cat"][9, 0] and found["cat"][0, 0]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"Wolf": [MASK]}, "0a1b: the class 'Wolf' is not among the 3 categories"),
        ([MASK], "0a1b: expected class names with mask files, got str"),
        ({"Cat": ["../../x.png"]}, "class 'cat': the path '../../x.png' leaves"),
        ({"Cat": [7]}, r"class 'cat': names no mask \(7\)"),
    ],
)
def test_bad_open_images_entries_say_where(tmp_path, entry, says):
    write_open(tmp_path, entry)
    with pytest.raises(ValueError, match=says):
        build_source("openimage", tmp_path)[0]


def test_a_missing_mask_and_a_file_without_categories(tmp_path):
    write_open(tmp_path, {"Cat": ["0/none.png"]})
    with pytest.raises(
        FileNotFoundError, match=r"0a1b: class 'cat': names the mask '0/none.png', but there is no file"
    ):
        build_source("openimage", tmp_path)[0]
    (tmp_path / "OpenImageV6/annotations/new/train_mask.json").write_text('{"0a1b": {}}')
    with pytest.raises(ValueError, match="no 'categories', the list of all class names"):
        build_source("openimage", tmp_path)
