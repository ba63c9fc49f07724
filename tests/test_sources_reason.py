"""ReasonSeg and LLaVA-Instruct read from tiny real layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import build_source
from data.types import Turn

SIZE = (20, 30)
BOX = [[5.9, 5], [15, 5], [15, 15], [5, 15]]


def shape(label: str, points=BOX) -> dict:
    return {"label": label, "labels": [label], "shape_type": "polygon", "image_name": "x.jpg", "points": points}


def put(root: Path, stem="a", split="train", base="reason_seg/ReasonSeg", encoding="utf-8", **changes) -> Path:
    folder = root / base / split
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / f"{stem}.jpg")
    entry = {"text": ["What swims here?", "the swimmer"], "is_sentence": True, "shapes": [shape("target")], **changes}
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(entry, ensure_ascii=False), encoding=encoding)
    return path


@pytest.mark.parametrize("base", ["reason_seg/ReasonSeg", "ReasonSeg"])
def test_every_text_has_the_same_mask(tmp_path, base):
    put(tmp_path, base=base)
    record = build_source("ReasonSeg|train", tmp_path)[0]
    assert record.kind == "reason" and record.dialogues == () and record.image.name == "a.jpg"
    assert [target.phrase for target in record.targets] == ["What swims here?", "the swimmer"]
    assert record.targets[0].mask is record.targets[1].mask
    expected = np.zeros(SIZE, bool)
    expected[5:16, 5:16] = True
    assert np.array_equal(record.targets[0].mask(), expected) and not record.ignore().any()


def test_a_phrase_has_its_own_kind_and_only_the_first_may_be_asked(tmp_path):
    put(tmp_path, is_sentence=False)
    assert build_source("ReasonSeg", tmp_path)[0].kind == "phrase"
    record = build_source("ReasonSeg", tmp_path, texts="first")[0]
    assert [target.phrase for target in record.targets] == ["What swims here?"]


def test_false_premises_have_a_flag_of_their_own_and_make_a_pair(tmp_path):
    questions = [["What flies here?", True, "Nothing."], ["the Sun", False, "No sun."], ["a bird", "false", "None."]]
    put(tmp_path, false_premise_QA=questions)
    true, _, *false = build_source("ReasonSeg", tmp_path)[0].targets
    assert [(t.phrase, t.sentence, t.correction, t.mask) for t in false] == [
        ("What flies here?", True, "Nothing.", None),
        ("the Sun", False, "No sun.", None),
        ("a bird", False, "None.", None),
    ]
    assert true.sentence is None, "the record's kind says it of true ones"
    for texts in ("first", "pair"):
        pair = build_source("ReasonSeg", tmp_path, texts=texts)[0].targets
        assert [target.phrase for target in pair] == ["What swims here?", "What flies here?"]
    for empty in ({"false_premise_QA": []}, {}):
        put(tmp_path, **empty)
        with pytest.raises(ValueError, match=r"a\.json: 'false_premise_QA' has no question to pair"):
            build_source("ReasonSeg", tmp_path, texts="pair")[0]
        assert len(build_source("ReasonSeg", tmp_path, texts="first")[0].targets) == 1


def test_flag_is_not_drawn_and_ignore_is_kept_apart(tmp_path):
    inner = [[8, 8], [10, 8], [10, 10], [8, 10]]
    put(tmp_path, shapes=[shape("Ignore_1", inner), shape("target"), shape("FLAG", [[0, 0], [29, 0], [29, 19]])])
    record = build_source("ReasonSeg", tmp_path)[0]
    assert record.ignore().sum() == 9 and record.targets[0].mask().sum() == 121 - 9


def test_no_shapes_is_an_empty_mask(tmp_path):
    put(tmp_path, shapes=[])
    assert not build_source("ReasonSeg", tmp_path)[0].targets[0].mask().any()


def test_splits_are_joined_and_derived_files_left_alone(tmp_path):
    for stem, split in (("b", "train"), ("a", "train"), ("c", "val")):
        put(tmp_path, stem, split)
    put(tmp_path, "a_new")
    (tmp_path / "reason_seg/ReasonSeg/train/a_new.jpg").unlink()
    source = build_source("ReasonSeg|train_val", tmp_path)
    assert [source[i].image.name for i in range(len(source))] == ["a.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(FileNotFoundError, match="ReasonSeg test not found"):
        build_source("ReasonSeg|train_test", tmp_path)


def test_cp1252_is_the_second_try(tmp_path):
    put(tmp_path, text=["Où est le café “chaud”?"], encoding="cp1252")
    put(tmp_path, "b", text=["Où est 咖啡?"], encoding="utf-8")
    source = build_source("ReasonSeg", tmp_path)
    assert [source[i].targets[0].phrase for i in (0, 1)] == ["Où est le café “chaud”?", "Où est 咖啡?"]


def test_explanations_come_as_dialogues(tmp_path):
    put(tmp_path)
    put(tmp_path, "b")
    assert build_source("ReasonSeg", tmp_path, explanations=None)[0].dialogues == ()
    with pytest.raises(FileNotFoundError, match=r"(?s)explanations of ReasonSeg.*explanatory/train.json"):
        build_source("ReasonSeg", tmp_path, explanations=True)
    path = tmp_path / "reason_seg/ReasonSeg/explanatory/train.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"image": "b.jpg", "query": "What swims?", "outputs": "A fish swims."}]))
    source = build_source("ReasonSeg", tmp_path)
    assert source[0].dialogues == () and source[1].dialogues == ((Turn("What swims?", ("A fish swims.",)),),)
    assert build_source("ReasonSeg", tmp_path, explanations=False)[1].dialogues == ()


def test_the_mask_has_the_size_of_the_turned_picture(tmp_path):
    path = put(tmp_path).with_suffix(".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path, exif=exif)
    assert build_source("ReasonSeg", tmp_path)[0].targets[0].mask().shape == SIZE[::-1]


def test_partners_must_be_there(tmp_path):
    path = put(tmp_path)
    picture = path.with_suffix(".jpg")
    data = picture.read_bytes()
    picture.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.json has no partner .*a\.jpg"):
        build_source("ReasonSeg", tmp_path)
    picture.write_bytes(data)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg has no partner .*a\.json"):
        build_source("ReasonSeg", tmp_path)
    picture.unlink()
    with pytest.raises(FileNotFoundError, match="no images in"):
        build_source("ReasonSeg", tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": []}, "'text' must be a list of one or more queries"),
        ({"text": "one"}, "'text' must be a list"),
        ({"text": ["ok", " "]}, "'text' must be a list"),
        ({"shapes": [shape("target", [[90, 90], [99, 90], [99, 99]])]}, "lies outside the image"),
        ({"shapes": [{"label": "target"}]}, r"shapes\[0\]: no 'points'"),
        ({"shapes": [shape("target", [])]}, "a shape is"),
        ({"false_premise_QA": [["q", "a"]]}, r"false_premise_QA\[0\] must be \[question, true or false, answer\]"),
        ({"false_premise_QA": [[" ", True, "a"]]}, r"false_premise_QA\[0\] must be .*, got \[' ', True, 'a'\]"),
        ({"false_premise_QA": [["q", "long", "a"]]}, r"false_premise_QA\[0\]: the flag of a sentence is 'long'"),
    ],
)
def test_bad_entries_name_the_file(tmp_path, changes, says):
    put(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"a\.json: .*{says}"):
        build_source("ReasonSeg", tmp_path)[0].targets[0].mask()


def test_a_truncated_entry_and_a_damaged_picture_name_the_file(tmp_path):
    path = put(tmp_path)
    whole = path.read_text()
    path.write_text(whole[:-5])
    source = build_source("ReasonSeg", tmp_path)
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        source[0]
    path.write_text(whole)
    path.with_suffix(".jpg").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"cannot read image .*a\.jpg"):
        source[0]


def put_vqa(root: Path, entries: list[dict]) -> Path:
    (root / "llava_dataset").mkdir()
    (root / "coco/train2017").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / "coco/train2017/1.jpg")
    path = root / "llava_dataset/llava_instruct_150k.json"
    path.write_text(json.dumps(entries))
    return path


def entry(*said: str, image="1.jpg") -> dict:
    speakers = ("human", "gpt") * len(said)
    rounds = [{"from": speaker, "value": value} for speaker, value in zip(speakers, said, strict=False)]
    return {"id": "000", "image": image, "conversations": rounds}


def test_vqa_keeps_every_round_and_moves_the_picture_to_the_front(tmp_path):
    """lisa.md 4.5: only the turn that holds the placeholder is stripped."""
    put_vqa(tmp_path, [entry("What is it?\n<image>", " A cat. ", "Sure? ", "Yes.")])
    source = build_source("llava_instruct_150k", tmp_path)
    record = source[0]
    assert len(source) == 1 and record.kind == "vqa" and record.targets == ()
    assert record.dialogues == ((Turn("<image>\nWhat is it?", (" A cat. ",)), Turn("Sure? ", ("Yes.",))),)


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (entry("only a question"), ValueError, r"entry 1 \(id 000\): human and gpt must take turns"),
        (entry(), ValueError, "must take turns"),
        (entry("q", "a", image="../x.jpg"), ValueError, "the path '../x.jpg' leaves"),
        (entry("q", "a", image="2.jpg"), FileNotFoundError, r"entry 1 .*names the image '2.jpg'"),
    ],
)
def test_a_bad_dialogue_names_its_entry_and_spares_the_others(tmp_path, bad, error, says):
    put_vqa(tmp_path, [entry("q", "a"), bad])
    source = build_source("llava_instruct_150k", tmp_path)
    assert source[0].dialogues
    with pytest.raises(error, match=says):
        source[1]


def test_vqa_files_are_checked_at_the_door(tmp_path):
    path = put_vqa(tmp_path, [{"id": "1", "conversations": []}])
    with pytest.raises(ValueError, match="entry 0: no 'image'"):
        build_source("llava_instruct_150k", tmp_path)
    path.write_text("[")
    with pytest.raises(ValueError, match=r"llava_instruct_150k\.json: not valid JSON"):
        build_source("llava_instruct_150k", tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a list of dialogues"):
        build_source("llava_instruct_150k", tmp_path)
    with pytest.raises(ValueError, match="no split 'val'"):
        build_source("llava_instruct_150k|val", tmp_path)
