"""Suites by name, group and glob; each entry leads to a real source and a real metric."""

from __future__ import annotations

import inspect

import pytest
from tiny_assistant import toy_world

from data.sources import SOURCES, build_source
from data.sources.base import image_paths
from evaluation.scoring import SCORERS
from evaluation.suites import ENTRIES, GROUPS, SUITES, find_suites, table


def names(*patterns: str) -> list[str]:
    return [suite.name for suite in find_suites(patterns)]


def test_patterns_find_what_they_say_once_and_in_order():
    assert names("refcoco|unc|val") == ["refcoco|unc|val"]
    assert names("refcoco|unc|*") == ["refcoco|unc|val", "refcoco|unc|testA", "refcoco|unc|testB"]
    assert names("refcoco+*|testA", "refcoco*|testA") == ["refcoco+|unc|testA", "refcoco|unc|testA"]
    assert names("cityscapes", "ade20k") == ["cityscapes|val", "ade20k|val"]  # as the original's flag lists them
    assert names("semantic") == ["ade20k|val", "cocostuff|val", "cityscapes|val", "mapillary|val"]
    assert names("reason") == ["ReasonSeg|val", "ReasonSeg|test"]
    assert names("all") == list(SUITES) and len(SUITES) == len(ENTRIES)


@pytest.mark.parametrize("pattern", ["refcocco|unc|val", "coco*stuffs", "", "ReasonSeg"])
def test_unknown_patterns_are_refused_with_the_choices(pattern):
    with pytest.raises(ValueError, match=r"no suite .*have: .*ade20k\|val"):
        find_suites([pattern])
    with pytest.raises(ValueError, match="no suite named"):
        find_suites([])


@pytest.mark.parametrize("suite", ENTRIES, ids=lambda suite: suite.name)
def test_every_entry_names_a_source_with_its_options_and_a_metric(suite):
    assert suite.base in SOURCES and suite.metric in SCORERS and suite.group in GROUPS
    assert suite.options.keys() <= inspect.signature(SOURCES[suite.base]).parameters.keys()


@pytest.mark.parametrize("suite", ENTRIES, ids=lambda suite: suite.name)
def test_missing_data_name_the_paths(suite, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        suite.open(tmp_path)


def test_reasoning_suites_ask_the_first_text_about_what_is_there(tmp_path):
    world = toy_world(tmp_path / "world", "reason_seg")
    everything, suite = build_source("ReasonSeg|val", world), SUITES["ReasonSeg|val"].open(world)
    assert any(target.mask is None for target in everything[0].targets)  # the toy files hold false premises as well
    assert len(suite) == len(everything) and suite.image_paths() == image_paths(everything)
    for index in range(len(suite)):
        (target,) = suite[index].targets
        assert target.phrase == everything[index].targets[0].phrase and target.mask().any()


def test_the_list_has_a_line_for_every_suite():
    lines = table().splitlines()
    assert len(lines) == len(SUITES) + 1 and all(
        line.startswith(name) for line, name in zip(lines[1:], SUITES, strict=True)
    )
