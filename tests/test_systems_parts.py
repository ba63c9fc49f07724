"""Parts of objects go by either of their names, in every paper that asks for them one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.types import Record, Target
from systems.base import build_system

WHEEL = Target("car wheel", lambda: np.ones((2, 2), bool), aliases=("the wheel of the car",))
RECORD = Record(Path("a.jpg"), "classes", (WHEEL,), ("car", "car wheel"))


@pytest.mark.parametrize("name", ["lisa", "gsva", "pixellm"])
def test_a_part_is_named_in_two_ways_half_the_time_each(name):
    task = build_system(name).task
    texts = [task.converse(RECORD, np.random.default_rng(seed))[0][0].question for seed in range(300)]
    plain, long = (sum(words in text for text in texts) for words in ("car wheel", "the wheel of the car"))
    assert plain + long == 300 and 110 < plain < 190


def test_a_class_list_keeps_the_names_of_its_vocabulary():
    task = build_system("lasagna").task
    for seed in range(20):
        ((turn,),) = task.converse(RECORD, np.random.default_rng(seed))
        assert "car wheel" in turn.question and "the wheel of" not in turn.question


def test_a_class_list_refuses_several_targets_of_a_class():
    """It would train or score the mask of one of them as that of all."""
    twice = Record(Path("a.jpg"), "classes", (WHEEL, WHEEL), ("car", "car wheel"))
    task = build_system("lasagna").task
    with pytest.raises(ValueError, match=r"a\.jpg: car wheel: more than one target .* instances .* to union"):
        task.converse(twice, np.random.default_rng(0))
    for name in ("lisa", "gsva", "pixellm", "sesame"):
        with pytest.raises(ValueError, match="more than one target of the class"):
            build_system(name).task.queries(twice)
        assert build_system(name).task.converse(twice, np.random.default_rng(0)), "where each is asked about alone"
