"""Data of one's own: folders of label maps and files of queries; the recipes of the guide."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.readers.index import keeping_faults
from data.sources import build_source
from data.sources.semantic import read_label_map
from data.types import Claim, Query
from evaluation.metrics import SCORERS
from evaluation.protocols import Reply
from evaluation.suites import find_suites
from systems.base import build_system
from utils.config import Recipe, from_dict
from utils.images import read_image
from utils.masks import encode_rle

SIZE = (10, 12)
BOX, OTHER = [1, 1, 4, 1, 4, 4, 1, 4], [6, 5, 10, 5, 10, 9, 6, 9]


def put(path: Path, size=SIZE, **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path, **save)
    return path


def put_map(path: Path, values) -> np.ndarray:
    """A label map whose columns hold `values` in turn."""
    labels = np.resize(np.array(values, np.uint8), SIZE[1])[None].repeat(SIZE[0], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    return labels


def sums(record) -> dict:
    return {target.phrase: target.mask and int(target.mask().sum()) for target in record.targets}


# --- folder


def a_folder(root: Path, lines: str, values, split="") -> np.ndarray:
    put(root / "mine/images" / split / "photo 1 ü.jpg")
    labels = put_map(root / "mine/masks" / split / "photo 1 ü.png", values)
    (root / "mine/classes.txt").write_text(lines, encoding="utf-8")
    return labels


@pytest.mark.parametrize(
    ("lines", "values", "named"),
    [
        ("Wall\nred cup\n\n", (0, 1, 1, 255), {"wall": 0, "red cup": 1}),
        ("1: wall\n2: red cup", (0, 1, 2, 255), {"wall": 1, "red cup": 2}),
        ("255: cup", (0, 255), {"cup": 255}),
    ],
)
def test_a_folder_of_label_maps(tmp_path, lines, values, named):
    labels = a_folder(tmp_path, lines, values)
    record = build_source("folder", tmp_path, folder="mine")[0]
    assert record.kind == "classes" and record.image.name == "photo 1 ü.jpg"
    masks = {target.phrase: target.mask() for target in record.targets}
    assert masks.keys() == named.keys()
    assert all(np.array_equal(masks[name], labels == value) for name, value in named.items())
    known = [*named.values(), *(() if len(named) > 1 else (0,))]  # with a single class, 0 is background
    assert np.array_equal(record.ignore(), ~np.isin(labels, known))


def test_background_is_known_to_be_no_class(tmp_path):
    """What a mask covers of it is wrong, and a map without anything else says that nothing is there."""
    labels = a_folder(tmp_path, "1: cup\n2: plate", (0, 1, 2, 255))
    options = {"folder": "mine", "classes": ["cup"], "background": 0}
    record = build_source("folder", tmp_path, **options)[0]
    assert np.array_equal(record.ignore(), np.isin(labels, (2, 255))), "other classes are void, as ever"
    whole = Reply("cup", (Claim("cup", 0),), torch.ones(1, *labels.shape))
    scorer = SCORERS["semantic"]()
    scorer.add(SCORERS["semantic"].count(record, [Query("q", (), (0,), ("cup",))], [whole], "generate"))
    figures = {figure.metric: figure.value for figure in scorer.figures() if figure.variant == "standard"}
    assert figures["mIoU"] == pytest.approx((labels == 1).sum() / np.isin(labels, (0, 1)).sum())
    put_map(tmp_path / "mine/masks/photo 1 ü.png", (0,))
    empty = build_source("folder", tmp_path, **options)[0]
    assert not empty.targets and not empty.ignore().any() and build_system("lasagna").task.queries(empty)
    with pytest.raises(ValueError, match=r"background: .*classes\.txt gives the value 2 a name, 'plate'"):
        build_source("folder", tmp_path, folder="mine", background=2)


def test_splits_of_a_folder_and_the_dataset_folder_itself(tmp_path):
    a_folder(tmp_path, "a", (0,), "val")
    assert len(build_source("folder|val", tmp_path, folder="mine")) == 1
    assert len(build_source("folder", tmp_path / "mine", split="val")) == 1
    with pytest.raises(FileNotFoundError, match=r"(?s)folder mine not found.*mine/images/train"):
        build_source("folder|train", tmp_path, folder="mine")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("", "classes.txt: names no class"),
        ("1: a\nb", "'b' has no value, other lines have"),
        ("a", "unknown label values 7"),
    ],
)
def test_bad_folders_say_what(tmp_path, lines, says):
    a_folder(tmp_path, lines, (0, 7))
    with pytest.raises(ValueError, match=says):
        build_source("folder", tmp_path, folder="mine")[0]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("__ignore__\n_background_\ncup", "labelme counts '__ignore__' as -1"),
        ("cup 1\nplate 2", "'cup 1' ends with a number; write `value: name`"),
    ],
)
def test_class_lists_of_other_programs_are_no_names_in_order(tmp_path, lines, says):
    a_folder(tmp_path, lines, (0, 1))
    with pytest.raises(ValueError, match=says):
        build_source("folder", tmp_path, folder="mine")


def test_names_may_end_with_numbers(tmp_path):
    a_folder(tmp_path, "zone 1\nzone 2", (0, 1))
    assert build_source("folder", tmp_path, folder="mine").vocabulary == ("zone 1", "zone 2")


# Label maps that were stored as images


def test_a_palette_that_renumbers_greys_is_refused_and_colours_are_not(tmp_path):
    grey = np.resize(np.array((0, 3, 7), np.uint8), (6, 6))
    Image.fromarray(grey).save(tmp_path / "grey.gif")  # Pillow numbers the greys that occur
    black = np.zeros((6, 6, 3), np.uint8)
    black[1:3, 1:3] = 255
    Image.fromarray(black).quantize(2).save(tmp_path / "inverted.png")
    for name in ("grey.gif", "inverted.png"):
        with pytest.raises(ValueError, match=rf"{name}: a palette of greys numbers them otherwise"):
            read_label_map(tmp_path / name)
    for name, colours in (
        ("voc.png", [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 128]),
        ("black_first.png", [0] * 3 + [255] * 3),
    ):
        image = Image.fromarray(np.resize(np.array((0, 1), np.uint8), (6, 6)), "P")
        image.putpalette(colours)
        image.save(tmp_path / name)
        assert set(np.unique(read_label_map(tmp_path / name))) == {0, 1}


def test_a_tiff_in_which_0_is_white_keeps_its_values(tmp_path):
    labels = np.resize(np.array((0, 1, 255), np.uint8), (6, 6))
    Image.fromarray(labels).save(tmp_path / "a.tif")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    at = data.find(b"\x06\x01\x03\x00\x01\x00\x00\x00")  # tag 262, one short
    data[at + 8] = 0
    (tmp_path / "a.tif").write_bytes(data)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "a.tif")), labels), "Pillow shows shades"
    assert np.array_equal(read_label_map(tmp_path / "a.tif"), labels)


# --- jsonl


def test_lines_that_ask_the_same_are_one_target(tmp_path):
    lines(
        tmp_path,
        {**PHRASE, "phrase": "Red  cup", "polygons": [BOX]},
        {**PHRASE, "phrase": "red cup", "polygons": [OTHER]},
        {**PHRASE, "image": "./a b é.jpg", "phrase": "the sky", "polygons": [BOX]},
    )
    (record,) = opened(tmp_path)
    assert len(record.targets) == 2 and record.targets[0].mask().sum() == 9 + 16 == sums(record)["Red  cup"]
    lines(
        tmp_path, {**PHRASE, "polygons": [BOX]}, {**PHRASE, "image": "./a b é.jpg", "phrase": "The cup", "mask": None}
    )
    with pytest.raises(ValueError, match=r"line 2 says that 'the cup' is not in a b é\.jpg .*line 1 says where"):
        opened(tmp_path)
    lines(tmp_path, json.dumps([PHRASE]))
    with pytest.raises(ValueError, match=r"queries\.jsonl: holds a JSON list; write one object per line"):
        opened(tmp_path)


def test_a_name_in_another_unicode_form_is_pointed_out(tmp_path):
    lines(tmp_path, {**PHRASE, "image": unicodedata.normalize("NFD", "a b é.jpg"), "polygons": [BOX]})
    with pytest.raises(FileNotFoundError, match="one of the same letters in another Unicode form is there"):
        opened(tmp_path)[0]


def lines(root: Path, *entries) -> Path:
    put(root / "mine/a b é.jpg")
    path = root / "mine/queries.jsonl"
    text = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def opened(root: Path, **options):
    return build_source("jsonl", root, file="mine/queries.jsonl", **options)


PHRASE = {"image": "a b é.jpg", "phrase": "the cup"}
QUESTION = {"image": "a b é.jpg", "question": "What holds tea?"}


def test_queries_give_masks_in_every_form(tmp_path):
    labels = put_map(tmp_path / "mine/masks/1.png", (0, 0, 9))
    square = np.zeros(SIZE, bool)
    square[2:4, 3:9] = True
    lines(
        tmp_path,
        {**PHRASE, "polygons": [BOX, OTHER]},
        "",
        {**PHRASE, "phrase": " Die Tür ", "rle": encode_rle(square)},
        {**PHRASE, "phrase": "runs", "rle": {"size": [10, 12], "counts": [20, 4, 96]}},
        {**PHRASE, "phrase": "file", "mask": "masks/1.png"},
        {**PHRASE, "phrase": "the blue cup", "mask": None, "answer": "the red cup"},
        {**PHRASE, "phrase": "a dog", "polygons": None},
    )
    source = opened(tmp_path)
    assert len(source) == 1 and source[0].kind == "refer" and source[0].dialogues == ()
    expected = {"the cup": 25, "Die Tür": 12, "runs": 4, "file": int((labels > 0).sum())}
    assert sums(source[0]) == {**expected, "the blue cup": None, "a dog": None}
    assert [target.correction for target in source[0].targets[-2:]] == ["the red cup", None]
    assert source.image_paths() == [str(tmp_path / "mine/a b é.jpg")]


def test_questions_and_explanations_are_records_of_their_own(tmp_path):
    lines(
        tmp_path,
        {**PHRASE, "polygons": [BOX]},
        {**QUESTION, "polygons": [BOX], "answer": "The cup does."},
        {**QUESTION, "polygons": [OTHER]},
        {**QUESTION, "question": "What barks?", "rle": None, "answer": "There is no dog."},
        {**PHRASE, "phrase": "thing for tea", "polygons": [BOX], "answer": "It is the cup."},
    )
    source = opened(tmp_path)
    found = [(r.kind, [t.phrase for t in r.targets]) for r in (source[i] for i in range(len(source)))]
    assert found == [
        ("refer", ["the cup"]), ("reason", ["What holds tea?"]), ("reason", ["What holds tea?", "What barks?"]),
        ("phrase", ["thing for tea"]),
    ]  # fmt: skip
    ((turn,),) = source[1].dialogues
    assert (turn.question, turn.answer) == ("What holds tea?", ("The cup does.",))
    assert source[2].dialogues == () and source[2].targets[1].correction == "There is no dog."


def test_pictures_may_be_elsewhere(tmp_path):
    lines(tmp_path, {**PHRASE, "image": "x.jpg", "polygons": [BOX]})
    put(tmp_path / "photos/x.jpg")
    assert opened(tmp_path, images="photos")[0].image == tmp_path / "photos/x.jpg"


def test_lines_about_one_thing_have_the_union_of_their_shapes(tmp_path):
    labels = put_map(tmp_path / "mine/masks/1.png", (0, 0, 9))
    lines(
        tmp_path,
        {**PHRASE, "polygons": [BOX]},
        {**PHRASE, "phrase": "one", "polygons": [OTHER]},
        {**PHRASE, "phrase": " the cup ", "polygons": [OTHER]},
        {**PHRASE, "mask": "masks/1.png", "answer": "They hold tea."},
    )
    source = opened(tmp_path)
    whole = labels > 0
    whole[1:4, 1:4] = whole[5:9, 6:10] = True
    plain, explained = source[0], source[1]
    assert sums(plain) == {"the cup": int(whole.sum()), "one": 16}
    assert explained.kind == "phrase" and sums(explained) == {"the cup": int(whole.sum())}
    assert {path.name for path in source.annotation_paths()} == {"queries.jsonl", "1.png"}


def test_a_union_without_one_of_its_shapes_is_skipped(tmp_path):
    lines(tmp_path, {**PHRASE, "polygons": [BOX]}, {**PHRASE, "polygons": []}, {**QUESTION, "polygons": [OTHER]})
    with keeping_faults():
        source = opened(tmp_path)
    faults = []
    for index in range(len(source)):
        try:
            assert source[index].kind == "reason"
        except ValueError as error:
            faults.append(str(error))
    assert len(faults) == 2 and "line 2: polygons must be" in faults[0] and "line 1: another line" in faults[1]


def test_questions_with_one_answer_each_keep_it(tmp_path):
    entry = {**QUESTION, "polygons": [BOX], "answer": "It is flat."}
    lines(tmp_path, entry, {**entry, "question": "What is level?"})
    source = opened(tmp_path)
    explained = [
        turn.question for record in (source[i] for i in range(len(source))) for ((turn,),) in [record.dialogues]
    ]
    assert explained == ["What holds tea?", "What is level?"]


@pytest.mark.parametrize("text", [PHRASE, QUESTION])
@pytest.mark.parametrize("here", [{"polygons": [BOX]}, {"polygons": [BOX], "answer": "Because."}, {"mask": "1.png"}])
@pytest.mark.parametrize("absent", [{"mask": None}, {"rle": None, "answer": "Nothing."}])
@pytest.mark.parametrize("swap", [False, True])
def test_lines_that_contradict_each_other_are_a_fault_of_both(tmp_path, text, here, absent, swap):
    first, second = ({**text, **here}, {**text, **absent})[:: -1 if swap else 1]
    lines(tmp_path, first, {**text, "image": "other.jpg", "mask": None}, second)
    with pytest.raises(ValueError) as caught:
        opened(tmp_path)
    assert all(words in str(caught.value) for words in ("line 1", "line 3", "is not in a b é.jpg"))
    with keeping_faults():
        source = opened(tmp_path)
    assert sorted(Path(path).name for path in source.image_paths()) == ["a b é.jpg", "other.jpg"]
    with pytest.raises(ValueError, match="line 3"):
        source[0]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ('{"image": "a', "line 2: not valid JSON, perhaps cut off"),
        ("[1]", "line 2: not an object; a line has image, phrase"),
        ({**PHRASE, "polygon": [BOX]}, "line 2: unknown polygon; a line has image, phrase, question, polygons"),
        (PHRASE, "line 2: give one of polygons, rle, mask; it has none"),
        ({**PHRASE, "mask": None, "rle": None}, "line 2: give one of polygons, rle, mask; it has rle and mask"),
        ({**PHRASE, **QUESTION, "mask": None}, "line 2: give one of phrase, question; it has phrase and question"),
        ({**PHRASE, "phrase": " ", "mask": None}, "line 2: phrase must be text, got ' '"),
        ({**PHRASE, "mask": None, "answer": 5}, "line 2: answer must be text, got 5"),
        ({"phrase": "x", "mask": None}, "line 2: image must be text, got None"),
    ],
)
def test_bad_lines_say_which(tmp_path, entry, says):
    lines(tmp_path, {**PHRASE, "mask": None}, entry)
    with pytest.raises(ValueError, match=rf"queries.jsonl: {says}"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"polygons": [[1, 1, 2, 2]]}, "polygon 0 has 4 numbers"),
        ({"polygons": BOX}, "polygon 0 has 1; a polygon is x, y"),
        ({"rle": {"size": [12, 10], "counts": [120]}}, r"of size \[12, 10\]"),
        ({"mask": "../x.png"}, "the path '../x.png' leaves"),
        ({"mask": "small.png"}, r"small.png is \(4, 5\), the image \(H, W\) \(10, 12\)"),
        ({"mask": "color.png"}, "a label map has one channel"),
    ],
)
def test_bad_masks_say_which_line(tmp_path, shape, says):
    lines(tmp_path, {**PHRASE, **shape})
    Image.fromarray(np.ones((4, 5), bool)).save(tmp_path / "mine/small.png")
    put(tmp_path / "mine/color.png")
    with pytest.raises(ValueError, match=rf"(queries.jsonl: line 1|color.png): .*{says}"):
        opened(tmp_path)[0].targets[0].mask()


def test_an_empty_file_and_a_missing_one(tmp_path):
    lines(tmp_path, "")
    with pytest.raises(ValueError, match=r"queries.jsonl: holds no line"):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"file of jsonl: there is no .*none.jsonl"):
        build_source("jsonl", tmp_path, file="none.jsonl")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_masks_fit_a_picture_that_its_exif_turns(tmp_path, orientation):
    lines(tmp_path, {**PHRASE, "polygons": [BOX]})
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(tmp_path / "mine/a b é.jpg", exif=exif)
    record = opened(tmp_path)[0]
    assert (
        record.targets[0].mask().shape
        == read_image(record.image).shape[:2]
        == (SIZE if orientation < 5 else SIZE[::-1])
    )


def test_a_picture_of_one_pixel(tmp_path):
    lines(
        tmp_path,
        {**PHRASE, "polygons": [[0, 0, 1, 0, 1, 1, 0, 1]]},
        {**PHRASE, "rle": {"size": [1, 1], "counts": [0, 1]}},
    )
    put(tmp_path / "mine/a b é.jpg", (1, 1))
    for target in opened(tmp_path)[0].targets:
        assert target.mask().tolist() == [[True]]


# --- the guide

GUIDE = Path(__file__).parents[1] / "docs/your_data.md"


def recipes() -> list[str]:
    return [block.split("```")[0] for block in GUIDE.read_text(encoding="utf-8").split("```yaml\n")[1:]]


def test_the_recipes_of_the_guide_are_short_and_valid():
    sources, suites = set(), []
    for text in recipes():
        assert len(text.splitlines()) <= 10
        values = yaml.safe_load(text)
        recipe = from_dict(Recipe, {key: value for key, value in values.items() if key != "base"})
        sources |= {entry.source for mix in recipe.data.mixture for entry in mix.sets}
        if recipe.eval.custom:
            suites += find_suites([*recipe.eval.suites, "custom"], recipe.eval.custom)
    assert sources == {"coco", "folder", "jsonl"}
    assert [suite.name for suite in suites] == ["kitchen", "asked"]
