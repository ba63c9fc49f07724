"""Every layout that the toy world writes is read by the real sources: pictures, sizes, masks and words agree."""

from __future__ import annotations

import numpy as np
import pytest
from make_toy_dataset import main as make_toy_dataset
from PIL import Image

from data.sources import SOURCES, build_source

SETS = (
    *(f"{name}|{split}" for name in ("ade20k", "cocostuff", "cityscapes", "mapillary") for split in ("train", "val")),
    *(f"{name}|unc|{split}" for name in ("refcoco", "refcoco+", "refclef") for split in ("train", "val", "testA")),
    *(f"refcocog|umd|{split}" for split in ("train", "val", "test")),
    *(f"ReasonSeg|{split}" for split in ("train", "val", "test", "train_val")),
    "llava_instruct_150k",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert make_toy_dataset([str(folder), "--images", "80", "--val_images", "2"]) == 0
    return folder


def test_every_source_is_tried():
    assert {name.split("|")[0] for name in SETS} == set(SOURCES)


@pytest.mark.parametrize("name", SETS)
def test_the_sources_read_the_toy_world(root, name):
    source = build_source(name, root)
    assert len(source)
    drawn = 0
    for index in range(len(source)):
        record = source[index]
        with Image.open(record.image) as image:
            shape = image.size[::-1]
        for target in record.targets:
            mask = target.mask()
            assert target.phrase and mask.shape == shape and mask.dtype == np.bool_
            assert mask.any() and not mask.all(), f"{record.image}: {target.phrase}"
            drawn += 1
        if record.ignore is not None:
            assert record.ignore().shape == shape
            assert not any((target.mask() & record.ignore()).any() for target in record.targets)
        assert record.kind == "vqa" or record.targets
        assert bool(record.vocabulary) == (record.kind == "classes")
    assert drawn or source[0].asked[0][0].question.startswith("<image>\n")


@pytest.mark.parametrize("name", ["ade20k", "cocostuff", "cityscapes", "mapillary"])
def test_the_classes_of_a_picture_do_not_overlap(root, name):
    record = build_source(name, root)[0]
    counted = sum(target.mask().astype(int) for target in record.targets) + record.ignore()
    assert (counted == 1).all(), "each pixel is one class or ignored"


def test_explained_pictures_carry_their_explanation(root):
    source = build_source("ReasonSeg|train", root, explanations=True)
    explained = [source[i].asked[0][0] for i in range(len(source)) if source[i].asked]
    assert explained and all(turn.question and turn.answer[0] for turn in explained)
