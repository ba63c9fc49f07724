"""Sentences that name several objects, one or none: gRefCOCO, Ref-ZOM, R-RefCOCO and FP-RefCOCO, in tiny files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import build_source

SIZE = (10, 12)
LEFT, RIGHT = [1, 1, 4, 1, 4, 4, 1, 4], [6, 5, 10, 5, 10, 9, 6, 9]
RUNS = {"size": list(SIZE), "counts": [20, 4, 96]}  # rows 0 to 3 of the third column
HALVES = "images/mscoco/images"


def ref(number: int, annotations, *sentences, split="train", image=1, **own) -> dict:
    said = [{"sent_id": i, **(s if isinstance(s, dict) else {"sent": s})} for i, s in enumerate(sentences)]
    return {"ref_id": number, "ann_id": annotations, "image_id": image, "split": split, "sentences": said, **own}


def write(root: Path, name: str, file: str, refs: list[dict], edit=None, halves=("train2014",) * 2) -> Path:
    folder = root / "refer_seg" / name
    folder.mkdir(parents=True, exist_ok=True)
    images = [
        {"id": i, "file_name": f"COCO_{half}_{i:012d}.jpg", "height": SIZE[0], "width": SIZE[1]}
        for i, half in enumerate(halves, start=1)
    ]
    shapes = {1: [LEFT], 2: [RIGHT], 3: RUNS}
    annotations = [{"id": i, "image_id": 1, "category_id": 1, "segmentation": shape} for i, shape in shapes.items()]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    if edit:
        edit(data)
    (folder / "instances.json").write_text(json.dumps(data))
    (folder / file).write_bytes(json.dumps(refs).encode() if file.endswith("json") else pickle.dumps(refs, protocol=2))
    for image in images:
        path = root / "refer_seg" / HALVES / image["file_name"].split("_")[1] / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path)
    return folder


GREFS = [
    ref(1, [1, 2], "Both Things", no_target=False),
    ref(2, [3], "the line", no_target=False),
    ref(3, [-1], "a hat", no_target=True),
]


def masks(record) -> dict:
    return {target.phrase: target.mask and target.mask() for target in record.targets}


@pytest.mark.parametrize("file", ["grefs(unc).json", "grefs(unc).p"])
def test_grefcoco_joins_several_objects_and_knows_none(tmp_path, file):
    write(tmp_path, "grefcoco", file, GREFS)
    found = masks(build_source("grefcoco|unc|train", tmp_path)[0])
    assert list(found) == ["Both Things", "the line", "a hat"]
    both, line = found["Both Things"], found["the line"]
    assert both.dtype == bool and both.sum() == 9 + 16 and both[2, 2] and both[6, 7] and not both[2, 7]
    assert line.sum() == 4 and line[:4, 2].all(), "plain run lengths, down the columns"
    assert found["a hat"] is None


def test_the_pickle_wins_over_the_json(tmp_path):
    write(tmp_path, "grefcoco", "grefs(unc).json", GREFS)
    write(tmp_path, "grefcoco", "grefs(unc).p", GREFS[:1])
    assert len(build_source("grefcoco", tmp_path)[0].targets) == 1


def test_compressed_runs_do_as_well(tmp_path):
    from utils.masks import encode_rle, rle_to_mask

    packed = encode_rle(rle_to_mask(RUNS, SIZE))
    write(tmp_path, "grefcoco", "grefs(unc).json", GREFS, lambda d: d["annotations"][2].update(segmentation=packed))
    assert masks(build_source("grefcoco", tmp_path)[0])["the line"][:4, 2].all()


@pytest.mark.parametrize("entry", [ref(3, [1], "x", no_target=True), ref(3, [-1], "x", no_target=False)])
def test_a_no_target_flag_that_contradicts_is_an_error(tmp_path, entry):
    write(tmp_path, "grefcoco", "grefs(unc).json", [entry])
    with pytest.raises(ValueError, match=r"grefs\(unc\)\.json: ref 3: no_target is (True|False), but ann_id is"):
        build_source("grefcoco", tmp_path)


@pytest.mark.parametrize("annotations", [[-1, 1], [7], -1])
def test_unknown_annotations_are_not_no_target(tmp_path, annotations):
    write(tmp_path, "grefcoco", "grefs(unc).json", [ref(3, annotations, "x")])
    with pytest.raises(ValueError, match=r"ref 3: names annotation (-1|7), which is not in"):
        build_source("grefcoco", tmp_path)


def broken(data):
    data["annotations"][0]["segmentation"] = [LEFT, [1, 1, 2, 2], [1, 2, 3, 4, 5, 6, 7]]


def test_broken_polygons_are_left_out_and_said_or_refused(tmp_path, caplog):
    write(tmp_path, "grefcoco", "grefs(unc).json", GREFS, broken)
    assert masks(build_source("grefcoco", tmp_path)[0])["Both Things"].sum() == 25
    assert "left out 2 broken polygons of split train" in caplog.text
    strict = build_source("grefcoco", tmp_path, bad_polygons="raise")[0]
    with pytest.raises(ValueError, match=r"annotation 1, 2 \(ref 1\): polygon 1 has 4 numbers"):
        strict.targets[0].mask()
    with pytest.raises(ValueError, match="no bad_polygons of grefcoco unc 'keep'; have: drop, raise"):
        build_source("grefcoco", tmp_path, bad_polygons="keep")


@pytest.mark.parametrize("file", ["Ref_ZOM.p", "Ref-ZOM(final).p", "refs(final).p"])
def test_refzom_reads_both_halves_of_coco(tmp_path, file):
    refs = [
        ref(1, [1, 2], "both", split="test"),
        ref(2, [], "nothing", split="test", image=2, source="zero"),
        ref(3, 1, "one", split="test"),
    ]
    write(tmp_path, "refzom", file, refs, halves=("train2014", "val2014"))
    source = build_source("refzom|final|test", tmp_path)
    assert [source[i].image.parent.name for i in (0, 1)] == ["train2014", "val2014"]
    assert [str(source[i].image) for i in (0, 1)] == source.image_paths()
    assert {phrase: mask is not None and mask.sum() for phrase, mask in masks(source[0]).items()} == {
        "both": 25,
        "one": 9,
    }
    assert masks(source[1]) == {"nothing": None}
    with pytest.raises(ValueError, match="refzom has no split_by 'unc'; have: final"):
        build_source("refzom|unc|test", tmp_path)


def test_val2014_pictures_linked_into_train2014_do(tmp_path):
    write(tmp_path, "refzom", "Ref_ZOM.p", [ref(2, [], "nothing", image=2)], halves=("train2014", "val2014"))
    folder = tmp_path / "refer_seg" / HALVES
    name = f"COCO_val2014_{2:012d}.jpg"
    os.rename(folder / "val2014" / name, folder / "train2014" / name)
    assert build_source("refzom", tmp_path)[0].image == folder / "train2014" / name


# --- false premises

FP = "refs(berkeley_exclude_unified).p"


def false(text: str, value, truth="") -> dict:
    return {"sent": text, "is_false_premise": value, "gt_sent": truth}


def test_false_premises_are_absent_and_carry_their_correction(tmp_path):
    entry = ref(1, 1, false("the cat", True, " The Dog "), false("the dog", False), false("a bird", True))
    write(tmp_path, "fprefcoco", FP, [entry])
    cat, dog, bird = build_source("fprefcoco|berkeley_exclude_unified|train", tmp_path)[0].targets
    assert (cat.mask, cat.correction) == (None, "The Dog")
    assert dog.mask().sum() == 9 and dog.correction is None
    assert (bird.mask, bird.correction) == (None, None), "nothing is said instead"


@pytest.mark.parametrize(
    ("exist", "there"), [(True, True), (False, False), (0, False), ("True", True), ("false", False)]
)
def test_exist_tells_in_the_negative_sets(tmp_path, exist, there):
    write(
        tmp_path, "R-refcocog", "refs(umd_exclude_unified).p", [ref(1, 1, {"sent": "a cat", "exist": exist}, "a dog")]
    )
    cat, dog = build_source("R-refcocog", tmp_path)[0].targets
    assert (cat.mask is not None) == there and dog.mask is not None, "without the key a sentence is true"


def test_is_false_premise_wins_over_exist(tmp_path):
    write(tmp_path, "fprefcoco+", FP, [ref(1, 1, {**false("x", True, "y"), "exist": True})])
    assert build_source("fprefcoco+", tmp_path)[0].targets[0].mask is None


@pytest.mark.parametrize("value", ["perhaps", 2, None, []])
def test_a_flag_that_is_neither_is_an_error(tmp_path, value):
    write(tmp_path, "fprefcocog", FP, [ref(5, 1, false("x", value))])
    with pytest.raises(ValueError, match=r"ref 5: sentence 'x': is_false_premise is .*; expected true or false"):
        build_source("fprefcocog", tmp_path)


def test_original_sets_take_no_notice_of_flags(tmp_path):
    write(tmp_path, "refcoco", "refs(unc_exclude_unified).p", [ref(1, 1, {"sent": "x", "exist": False})])
    assert build_source("refcoco|unc_exclude_unified|train", tmp_path)[0].targets[0].mask is not None


def test_two_annotations_of_one_id_are_an_error(tmp_path):
    write(tmp_path, "grefcoco", "grefs(unc).json", GREFS, lambda data: data["annotations"][1].update(id=1))
    with pytest.raises(ValueError, match=r"instances.json: annotations\[1\]: the id 1 is given twice"):
        build_source("grefcoco", tmp_path)


def test_a_sentence_that_is_no_text_is_an_error(tmp_path):
    write(tmp_path, "grefcoco", "grefs(unc).json", [ref(4, [1], {"sent": 5})])
    with pytest.raises(ValueError, match="ref 4: a sentence is 5; expected text"):
        build_source("grefcoco", tmp_path)


@pytest.mark.parametrize("sides", [(0, 12), (10, None), ("10", 12), (10.5, 12)])
def test_a_picture_needs_a_size(tmp_path, sides):
    edit = lambda data: data["images"][0].update(zip(("height", "width"), sides, strict=True))  # noqa: E731
    write(tmp_path, "grefcoco", "grefs(unc).json", GREFS, edit)
    with pytest.raises(ValueError, match="image 1: height and width must be whole numbers above 0"):
        build_source("grefcoco", tmp_path)


@pytest.mark.parametrize(("name", "file"), [("grefcoco", "grefs(unc).p"), ("refzom", "Ref_ZOM.p"), ("fprefcoco", FP)])
def test_a_pickle_with_code_is_refused(tmp_path, name, file):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = write(tmp_path, name, file, [])
    (folder / file).write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(ValueError, match=r"\.p: refused, the pickle asks for posix\.mkdir"):
        build_source(name, tmp_path)
    assert not (tmp_path / "pwned").exists()
