"""MUSE in tiny files: texts with holes, objects without text, every spelling of the files and of the images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import build_source
from data.types import Mask
from utils.masks import encode_rle

SIZE = (10, 12)
BOX, OTHER = [1, 1, 4, 1, 4, 4, 1, 4], [6, 5, 10, 5, 10, 9, 6, 9]
URL = "http://images.cocodataset.org"


def thing(name: str, segmentation, rephrased: str | None = None) -> dict:
    named = {"rephrased_name": rephrased} if rephrased is not None else {}
    return {"category_id": 1, "category_name": name, "bbox": [0, 0, 1, 1], "segmentation": segmentation, **named}


CUP = thing("cup", [BOX], "the red cup")
CAN = thing("trash_can", {"size": [10, 12], "counts": [20, 4, 96]})
DOOR = thing("mouse_(computer_equipment)", [BOX, BOX, OTHER], " ")


def entry(questions=("where?",), answers=((CUP, CAN),), texts=("a {seg} and b {seg}.",), url="train2017/1.jpg", **own):
    told = {"questions": list(questions), "answers": [list(a) for a in answers], "text_answers": texts and list(texts)}
    return {"height": SIZE[0], "width": SIZE[1], "coco_url": f"{URL}/{url}", "ann_list": [CUP], **told, **own}


def write(root: Path, *entries: dict, file="muse/muse_train.json", images="refer_seg/images/mscoco/images") -> Path:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(entries))
    for name in ("train2017/1.jpg", "val2017/2.jpg", "train2014/COCO_train2014_3.jpg"):
        (root / images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(root / images / name)
    return root / file


def test_text_answers_become_scripts_and_objects_targets(tmp_path):
    two = entry(("where?", " what {x}? "), ((CUP, CAN), (DOOR,)), ("a {seg} and {b} {seg}.", "{seg}"))
    write(tmp_path, two)
    record = build_source("muse", tmp_path)[0]
    assert record.kind == "multi" and not record.vocabulary
    ((first,), (second,)) = record.dialogues
    assert (first.question, first.answer) == ("where?", ("a ", Mask(0), " and {b} ", Mask(1), ".")), "other braces stay"
    assert (second.question, second.answer) == ("what {x}?", (Mask(2),))
    assert [(t.phrase, t.aliases) for t in record.targets] == [
        ("the red cup", ("cup",)),
        ("trash can", ()),
        ("mouse", ()),
    ]
    assert [int(t.mask().sum()) for t in record.targets] == [9, 4, 25], "overlapping polygons are not counted twice"


def test_names_of_categories_are_plain_or_as_published(tmp_path):
    lamp = thing("lamp_(furniture)", [BOX], "the red lamp")
    write(tmp_path, entry(answers=((lamp, CAN),)))
    for names, expected in (
        ("plain", [("the red lamp", "lamp"), ("trash can",)]),
        ("published", [("the red lamp", "lamp_(furniture)"), ("trash_can",)]),
    ):
        for _ in range(2):  # also from the index
            targets = build_source("muse", tmp_path, names=names)[0].targets
            assert [(target.phrase, *target.aliases) for target in targets] == expected
    with pytest.raises(ValueError, match=r"no names of muse 'pretty'; have: plain, published"):
        build_source("muse", tmp_path, names="pretty")


@pytest.mark.parametrize("texts", [None, (None,)])
def test_without_text_an_answer_is_its_holes(tmp_path, texts):
    write(tmp_path, entry(texts=texts))
    assert build_source("muse", tmp_path)[0].dialogues[0][0].answer == (Mask(0), Mask(1))


@pytest.mark.parametrize("file", ["muse/muse_{}.json", "muse_{}.json", "muse/MUSE_{}.json", "MUSE_{}.json"])
@pytest.mark.parametrize("split", ["train", "val", "test_less", "test_few", "test_many"])
def test_every_spelling_of_the_files(tmp_path, file, split):
    write(tmp_path, entry(), file=file.format(split.replace("few", "less")))
    for name in ("muse", "MultiReasonSeg"):
        assert len(build_source(f"{name}|{split}", tmp_path)) == 1
    with pytest.raises(ValueError, match="no split of muse 'test'"):
        build_source("muse|test", tmp_path)


@pytest.mark.parametrize("images", ["refer_seg/images/mscoco/images", "images/mscoco/images", "coco"])
def test_pictures_of_every_year_in_every_place(tmp_path, images):
    entries = entry(), entry(url="val2017/2.jpg"), entry(file_name="COCO_train2014_3.jpg")
    write(tmp_path, *entries, images=images)
    source = build_source("muse", tmp_path)
    names = ["train2017/1.jpg", "val2017/2.jpg", "train2014/COCO_train2014_3.jpg"]
    assert [source[i].image for i in range(3)] == [tmp_path / images / name for name in names]
    assert source.image_paths() == [str(tmp_path / images / name) for name in names]


def test_what_cannot_be_asked_is_left_out_and_said(tmp_path, caplog):
    uneven = entry(("q", "where?"), ((CUP,), (CUP,)), ("{seg} {seg}", "{seg}"))
    nothing = entry((), (), ())
    empty = entry(answers=((),), texts=("none",))
    write(tmp_path, uneven, nothing, empty, {**nothing, "questions": None}, entry())
    source = build_source("muse", tmp_path)
    assert [len(source[i].dialogues) for i in range(len(source))] == [1, 1]
    assert "left out 3 images without a question, 1 uneven answers" in caplog.text


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (entry(("a", "b")), "entry 0: 2 questions, 1 answers, 1 text answers"),
        (entry(height=0), "entry 0: height and width must be"),
        (entry(answers=(({"segmentation": []}, CUP),)), r"entry 0: answers\[0\]: no 'category_name'"),
        (entry(url="x", coco_url=None, file_name="../../x.jpg"), "entry 0: the path 'train2014/../../x.jpg' leaves"),
    ],
)
def test_bad_entries_say_where(tmp_path, bad, says):
    write(tmp_path, bad)
    with pytest.raises(ValueError, match=says):
        build_source("muse", tmp_path)[0]


def test_bad_shapes_and_missing_pictures_say_where(tmp_path):
    wrong = thing("cup", encode_rle(np.ones((12, 10), bool)))
    write(tmp_path, entry(answers=((CUP, wrong),)), entry(url="train2017/none.jpg"))
    source = build_source("muse", tmp_path)
    with pytest.raises(ValueError, match=r"entry 0: question 0: answer 1: the RLE is of size \[12, 10\]"):
        source[0].targets[1].mask()
    with pytest.raises(FileNotFoundError, match=r"entry 1: no image train2017/none.jpg in"):
        source[1]


def test_a_truncated_or_strange_file_names_itself(tmp_path):
    path = write(tmp_path, entry())
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"muse_train.json: not valid JSON, perhaps cut off"):
        build_source("muse", tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"muse_train.json: expected a list of images, got dict"):
        build_source("muse", tmp_path)
