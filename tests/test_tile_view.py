"""The view of InternVL: pixel by pixel that of transformers' image processor, whatever the shape of the image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from data.tile_view import TileView, tile_view

SIZES = [(30, 41), (100, 57), (448, 448), (480, 640), (7, 300), (641, 33), (1, 1), (5, 1000), (900, 600), (1000, 2000)]
USUAL = TileView(448, 28)


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processor_of(view: TileView) -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        size={"height": view.side, "width": view.side},
        image_mean=list(view.mean),
        image_std=list(view.std),
        crop_to_patches=True,
        min_patches=view.min_tiles,
        max_patches=view.max_tiles,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiles", [(1, 12), (1, 1), (2, 6), (5, 5)], ids=str)
def test_pixels_are_those_of_the_library(tiles, size):
    view, image = TileView(56, 28, *tiles), image_of(*size)
    pixels = view(image)
    expected = processor_of(view)(images=[Image.fromarray(image)], return_tensors="pt")
    assert torch.equal(pixels, expected["pixel_values"])
    assert view.tokens(*size) == 4 * len(pixels) == 4 * int(expected["num_patches"][0])


def test_tiles_of_the_released_size_are_those_of_the_library():
    image = image_of(480, 1500)
    pixels = USUAL(image)
    assert torch.equal(
        pixels, processor_of(USUAL)(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"]
    )
    assert pixels.shape == (4, 3, 448, 448) and USUAL.tokens(480, 1500) == 4 * 256
    assert USUAL.geometry(480, 1500).resized == (448, 3 * 448)


def test_numbers_of_tiles_are_those_of_the_library():
    """Of sizes at random and of those at which two grids are equally near."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 3000, (2000, 2)).tolist()
    sizes += [(height * k, width * k) for height in range(1, 8) for width in range(1, 8) for k in (60, 250, 500)]
    for view in (USUAL, TileView(448, 28, 3, 4), TileView(448, 28, 1, 1)):
        theirs = processor_of(view)
        for size in sizes:
            assert view.tokens(*size) == 256 * theirs.get_number_of_image_patches(*size) <= view.most_tokens


def test_the_file_of_a_folder_says_how_many_and_a_recipe_overrides_it(tmp_path):
    assert tile_view(tmp_path, USUAL, (None, None)) == USUAL
    values = {"size": {"height": 448, "width": 448}, "min_patches": 2, "max_patches": 6, "crop_to_patches": False}
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(values | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    half = (0.5,) * 3
    assert tile_view(tmp_path, USUAL, (None, None)) == TileView(448, 28, 2, 6, half, half)
    assert tile_view(file, USUAL, (None, 4 * 448**2 + 5)) == TileView(448, 28, 2, 4, half, half)
    assert tile_view(file, USUAL, (None, 448**2)) == TileView(448, 28, 1, 1, half, half)
    assert tile_view(file, USUAL, (2 * 448**2 + 1, None)) == TileView(448, 28, 3, 6, half, half)


@pytest.mark.parametrize(
    ("values", "pixels", "message"),
    [
        ({"size": {"height": 384, "width": 384}}, (None, None), "was built for tiles of 448 x 448"),
        ({"size": {"height": 448, "width": 384}}, (None, None), "was built for tiles of 448 x 448"),
        ({"size": 448}, (None, None), "was built for tiles"),
        ({"resample": 2}, (None, None), r"only 3 \(bicubic\)"),
        ({"max_patches": "many"}, (None, None), "max_tiles of an image must be a whole number"),
        ({"max_patches": 10**9}, (None, None), r"preprocessor_config\.json.*ASSISTANT_MAX_VIEW"),
        ({"min_patches": 9, "max_patches": 8}, (None, None), "min_tiles 9 is larger than max_tiles 8"),
        ({"image_std": [1, 1, 0]}, (None, None), "image_std must be three numbers"),
        ({}, (None, 448**2 - 1), r"model\.tower\.max_pixels 200703 is less than one tile"),
        ({}, (5 * 448**2, 4 * 448**2), "min_tiles 5 is larger than max_tiles 4"),
    ],
)
def test_other_views_are_refused(tmp_path, values, pixels, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        tile_view(tmp_path, USUAL, pixels)
