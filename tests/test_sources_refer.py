"""RefCLEF and RefCOCO/+/g read from tiny files of the REFER toolkit's layout."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from data.sources import build_source

SQUARE, SHIFTED = [2, 2, 6, 2, 6, 6, 2, 6], [4, 4, 8, 4, 8, 8, 4, 8]
COCO_2014 = "images/mscoco/images/train2014"


def ref(number: int, image: int, split: str, *sentences: str, ann: int | None = None) -> dict:
    spoken = [{"sent_id": i, "sent": s, "raw": s.upper(), "tokens": s.split()} for i, s in enumerate(sentences)]
    return {
        "ref_id": number, "ann_id": number if ann is None else ann, "category_id": 1, "image_id": image,
        "split": split, "file_name": f"COCO_train2014_{image:012d}_{number}.jpg", "sentences": spoken, "sent_ids": [],
    }  # fmt: skip


REFS = [
    ref(10, 1, "train", " The Red ball", "left one"),
    ref(11, 2, "train", "a hat"),
    ref(12, 1, "train", "the dog"),
    ref(13, 3, "val", "val thing"),
    ref(14, 3, "testA", "person"),
    ref(15, 3, "testB", "object"),
    ref(16, 3, "testAB", "both"),
]


def write(
    root: Path, name="refcoco", level="refer_seg", split_by="unc", refs=REFS, edit=None, images=COCO_2014
) -> Path:
    folder = root / level / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    file_name = "{0:02d}/images/{0}.jpg" if name == "refclef" else "COCO_train2014_{:012d}.jpg"
    data = {
        "images": [{"id": i, "file_name": file_name.format(i), "height": 10, "width": 12} for i in (1, 2, 3)],
        "annotations": [
            {"id": r["ann_id"], "image_id": r["image_id"], "category_id": 1, "segmentation": [SQUARE, SHIFTED]}
            for r in refs
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    if edit:
        edit(data)
    (folder / "instances.json").write_text(json.dumps(data))
    for image in data["images"]:
        path = root / level / images / image["file_name"]
        if ".." in path.parts or not path.is_relative_to(root):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(path)
    return folder


def phrases(record) -> list[str]:
    return [target.phrase for target in record.targets]


@pytest.mark.parametrize("level", ["refer_seg", "", "refer"])
def test_one_record_a_picture_in_either_layout(tmp_path, level):
    write(tmp_path, level=level)
    source = build_source("refcoco", tmp_path)
    assert len(source) == 2
    assert phrases(source[0]) == [" The Red ball", "left one", "the dog"] and phrases(source[1]) == ["a hat"]
    assert source[0].kind == "refer" and source[0].image.is_file()
    first, second, third = source[0].targets
    assert first.mask is second.mask and first.mask is not third.mask, "sentences of one object share its mask"
    assert first.mask().shape == (10, 12) and first.mask().dtype == bool and first.mask().sum() == 28
    assert first.mask() is first.mask(), "rasterised once"


def test_pictures_in_the_plain_coco_folder_do(tmp_path):
    write(tmp_path)
    (tmp_path / "coco").mkdir()
    os.rename(tmp_path / "refer_seg" / COCO_2014, tmp_path / "coco/train2014")
    assert build_source("refcoco", tmp_path)[0].image.parent == tmp_path / "coco/train2014"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("val", ["val thing"]),
        ("testA", ["person", "both"]),
        ("testB", ["object", "both"]),
        ("test", ["person", "object", "both"]),
    ],
)
def test_splits_follow_the_toolkit(tmp_path, split, expected):
    write(tmp_path)
    assert phrases(build_source(f"refcoco|unc|{split}", tmp_path)[0]) == expected


def test_refcocog_is_split_by_umd_unless_told(tmp_path):
    write(tmp_path, "refcocog", split_by="google", refs=[ref(20, 1, "val", "google's", ann=10)])
    write(tmp_path, "refcocog", split_by="umd")
    assert len(build_source("refcocog", tmp_path)) == 2
    assert phrases(build_source("refcocog|google|val", tmp_path)[0]) == ["google's"]
    with pytest.raises(FileNotFoundError, match=r"(?s)refcocog not found.*refs\(unc\)\.p.*holds instances.json"):
        build_source("refcocog|unc|val", tmp_path)


def test_a_wrong_split_lists_the_choices(tmp_path):
    write(tmp_path, refs=REFS[:3])
    with pytest.raises(ValueError, match="no split of refcoco 'testD'"):
        build_source("refcoco|unc|testD", tmp_path)
    with pytest.raises(ValueError, match="no ref of split 'testC' among 3; it has train"):
        build_source("refcoco|unc|testC", tmp_path)


def test_refclef_stores_lists_of_rles_and_nested_pictures(tmp_path):
    square = np.zeros((10, 12), np.uint8)
    square[2:5, 3:9] = 1

    def as_rle(data):
        rle = coco.encode(np.asfortranarray(square))
        for annotation in data["annotations"]:
            annotation["segmentation"] = [{"size": [10, 12], "counts": rle["counts"].decode()}]

    write(tmp_path, "refclef", edit=as_rle, images="images/saiapr_tc-12")
    record = build_source("refclef", tmp_path)[0]
    assert record.image == tmp_path / "refer_seg/images/saiapr_tc-12/01/images/1.jpg"
    assert np.array_equal(record.targets[0].mask(), square.astype(bool))


def test_overlapping_parts_are_joined_unless_told(tmp_path):
    write(tmp_path)
    assert build_source("refcoco", tmp_path, overlap="exclude")[0].targets[0].mask().sum() == 24
    with pytest.raises(ValueError, match="no overlap of refcoco 'sum'; have: exclude, union"):
        build_source("refcoco", tmp_path, overlap="sum")


def test_empty_sentences_are_left_out_and_said(tmp_path, caplog):
    write(tmp_path, refs=[ref(10, 1, "train", "  ", "a cat")])
    assert phrases(build_source("refcoco", tmp_path)[0]) == ["a cat"]
    assert "left out 1 empty sentences" in caplog.text


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([[100, 100, 110, 100, 110, 110]], "lies outside the image"),
        ([[1, 1, 2, 2]], "three or more points"),
        ({"size": [12, 10], "counts": [120]}, "is of size"),
    ],
)
def test_a_bad_shape_names_file_annotation_and_ref(tmp_path, segmentation, says):
    write(tmp_path, edit=lambda data: data["annotations"][0].update(segmentation=segmentation))
    target = build_source("refcoco", tmp_path)[0].targets[0]
    with pytest.raises(ValueError, match=rf"instances.json: annotation 10 \(ref 10\): .*{says}"):
        target.mask()


def test_an_empty_segmentation_of_something_present_is_an_error(tmp_path):
    write(tmp_path, edit=lambda data: data["annotations"][0].update(segmentation=[]))
    with pytest.raises(ValueError, match=r"annotation 10 \(ref 10\): the segmentation is empty"):
        build_source("refcoco", tmp_path)[0].targets[0].mask()


def test_a_missing_picture_names_both(tmp_path):
    write(tmp_path)
    (tmp_path / "refer_seg" / COCO_2014 / "COCO_train2014_000000000001.jpg").unlink()
    source = build_source("refcoco", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"instances.json: image 1: .*000001\.jpg', but there is no file"):
        source[0]
    assert source[1].image.is_file()


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/secret.jpg", "C:\\secret.jpg", "a\\..\\..\\b.jpg", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    write(tmp_path, edit=lambda data: data["images"][0].update(file_name=name) if name else None)
    folder = tmp_path / "refer_seg/refcoco/instances.json"
    data = json.loads(folder.read_text())
    data["images"][0]["file_name"] = name
    folder.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"instances\.json: image 1: (the path .* leaves|names no image)"):
        build_source("refcoco", tmp_path)[0]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda data: data["annotations"].clear(), r"ref 10: names annotation 10, which is not in .*instances.json"),
        (lambda data: data["images"].clear(), "ref 10: names image 1, which is not in"),
        (lambda data: data["annotations"][0].pop("segmentation"), "annotation 10: no 'segmentation'"),
        (lambda data: data["images"][0].pop("height"), "image 1: no 'height'; it has id, file_name, width"),
        (lambda data: data.pop("images"), "no 'images'; it has annotations, categories"),
    ],
)
def test_files_that_disagree_say_where(tmp_path, edit, says):
    write(tmp_path)
    path = tmp_path / "refer_seg/refcoco/instances.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=says):
        build_source("refcoco", tmp_path)


def test_damaged_files_name_themselves(tmp_path):
    folder = write(tmp_path)
    path = folder / "instances.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON, perhaps cut off"):
        build_source("refcoco", tmp_path)
    path.write_text(whole)
    (folder / "refs(unc).p").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: expected a list of refs, got dict"):
        build_source("refcoco", tmp_path)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = write(tmp_path)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: refused, the pickle asks for posix\.mkdir"):
        build_source("refcoco", tmp_path)
    assert not (tmp_path / "pwned").exists()
