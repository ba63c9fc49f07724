"""Every layout that the toy world writes is read by the real sources: images, sizes, masks and words agree."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from data.sources import SOURCES, build_source
from data.sources.base import image_paths
from data.types import Mask
from toy.world.__main__ import main as make_toy_dataset

SEVERAL = (  # sources whose targets may be absent
    *(f"grefcoco|unc|{split}" for split in ("train", "val", "testA", "testB")),
    *(f"refzom|final|{split}" for split in ("train", "val", "test")),
    *(f"R-{name}|unc_exclude_unified|{split}" for name in ("refcoco", "refcoco+") for split in ("train", "val")),
    "R-refcocog|umd_exclude_unified|val",
    *(
        f"fp{name}|berkeley_exclude_unified|{s}"
        for name in ("refcoco", "refcoco+", "refcocog")
        for s in ("train", "val")
    ),
    *(f"ReasonSeg|{split}" for split in ("train", "val", "test", "train_val")),
    "coco refer",
    *(f"jsonl {split}" for split in ("train", "val")),
)
PARTS = ("paco_lvis|train", "paco_lvis|val", "pascal_part|train", "pascal_part|val", "partimagenet|test")
CLASSES = (
    *(f"{name}|{split}" for name in ("ade20k", "cocostuff", "cityscapes", "mapillary") for split in ("train", "val")),
    *(f"{name}|{split}" for name in ("pascal_context", "pascal_voc") for split in ("train", "val")),
    *PARTS,
    *("openimage|train", "openimage|validation", "coco classes", "coco panoptic", "folder train", "folder val"),
)
SETS = (
    *CLASSES,
    *SEVERAL,
    *(f"{name}|{by}|train" for name in ("refcoco", "refcoco+") for by in ("unc", "unc_exclude_unified")),
    *(f"{name}|unc|{split}" for name in ("refcoco", "refcoco+", "refclef") for split in ("train", "val", "testA")),
    *(f"refcocog|umd|{split}" for split in ("train", "val", "test")),
    *("refcocog|umd_exclude_unified|val", "MultiReasonSeg|train"),
    *(f"muse|{split}" for split in ("train", "val", "test_few", "test_many")),
    *("llava_instruct_150k", "vqa|train", "vqa|val"),
)
SOMETIMES_EMPTY = ("coco classes", "coco refer", "pascal_voc|train", "pascal_voc|val")
COCO = {"annotations": "coco/annotations/instances_train2017.json", "images": "coco/train2017"}
OPTIONS = {  # of the sources for data of one's own, which have no layout of their own
    "coco classes": COCO,
    "coco panoptic": COCO | {"annotations": "coco/annotations/panoptic_train2017.json"},
    "coco refer": COCO | {"serve": "refer", "absent": 2, "crowd": "ignore"},
    **{f"folder {split}": {"folder": "my_folder", "split": split} for split in ("train", "val")},
    **{f"jsonl {split}": {"file": f"my_queries/{split}.jsonl"} for split in ("train", "val")},
}


def opened(name: str, root):
    return build_source(name.split()[0], root, **OPTIONS.get(name, {}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert make_toy_dataset([str(folder), "--images", "80", "--val_images", "2"]) == 0
    return folder


def test_every_source_is_tried():
    assert {name.split()[0].split("|")[0] for name in SETS} == set(SOURCES)


@pytest.mark.parametrize("name", SETS)
def test_the_sources_read_the_toy_world(root, name):
    source = opened(name, root)
    assert len(source)
    drawn = absent = 0
    for index in range(len(source)):
        record = source[index]
        with Image.open(record.image) as image:
            shape = image.size[::-1]
        assert len({target.phrase for target in record.targets} & set(record.vocabulary)) in (0, len(record.targets))
        for target in record.targets:
            assert target.phrase
            if target.mask is None:
                absent += 1
                continue
            mask = target.mask()
            assert mask.shape == shape and mask.dtype == np.bool_ and target.correction is None
            assert mask.any() and not mask.all(), f"{record.image}: {target.phrase}"
            drawn += 1
        if record.ignore is not None:
            assert record.ignore().shape == shape
            assert not any((t.mask() & record.ignore()).any() for t in record.targets if t.mask)
        assert record.kind == "vqa" or record.targets or name in SOMETIMES_EMPTY
        assert bool(record.vocabulary) == (record.kind == "classes") == (name in CLASSES)
    assert drawn or source[0].dialogues[0][0].question.startswith("<image>\n")
    assert bool(absent) == (name in SEVERAL)
    assert image_paths(source) == [str(source[index].image) for index in range(len(source))]


@pytest.mark.parametrize("name", ["ade20k", "cocostuff", "cityscapes", "mapillary", "coco panoptic", "folder train"])
def test_the_classes_of_a_picture_do_not_overlap(root, name):
    record = opened(name, root)[0]
    counted = sum(target.mask().astype(int) for target in record.targets) + record.ignore()
    assert (counted == 1).all(), "each pixel is one class or ignored"


def test_explained_pictures_carry_their_explanation(root):
    source = build_source("ReasonSeg|train", root, explanations=True)
    explained = [source[i].dialogues[0][0] for i in range(len(source)) if source[i].dialogues]
    assert explained and all(turn.question and turn.answer[0] for turn in explained)


def test_the_first_text_comes_with_the_first_false_premise(root):
    source = build_source("ReasonSeg|train", root, texts="first", explanations=False)
    for index in range(len(source)):
        first, *false = source[index].targets
        assert first.mask is not None and [target.mask for target in false] == [None] * len(false)
        assert all(target.correction.startswith("no, there is no") for target in false)


@pytest.mark.parametrize("name", PARTS)
def test_parts_lie_in_their_object_and_have_another_name(root, name):
    source = build_source(name, root)
    seen = 0
    for index in range(len(source)):
        masks = {target.phrase: target.mask() for target in source[index].targets}
        for target in source[index].targets:
            if target.aliases:
                whole, part = target.phrase.split()
                assert target.aliases == (f"the {part} of the {whole}",)
                assert whole not in masks or not (masks[target.phrase] & ~masks[whole]).any()
                seen += 1
    assert seen > 10


@pytest.mark.parametrize("split", ["train", "val", "test_few", "test_many"])
def test_every_hole_of_an_answer_has_its_object(root, split):
    source = build_source(f"muse|{split}", root)
    texts = 0
    for index in range(len(source)):
        record = source[index]
        holes = [part.target for dialogue in record.dialogues for part in dialogue[0].answer if isinstance(part, Mask)]
        assert holes == list(range(len(record.targets))), "in the order of the answers"
        for script in (dialogue[0].answer for dialogue in record.dialogues):
            count = sum(isinstance(part, Mask) for part in script)
            assert count <= 3 if split == "test_few" else count > 3 if split == "test_many" else count > 1
            for before, hole in pairwise(script):
                if isinstance(before, str) and isinstance(hole, Mask):
                    texts += 1
                    name = record.targets[hole.target]
                    assert (name.aliases or (name.phrase,))[-1] in before, "the text before a hole names its object"
    assert texts


@pytest.mark.parametrize("name", ["fprefcoco", "fprefcoco+", "fprefcocog"])
def test_corrections_are_true_sentences(root, name):
    source = build_source(name, root)
    false = 0
    for index in range(len(source)):
        for target in source[index].targets:
            assert (target.correction is None) == (target.mask is not None)
            false += target.mask is None
            assert target.correction != target.phrase
    assert false > 20


def test_sesame_selection_is_read_from_its_own_file(root):
    files = build_source("refcocog|umd_exclude_unified|val", root).files
    assert files[0].name == "refs(umd_exclude_unified).p"
