"""The Python interface: what it returns is what the model says, for every kind of image and question."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data.types import Claim
from evaluation import predictor as module
from evaluation.predictor import Predictor
from tests.records import OWN
from tests.tiny_assistant import tiny

PICTURE = OWN / "lisa" / "image0.png"
PHRASES = ["the dog", "the unicorn"]


@pytest.fixture(scope="module")
def lisa() -> Predictor:
    return Predictor(tiny("lisa", eager=5), max_new_tokens=12)


@pytest.fixture(scope="module")
def lasagna() -> Predictor:
    return Predictor(tiny("lasagna", eager=8), max_new_tokens=12)


@pytest.fixture(scope="module")
def size() -> tuple[int, int]:
    return np.asarray(Image.open(PICTURE)).shape[:2]


def test_phrases_get_masks_of_the_pictures_size_with_scores(lisa, size):
    things = lisa(PICTURE, PHRASES)
    assert [thing.phrase for thing in things] == PHRASES and any(thing.present for thing in things)
    for thing in things:
        assert thing.present == ("[SEG]" in thing.text)
        if thing.present:
            assert thing.mask.shape == size and thing.mask.dtype == bool
            assert 0.5 < thing.score <= 1 if thing.mask.any() else thing.score == 0


def test_paths_images_and_arrays_are_the_same_picture_and_batches_change_nothing(lisa):
    image = Image.open(PICTURE)
    alone = lisa(PICTURE, PHRASES)
    rotated = image.transpose(Image.Transpose.ROTATE_90)
    batch = lisa.batch([str(PICTURE), image, np.asarray(image.convert("RGB")), rotated], [PHRASES] * 3 + [["the cat"]])
    for group in batch[:3]:
        for one, other in zip(alone, group, strict=True):
            assert (one.text, one.present) == (other.text, other.present)
            if one.present:
                assert np.array_equal(one.mask, other.mask) and one.score == pytest.approx(other.score, abs=1e-4)
    assert len(batch[3]) == 1


def test_a_class_list_tells_present_and_absent(lasagna, size, monkeypatch):
    masks = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    claims = (Claim("Sky", 1), Claim("dog", None), Claim("sky", 0))
    monkeypatch.setattr(module, "generate", lambda *_: [[module.Reply("said", claims, masks)]])
    sky, dog, cat = lasagna.classes(PICTURE, ["sky", "dog", "cat"])
    assert sky.present and not dog.present and not cat.present and dog.score is None
    assert np.array_equal(sky.mask, (masks.amax(0) > 0).numpy()) and sky.text == "said"


def test_a_class_list_is_asked_in_the_words_of_the_system(lisa, lasagna):
    for predictor, questions in ((lisa, 2), (lasagna, 1)):
        assert len(predictor.class_queries(["sky", "dog"])) == questions
        assert [thing.phrase for thing in predictor.classes(PICTURE, ["sky", "dog"])] == ["sky", "dog"]


def test_questions_in_free_words(lisa):
    said = lisa.ask(PICTURE, "Where is the dog in this image?")
    assert said.text.count("[SEG]") == len([thing for thing in said.things if thing.present]) > 0


def test_published_checkpoints_load():
    loaded = Predictor.from_pretrained(
        OWN / "lisa", device="cpu", max_new_tokens=2, model={"vision_tower": str(OWN / "lisa" / "clip")}
    )
    assert len(loaded(PICTURE, PHRASES)) == 2


def test_bad_input_is_refused_with_what_is_wrong(lisa):
    for phrases in ([], ["dog", " "], "dog"):
        with pytest.raises(ValueError, match="phrases are a list"):
            lisa(PICTURE, phrases)
    with pytest.raises(ValueError, match="at least one name"):
        lisa.classes(PICTURE, [])
    with pytest.raises(ValueError, match="question is empty"):
        lisa.ask(PICTURE, " ")
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, not \(4, 4\)"):
        lisa(np.zeros((4, 4), np.uint8), ["dog"])
    with pytest.raises(ValueError, match="2 pictures, but questions about 1"):
        lisa.batch([PICTURE, PICTURE], [PHRASES])
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        lisa("none.png", PHRASES)
