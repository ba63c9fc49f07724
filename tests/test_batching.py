"""Rows and masks that are computed together equal those computed alone."""

from __future__ import annotations

import torch

from data.types import Geometry
from model.heads.base import crop_padding, split_by_image, to_original
from utils.batching import map_batched


def test_equal_work_is_done_once_and_comes_back_in_order():
    calls = []

    def work(value, key):
        calls.append((key, len(value)))
        return value * key

    values = [torch.full((n, 2), float(n)) for n in (1, 2, 0, 3)] + [torch.ones(2, 5)]
    results = map_batched(work, values, [3, 2, 3, 3, 3])
    assert calls == [(3, 4), (2, 2), (3, 2)]
    for value, key, result in zip(values, [3, 2, 3, 3, 3], results, strict=True):
        assert torch.equal(result, value * key)


def test_masks_of_pictures_of_one_size_are_drawn_together_as_they_would_be_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 8, 8, generator=generator)
    wide, tall = Geometry((20, 30), (22, 32)), Geometry((25, 10), (32, 13))
    geometry, counts = [wide, tall, wide, wide], [2, 1, 0, 3]
    query_image = torch.arange(4).repeat_interleave(torch.tensor(counts))
    for full, finish in ((True, to_original), (False, crop_padding)):
        drawn = split_by_image(logits, query_image, geometry, [32] * 4, full)
        assert [len(masks) for masks in drawn] == counts
        for part, place, masks in zip(logits.split(counts), geometry, drawn, strict=True):
            torch.testing.assert_close(masks, finish(part, place, 32))
