"""Data of one's own in COCO's formats: instances and panoptic files, tiny ones and those of real photographs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import build_source
from utils.images import read_image

SIZE = (10, 12)
BOX, OTHER = [1, 1, 4, 1, 4, 4, 1, 4], [6, 5, 10, 5, 10, 9, 6, 9]
CROWD = {"size": [10, 12], "counts": [110, 10]}  # the last column
REAL = Path(os.environ.get("REAL_DIR") or "real")


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path)


def sums(record) -> dict:
    return {target.phrase: target.mask and int(target.mask().sum()) for target in record.targets}


# --- instances

NAMES = ("Cat", "dog", "person", "sky")
OPTIONS = {"annotations": "mine/instances.json", "images": "mine/photos"}


def instances(root: Path, edit=None) -> Path:
    shapes = [(1, [BOX], 0), (1, [OTHER], 0), (2, [OTHER], 0), (3, CROWD, 1)]
    data = {
        "images": [{"id": i, "file_name": f"{i} é.jpg", "height": SIZE[0], "width": SIZE[1]} for i in (7, 8)],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": c, "segmentation": s, "iscrowd": crowd}
            for i, (c, s, crowd) in enumerate(shapes)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)],
    }
    if edit:
        edit(data)
    for i in (7, 8):
        put(root / f"mine/photos/{i} é.jpg")
    (root / OPTIONS["annotations"]).write_text(json.dumps(data))
    return root / OPTIONS["annotations"]


def test_class_lists_join_the_objects_of_a_category(tmp_path):
    instances(tmp_path)
    source = build_source("coco", tmp_path, **OPTIONS)
    assert len(source) == 2, "an image without annotations says that nothing is there"
    record = source[0]
    assert record.kind == "classes" and record.vocabulary == ("cat", "dog", "person", "sky") and record.ignore is None
    assert sums(record) == {"cat": 25, "dog": 16, "person": 10}
    assert source[1].targets == () and source[1].vocabulary == record.vocabulary


def test_a_group_of_others_without_annotations_is_no_class(tmp_path, caplog):
    """Roboflow's first category is the name of the export."""

    def edit(data):
        for category in data["categories"]:
            category["supercategory"] = "animals"
        data["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})

    instances(tmp_path, edit)
    assert build_source("coco", tmp_path, **OPTIONS).vocabulary == ("cat", "dog", "person", "sky")
    assert "animals: nothing is annotated as it" in caplog.text
    named = build_source("coco", tmp_path, **OPTIONS, classes=["animals", "cat"])
    assert named.vocabulary == ("animals", "cat")


def test_two_images_of_one_file_contradict_each_other_about_what_is_absent(tmp_path):
    instances(tmp_path, lambda data: data["images"][1].update(file_name="./7 é.jpg"))
    with pytest.raises(ValueError, match=r"image 8: has the file name of image 7, \./7 é\.jpg: merge"):
        build_source("coco", tmp_path, **OPTIONS)
    assert len(build_source("coco", tmp_path, **OPTIONS, serve="refer")) == 1, "of what is there both may speak"


def test_paths_may_be_absolute(tmp_path):
    instances(tmp_path)
    options = {key: str(tmp_path / value) for key, value in OPTIONS.items()}
    assert len(build_source("coco", tmp_path / "elsewhere", **options)) == 2


def test_an_ignored_crowd_is_neither_present_nor_absent(tmp_path):
    instances(tmp_path)
    record = build_source("coco", tmp_path, **OPTIONS, crowd="ignore")[0]
    assert record.vocabulary == ("cat", "dog", "sky") and sums(record) == {"cat": 25, "dog": 16}
    assert record.ignore().sum() == 10 and record.ignore()[:, -1].all()
    referred = build_source("coco", tmp_path, **OPTIONS, crowd="ignore", serve="refer", absent=4)[0]
    assert sums(referred) == {"cat": 25, "dog": 16, "sky": None} and referred.ignore().sum() == 10


def test_categories_are_referred_to_alone_together_or_in_vain(tmp_path):
    instances(tmp_path)
    refer = {**OPTIONS, "serve": "refer"}
    source = build_source("coco", tmp_path, **refer)
    assert len(source) == 1 and source[0].kind == "refer" and not source[0].vocabulary
    assert sums(source[0]) == {"cat": 25, "dog": 16, "person": 10}
    assert sums(build_source("coco", tmp_path, **refer, single=True)[0]) == {"dog": 16}, "a crowd is not single either"
    source = build_source("coco", tmp_path, **refer, absent=2)
    assert sums(source[0]) == {"cat": 25, "dog": 16, "person": 10, "sky": None}
    assert sums(source[1]) == {"person": None, "sky": None} == sums(source[1]), "the same at every visit"


def test_a_class_list_limits_what_is_asked(tmp_path):
    instances(tmp_path)
    (tmp_path / "few.txt").write_text("Dog\nsky\n")
    record = build_source("coco", tmp_path, **OPTIONS, classes="few.txt")[0]
    assert record.vocabulary == ("dog", "sky") and sums(record) == {"dog": 16} and record.ignore is None
    with pytest.raises(ValueError, match=r"classes: no class 'dgo' .did you mean 'dog'"):
        build_source("coco", tmp_path, **OPTIONS, classes=["dgo"])


def test_the_first_images_may_be_all_that_is_used(tmp_path):
    instances(tmp_path)
    source = build_source("coco", tmp_path, **OPTIONS, first=1)
    assert len(source) == len(source.image_paths()) == 1 and [sums(record) for record in source] == [sums(source[0])]
    with pytest.raises(IndexError):
        source[1]
    assert len(build_source("coco", tmp_path, **OPTIONS, first=9)) == 2


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"annotations": "none.json"}, FileNotFoundError, "annotations of coco: there is no .*none.json"),
        ({"images": "none"}, FileNotFoundError, "images of coco: there is no .*none"),
        ({"serve": "all"}, ValueError, "no serve of coco 'all'; have: classes, refer"),
        ({"crowd": "drop"}, ValueError, "no crowd of coco 'drop'; have: ignore, use"),
        ({"absent": 2}, ValueError, "need serve: refer"),
        ({"first": -1}, ValueError, "option first of coco must be 0 or more, got -1"),
        ({"abent": 2}, ValueError, "no option 'abent' .did you mean 'absent'"),
    ],
)
def test_bad_options(tmp_path, options, error, says):
    instances(tmp_path)
    with pytest.raises(error, match=says):
        build_source("coco", tmp_path, **{**OPTIONS, **options})


