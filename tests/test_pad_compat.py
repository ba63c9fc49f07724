"""The released evaluation of SESAME lets rows see their padding, in batches of 5 (sesame.md 6.3): a named choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data.collate import load_views
from evaluation.predictor import free_query
from evaluation.protocols import generate
from systems.base import build_system
from tests.records import OWN
from tests.tiny_assistant import tiny

SHORT, LONG = free_query("Is there a dog?"), free_query("Is there a dog that sits on the grass in front of the house?")


@pytest.fixture(scope="module")
def masked():
    """The mask token made loud, so that answers hold masks."""
    return tiny("sesame", eager=-8)


def answers(assistant, *queries) -> list[torch.Tensor]:
    """The masks of the answers to questions about one image."""
    sample = load_views(OWN / "sesame" / "image0.png", assistant.views)
    (replies,) = generate(assistant, [sample], [list(queries)], max_new_tokens=4)
    return [reply.masks for reply in replies]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-3)


def test_padding_is_seen_only_where_the_recipe_says_released(masked):
    system = build_system("sesame", {"pad_compat": "released"})
    released = replace(masked, system=replace(masked.system, released=system.released))
    (alone,), (first, second) = answers(masked, SHORT), answers(masked, SHORT, LONG)
    assert len(alone) and same(alone, first), "masked padding changes nothing"
    (without,), (short, long) = answers(released, SHORT), answers(released, SHORT, LONG)
    assert same(without, alone) and same(long, second), "the longest row has no padding"
    assert not same(short, alone), "the padding of the short row is seen"
    *_, fifth, sixth = answers(released, LONG, SHORT, SHORT, SHORT, SHORT, SHORT)
    assert same(fifth, short) and same(sixth, alone), "batches of 5"
