"""How the tower sees: position tables, padding that no one attends to, pooled tokens, and what a folder tells of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.types import Geometry
from data.views import SAM_MEAN, SAM_STD, ClipView, PaddedView, SamView
from model.vlm.tower import (
    OwnView,
    TowerInput,
    fit_tower,
    own_view,
    published_fields,
    representable,
    tower_input,
    tower_view,
    write_view,
)
from model.vlm.towers.clip import ClipTower
from tests.tiny_model import llava_of, tiny_model
from utils.config import TowerConfig

SIDE, PATCH = 448, 14
POSITIONS = f"vlm.tower.{ClipTower.POSITIONS}"
PREPROCESSOR = Path(__file__).parents[1] / "configs" / "released" / "preprocessor_448.json"


@pytest.fixture
def table():
    return torch.randn(577, 8, generator=torch.Generator().manual_seed(0))


def view_of(folder: str | Path, shown: TowerInput, preprocessor: str | None = None) -> OwnView | PaddedView:
    """Of a CLIP that is shown `shown.size` pixels."""
    assert shown.size is not None
    sizes = {"model_type": ClipTower.NAME, "image_size": shown.size}
    return tower_view(own_view(folder, sizes, preprocessor), shown.size, shown)


def bilinear(square: np.ndarray, side: int) -> np.ndarray:
    """(n, n, W) to (side, side, W) by the textbook: cell centres, edges clamped."""
    number = len(square)
    places = np.clip((np.arange(side) + 0.5) * number / side - 0.5, 0, number - 1)
    low = np.minimum(np.floor(places).astype(int), number - 2)
    share = (places - low)[:, None]
    rows = square[low] * (1 - share[..., None]) + square[low + 1] * share[..., None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share


def test_positions_as_released_are_off_by_a_row(table):
    found = ClipTower.resize_positions(table, 32, "released")
    assert found.shape == (1025, 8)
    assert torch.equal(found[0], table[0]) and torch.equal(found[1024], table[576])
    expected = bilinear(table[:576].double().numpy().reshape(24, 24, 8), 32).reshape(1024, 8)
    np.testing.assert_allclose(found[:1024].numpy(), expected, atol=1e-5)


def test_correct_positions_keep_the_class_token(table):
    found = ClipTower.resize_positions(table, 32, "correct")
    assert torch.equal(found[0], table[0])
    expected = bilinear(table[1:].double().numpy().reshape(24, 24, 8), 32).reshape(1024, 8)
    np.testing.assert_allclose(found[1:].numpy(), expected, atol=1e-5)
    assert (found - ClipTower.resize_positions(table, 32, "released")).abs().max() > 0.1


def test_only_a_table_of_the_native_grid_is_resized(table):
    sizes, own = {"model_type": ClipTower.NAME, "image_size": 336, "patch_size": 14}, ClipView(336)
    tensors = {POSITIONS: table}
    assert fit_tower(sizes, tensors, TowerInput(size=448), own)["image_size"] == 448
    assert len(tensors[POSITIONS]) == 1025
    resized = tensors[POSITIONS]
    fit_tower(sizes, tensors, TowerInput(size=448), own)
    assert tensors[POSITIONS] is resized
    for sight in (TowerInput(size=450), TowerInput(size=448, pool=3)):
        with pytest.raises(ValueError, match="does not divide"):
            fit_tower(sizes, tensors, sight, own)


@pytest.mark.parametrize(("height", "rows", "tokens"), [(299, 22, 11), (448, 32, 16), (14, 1, 1), (15, 2, 1)])
def test_padded_patches_and_tokens_are_masked(height, rows, tokens):
    """pixellm.md 1.2: patch row i is visible if 14 i < h, token row i if 28 i < h."""
    model = llava_of(tiny_model())
    model.tower.config.image_size = SIDE
    model.tower.config.patch_size = PATCH
    model.pool = 2
    model.view = PaddedView(SIDE)
    places = [Geometry((height, SIDE), (0, 0)), Geometry((SIDE, SIDE), (0, 0))]
    visible = model._visible_patches(places, torch.device("cpu"))
    if rows == 32:
        assert visible is None
        return
    assert visible is not None
    assert visible[0].all(1).sum() == visible[0].any(1).sum() == rows and visible[1].all()
    assert visible[0, ::2, ::2].any(1).sum() == tokens


def test_pooling_is_the_bilinear_halving_of_the_release():
    model = llava_of(tiny_model())
    model.tower.config.image_size = 64
    model.tower.config.patch_size = 8
    model.pool = 2
    patches = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0))
    square = patches.transpose(1, 2).reshape(2, 5, 8, 8)
    expected = F.interpolate(square, (4, 4), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model._pooled(patches), expected)
    assert ClipView(64, cell=8 * model.pool).most_tokens == 16


def test_what_a_published_config_tells():
    values = {"resize_vision_tower": True, "resize_vision_tower_size": 448, "pad_train_clip_images": True}
    sight = tower_input(values, TowerConfig(), ClipTower)
    assert sight == TowerInput(size=448, pad=True, stats="sam", pool=2)
    assert published_fields(sight) == values and representable(sight, ClipTower)
    assert (
        tower_input({}, TowerConfig(), ClipTower) == TowerInput()
        and published_fields(TowerInput()) == {}
        and representable(TowerInput(), ClipTower)
    )
    assert not representable(TowerInput(pad=True, stats="tower"), ClipTower) and not representable(
        TowerInput(pool=2), ClipTower
    )
    assert tower_input(values, TowerConfig(size=336, stats="tower"), ClipTower) == TowerInput(336, True, "tower", 2)


def test_the_preprocessor_file_says_the_size():
    asked = TowerConfig(preprocessor=str(PREPROCESSOR))
    assert tower_input({}, asked, ClipTower).size == SIDE
    assert view_of("nowhere", TowerInput(SIDE, pad=True), str(PREPROCESSOR)) == PaddedView(SIDE)
    assert view_of("nowhere", TowerInput(SIDE), str(PREPROCESSOR)) == ClipView(SIDE)
    with pytest.raises(ValueError, match=r"size is 512.*is for 448"):
        tower_input({}, TowerConfig(size=512, preprocessor=str(PREPROCESSOR)), ClipTower)
    with pytest.raises(FileNotFoundError, match="no file nothing"):
        tower_input({}, TowerConfig(preprocessor="nothing.json"), ClipTower)


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match=r"no model\.tower\.stats 'clip'.*sam"):
        TowerInput(stats="clip")
    with pytest.raises(ValueError, match=r"no model\.tower\.positions 'bicubic'.*correct"):
        TowerInput(positions="bicubic")


def test_views_are_written_and_read_back(tmp_path):
    padded = view_of(tmp_path, TowerInput(64, pad=True, stats="tower"))
    write_view(tmp_path, padded)
    told = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert told["size"] == {"longest_edge": 64} and not told["do_center_crop"]
    again = view_of(tmp_path, TowerInput(64, pad=True, stats="tower"))
    np.testing.assert_allclose([*again.mean, *again.std], [*padded.mean, *padded.std])
    write_view(tmp_path / "clip", ClipView(64))
    assert view_of(tmp_path / "clip", TowerInput(64)) == ClipView(64)


def test_padded_views_normalise_by_the_choice():
    image = np.full((16, 32, 3), 100, np.uint8)
    sam, own = (
        view_of("nowhere", TowerInput(32, pad=True)),
        view_of("nowhere", TowerInput(32, pad=True, stats="tower")),
    )
    assert torch.equal(sam(image), SamView(32)(image)[0]) and not sam(image)[:, 16:].any()
    assert sam(image)[0, 0, 0] == pytest.approx((100 - SAM_MEAN[0]) / SAM_STD[0], rel=1e-6)
    expected = torch.from_numpy(np.asarray(ClipView(32)(np.full((32, 32, 3), 100, np.uint8))))[:, 0, 0]
    torch.testing.assert_close(own(image)[:, 0, 0], expected)