def test_a_needed_option_is_named(tmp_path):
    with pytest.raises(ValueError, match="source 'coco' needs the option 'annotations'; it has annotations, images, "):
        build_source("coco", tmp_path)


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([[1, 1, 2, 2]], "polygon 0 has 4 numbers; a polygon is x, y, x, y, ... of three or more points"),
        ([[1, 1, 2, 2, 3]], "polygon 0 has 5 numbers"),
        ([[50, 50, 60, 50, 60, 60]], "lies outside the image"),
        ({"size": [12, 10], "counts": [120]}, r"the RLE is of size \[12, 10\], the image of \[10, 12\]"),
        ({"size": [10, 12], "counts": [100]}, "do not add up"),
    ],
)
def test_bad_shapes_say_where(tmp_path, segmentation, says):
    instances(tmp_path, lambda d: d["annotations"][0].update(segmentation=segmentation))
    cat = build_source("coco", tmp_path, **OPTIONS)[0].targets[0]
    with pytest.raises(ValueError, match=rf"instances.json: image 7: annotation 0, 1: .*{says}"):
        cat.mask()


@pytest.mark.parametrize("name", ["../8 é.jpg", "/etc/passwd", "a/../../8 é.jpg"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    instances(tmp_path, lambda d: d["images"][0].update(file_name=name))
    with pytest.raises(ValueError, match=r"image 7: the path .* leaves"):
        build_source("coco", tmp_path, **OPTIONS)[0]


def test_a_truncated_file_names_itself(tmp_path):
    path = instances(tmp_path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"instances.json: not valid JSON, perhaps cut off"):
        build_source("coco", tmp_path, **OPTIONS)


# --- panoptic

PANOPTIC = {"annotations": "mine/panoptic.json", "images": "mine/photos"}


def panoptic(root: Path, edit=None) -> np.ndarray:
    ids = np.repeat([0, 5, 5, 70000, 70001, 300], 2)[None].repeat(SIZE[0], 0)
    segments = [(5, 1, 0), (70000, 2, 0), (70001, 2, 1), (300, 4, 0)]
    infos = [{"id": i, "category_id": c, "iscrowd": crowd} for i, c, crowd in segments]
    data = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": infos}],
        "categories": [
            {"id": i, "name": name}
            for i, name in enumerate(("cat", "Dog", "sky-other-merged", "floor-wood", "wall-other"), start=1)
        ],
    }
    if edit:
        edit(data)
    put(root / "mine/photos/7.jpg")
    (root / "mine/panoptic").mkdir(exist_ok=True)
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    Image.fromarray(colors).save(root / "mine/panoptic/7.png")
    (root / PANOPTIC["annotations"]).write_text(json.dumps(data))
    return ids


def test_panoptic_files_give_things_and_stuff(tmp_path):
    ids = panoptic(tmp_path)
    record = build_source("coco", tmp_path, **PANOPTIC)[0]
    assert record.vocabulary == ("cat", "dog", "sky", "floor-wood", "wall"), "suffixes go, other hyphens stay"
    masks = {target.phrase: target.mask() for target in record.targets}
    assert list(masks) == ["cat", "dog", "floor-wood"]
    assert np.array_equal(masks["cat"], ids == 5) and np.array_equal(masks["dog"], np.isin(ids, (70000, 70001)))
    assert np.array_equal(record.ignore(), ids == 0) and record.ignore().dtype == bool


def test_panoptic_crowds_and_chosen_classes(tmp_path):
    ids = panoptic(tmp_path)
    record = build_source("coco", tmp_path, **PANOPTIC, crowd="ignore", classes=["dog", "cat"])[0]
    assert sums(record) == {"cat": 40, "dog": 20} and record.vocabulary == ("cat", "dog")
    assert np.array_equal(record.ignore(), ~np.isin(ids, (5, 70000)))
    referred = build_source("coco", tmp_path, **PANOPTIC, serve="refer", classes=["dog", "sky"], absent=1)[0]
    assert sums(referred) == {"dog": 40, "sky": None} and referred.ignore is None


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["images"][0].update(height=12, width=10), r"7.png: the segment map is \(10, 12\)"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(id=6), "7.png: has no pixel of the segments 6"),
        (lambda d: d["annotations"][0].update(file_name="../x.png"), "the path '../x.png' leaves"),
        (
            lambda d: d["annotations"][0]["segments_info"][0].update(category_id=9),
            "image 7: names category 9, which is",
        ),
        (lambda d: d["annotations"].append(d["annotations"][0]), "is given twice"),
        (
            lambda d: d["images"].append({"id": 8, "file_name": "8.jpg", "height": 10, "width": 12}),
            "image 8: has no entry among the annotations",
        ),
    ],
)
def test_bad_panoptic_files_say_where(tmp_path, edit, says):
    panoptic(tmp_path, edit)
    with pytest.raises(ValueError, match=says):
        build_source("coco", tmp_path, **PANOPTIC)[0].targets[0].mask()


# --- real photographs


@pytest.mark.skipif(
    not (REAL / "coco").is_dir(), reason="real photographs: set REAL_DIR to the folder that holds coco/"
)
@pytest.mark.parametrize("kind", ["instances", "panoptic"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_photographs(kind, split, tmp_path, monkeypatch):
    monkeypatch.setenv("ASSISTANT_INDEX_DIR", str(tmp_path))
    options = {"annotations": f"coco/annotations/{kind}_{split}2017.json", "images": f"coco/{split}2017"}
    source = build_source("coco", REAL, **options)
    assert len(source) == {"train": 80, "val": 40}[split]
    assert len(source.vocabulary) == {"instances": 80, "panoptic": 133}[kind]
    drawn = 0
    for index in range(len(source)):
        record = source[index]
        shape = read_image(record.image).shape[:2]
        for target in record.targets:
            mask = target.mask()
            assert mask.shape == shape and mask.any()
            drawn += 1
        assert record.ignore is None or record.ignore().shape == shape
    assert drawn > 2 * len(source)
