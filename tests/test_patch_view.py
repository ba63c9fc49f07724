"""The view of Qwen-VL: pixel by pixel that of transformers' image processor, whatever the size of the image."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import patch_view as module
from data.patch_view import PatchView, patch_view, smart_resize
from data.views import CLIP_MEAN

HALF = (0.5, 0.5, 0.5)
VIEWS = {
    "qwen2_5_vl": PatchView(14, 56 * 56, 40 * 28 * 28),
    "qwen3_vl": PatchView(16, 64 * 64, 60 * 32 * 32, HALF, HALF),
}
SIZES = [(30, 41), (100, 57), (224, 224), (480, 640), (7, 300), (641, 33), (1, 1), (5, 1000)]


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processor_of(view: PatchView) -> Qwen2VLImageProcessorPil:
    limits = {"shortest_edge": view.min_pixels, "longest_edge": view.max_pixels}
    return Qwen2VLImageProcessorPil(
        size=limits, patch_size=view.patch, image_mean=list(view.mean), image_std=list(view.std)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", VIEWS)
def test_pixels_are_those_of_the_library(family, size):
    view, image = VIEWS[family], image_of(*size)
    pixels = view(image)
    expected = processor_of(view)(images=[Image.fromarray(image)], return_tensors="pt")
    assert torch.equal(pixels, expected["pixel_values"])
    height, width = view.geometry(*size).resized
    assert expected["image_grid_thw"].tolist() == [[1, height // view.patch, width // view.patch]]
    assert view.tokens(*size) == len(pixels) // 4


def test_no_image_takes_more_tokens_than_the_view_says():
    generator = np.random.default_rng(0)
    views = [*VIEWS.values(), PatchView(14, 28 * 28 * 100, 28 * 28 * 101), PatchView(14, 1, 28 * 28 * 3)]
    for view in views:
        most = 0
        for size in generator.integers(1, 4000, (3000, 2)).tolist():
            most = max(most, view.tokens(*size))
        assert most <= view.most_tokens
    assert VIEWS["qwen2_5_vl"].most_tokens < 3 * 40


def test_a_strip_is_squeezed_where_the_library_refuses_it(caplog, monkeypatch):
    view, image = VIEWS["qwen2_5_vl"], image_of(2, 1000)
    with pytest.raises(ValueError, match="aspect ratio"):
        processor_of(view)(images=[Image.fromarray(image)], return_tensors="pt")
    logger = logging.getLogger("assistant")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("assistant"), "handlers", [])  # whatever ran before
    module._tell_once.cache_clear()
    pixels = view(image)
    assert len(pixels) == 4 * view.tokens(2, 1000) and view.geometry(2, 1000).resized == view.geometry(2, 400).resized
    view(image)
    assert caplog.text.count("squeezed") == 1


def test_an_image_beyond_the_limit_is_shown_smaller_with_a_word(caplog, monkeypatch):
    view = VIEWS["qwen2_5_vl"]
    monkeypatch.setattr(logging.getLogger("assistant"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("assistant"), "handlers", [])  # whatever ran before
    module._tell_once.cache_clear()
    view(image_of(100, 100))
    assert not caplog.records
    for _ in range(2):
        height, width = view.geometry(480, 640).resized
        assert len(view(image_of(480, 640))) == height * width // 14**2 <= 4 * 40
    assert caplog.text.count(f"more than {view.max_pixels} pixels are shown smaller (model.tower.max_pixels)") == 1


def test_two_resizes_go_through_multiples_of_28():
    """sa2va.md 3.1: an image of 200 x 150 pixels becomes 196 x 140 first, then 768 x 544 (width x height)."""
    limits = (512 * 28 * 28, 2048 * 28 * 28)
    once = PatchView(16, *limits)
    twice = replace(once, resize="twice")
    assert once.geometry(150, 200).resized == (576, 736) and once.tokens(150, 200) == 414
    assert twice.geometry(150, 200).resized == (544, 768) and twice.tokens(150, 200) == 408
    image = image_of(150, 200)
    first = Image.fromarray(image).resize((196, 140))  # Pillow's own filter
    assert torch.equal(twice(image), once.cut(np.asarray(first.resize((768, 544), Image.Resampling.BICUBIC))))
    assert not torch.equal(twice(image)[:1000], once(image)[:1000])


def test_tiny_sides_are_one_cell_in_the_first_resize():
    assert smart_resize(10, 2000, 28, 4 * 784, 16384 * 784, least=28) == (28, 1988)
    assert smart_resize(10, 2000, 28, 4 * 784, 16384 * 784) == (28, 812)


SPELLINGS = [
    {"size": {"shortest_edge": 5000, "longest_edge": 90000}},
    {"min_pixels": 5000, "max_pixels": 90000},
    {"size": {"min_pixels": 5000, "max_pixels": 90000}},
    {"min_pixels": 5000, "max_pixels": 90000, "size": {"shortest_edge": 1, "longest_edge": 2}},
    {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 5000, "longest_edge": 90000}},
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("values", SPELLINGS)
def test_every_spelling_of_the_limits_is_read(tmp_path, values, nested):
    usual = VIEWS["qwen3_vl"]
    values = values | {"image_mean": list(CLIP_MEAN), "patch_size": 16}
    if nested:  # as the library writes a processor today; an older file next to it does not count
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 7}))
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    view = patch_view(tmp_path, usual, {})
    assert view == replace(usual, min_pixels=5000, max_pixels=90000, mean=CLIP_MEAN)
    assert patch_view(tmp_path, usual, {"max_pixels": 6000}).max_pixels == 6000


def test_a_folder_without_image_settings_has_the_usual_ones(tmp_path):
    assert patch_view(tmp_path, VIEWS["qwen3_vl"], {}) == VIEWS["qwen3_vl"]


BAD = [
    ({"patch_size": 14}, "patch_size is 14, the vision tower was built for 16"),
    ({"resample": 2}, "resample 2 is not supported"),
    ({"size": 224}, "size must be a mapping with shortest_edge and longest_edge, got 224"),
    ({"max_pixels": 10**12}, "the side of a square of max_pixels.*ASSISTANT_MAX_VIEW"),
    ({"min_pixels": 10**6}, "min_pixels 1000000 is larger than max_pixels"),
    ({"max_pixels": "many"}, "max_pixels of the vision tower's images must be a whole number above 0, got 'many'"),
    ({"image_std": [0, 1, 1]}, "image_std must be three numbers"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_settings_name_their_file(tmp_path, values, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json.*{message}"):
        patch_view(tmp_path, VIEWS["qwen3_vl"], {})
