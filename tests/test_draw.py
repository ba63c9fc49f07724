"""Overlays and grids: colours where the masks are, the image where they are not."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.report.draw import OPACITY, Layer, Panel, colour_of, grid, outline, overlay, with_legend, wrap_text
from evaluation.report.draw import _font as font

GREY = np.full((40, 60, 3), 100, np.uint8)


def layer(name="sky", colour=(250, 0, 0), rows=slice(5, 20)) -> Layer:
    mask = np.zeros((40, 60), bool)
    mask[rows, 10:50] = True
    return Layer(mask, name, colour)


def test_overlay_tints_the_mask_outlines_it_and_leaves_the_rest():
    sky = layer()
    shown = overlay(GREY, [sky])
    assert (shown[~sky.mask] == 100).all()
    assert (shown[outline(sky.mask)] == sky.colour).all()
    inside = sky.mask & ~outline(sky.mask)
    assert (shown[inside] == np.round((1 - OPACITY) * 100 + OPACITY * np.array(sky.colour))).all()
    assert (overlay(GREY, []) == GREY).all()


def test_outline_is_the_border_of_the_mask_but_not_of_the_image():
    whole = np.ones((5, 5), bool)
    assert not outline(whole).any()
    ring = outline(np.pad(np.ones((3, 3), bool), 1))
    assert ring.sum() == 8 and not ring[2, 2]


def test_colours_of_a_long_list_differ():
    assert len({colour_of(index) for index in range(150)}) == 150


def test_legend_shows_every_colour_once_and_keeps_the_width():
    layers = [layer("sky"), layer("sky", rows=slice(25, 30)), layer("a class with a very long name", (0, 200, 0))]
    shown = with_legend(GREY, layers)
    assert shown.shape[1] == 60 and shown.shape[0] > 40
    strip = shown[40:].reshape(-1, 3)
    assert (strip == (250, 0, 0)).all(1).any() and (strip == (0, 200, 0)).all(1).any()
    assert with_legend(GREY, []).shape == GREY.shape


def test_grid_stacks_images_of_any_shape():
    tall = np.zeros((90, 30, 3), np.uint8)
    panels = [
        Panel(GREY, "where is the sky?", "sky", [layer()], [layer()], note="IoU 1.00"),
        Panel(tall, "a question " * 30, "", [], []),
    ]
    page = grid(panels, side=120)
    assert page.dtype == np.uint8 and page.shape[2] == 3 and page.shape[1] > 4 * 120
    assert (page.reshape(-1, 3) == (250, 0, 0)).all(1).any()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one panel"):
        grid([])
    with pytest.raises(ValueError, match="'sky' is"):
        overlay(GREY[:10], [layer()])


def test_long_answers_are_wrapped_without_losing_a_letter():
    text = "<semantic>Segment this image. " + "".join(f"traffic light{n}<ins>tree<no_ins>" for n in range(8))
    lines = wrap_text(text, 200)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(font().getlength(line) for line in lines) <= 200
    assert wrap_text(text, 60, most=3)[-1] == "[...]"
