"""Suites by name, group and glob; each entry leads to a real source and a real metric."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import yaml

from data.sources import SOURCES, build_source
from data.sources.base import image_paths
from data.types import Record, Target
from evaluation.catalog import ENTRIES
from evaluation.metrics import SCORERS
from evaluation.suites import GROUPS, SUITES, find_suites, read_custom, table
from evaluation.wrappers import Grouped
from tests.tiny_assistant import toy_world
from utils.config import EvalConfig, SuiteConfig, from_dict


def names(*patterns: str) -> list[str]:
    return [suite.name for suite in find_suites(patterns)]


def test_patterns_find_what_they_say_once_and_in_order():
    assert names("refcoco|unc|val") == ["refcoco|unc|val"]
    assert names("refcoco|unc|*") == ["refcoco|unc|val", "refcoco|unc|testA", "refcoco|unc|testB"]
    assert names("refcoco+*|testA", "refcoco*|testA") == ["refcoco+|unc|testA", "refcoco|unc|testA"]
    assert names("cityscapes", "ade20k") == ["cityscapes|val", "ade20k|val"]  # as the original's flag lists them
    assert names("semantic") == ["ade20k|val", "cocostuff|val", "cityscapes|val", "mapillary|val"]
    assert names("reason") == ["ReasonSeg|val", "ReasonSeg|test"]
    assert names("ReasonSeg", "reasonseg") == names("reason")
    assert names("vqa", "pas20") == ["vqa|val", "pascal_voc|val"]
    assert names("refcoco|unc_exclude_unified|val", "MultiReasonSeg|val") == ["apart-refcoco|val", "muse|val"]
    assert names("premise") == names("fp", "r") == names("fp*", "R-*") and len(names("fp")) == 6
    assert names("all") == list(SUITES) and len(SUITES) == len(ENTRIES)


def test_mapillary_is_scored_on_the_papers_65_classes_and_on_the_later_set_by_name(tmp_path):
    world = toy_world(tmp_path / "world", "mapillary")
    found = {suite.name: suite.open(world) for suite in find_suites(["mapillary|val", "mapillary-v2.0|val"])}
    assert [len(source.vocabulary) for source in found.values()] == [65, 124]
    assert SUITES["mapillary|val"].open(world, {"version": "v2.0"}).vocabulary == found["mapillary|val"].vocabulary
    (world / "mapillary" / "config_v1.2.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config_v1\.2\.json"):
        SUITES["mapillary|val"].open(world)


def test_short_names_mean_what_papers_report_together():
    found = names("refcoco*", "gref", "muse", "fp")
    assert found[:8] == [*names("refcoco"), *names("refcoco+"), *names("refcocog")]  # no other set's name begins so
    assert found[8:] == [*names("grefcoco"), *names("muse*"), *names("fprefcoco*")] and len(found) == 8 + 3 + 3 + 6


@pytest.mark.parametrize("pattern", ["refcocco|unc|val", "coco*stuffs", "", "Reason"])
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


def test_reasoning_pairs_are_one_true_and_one_false_question_per_image(tmp_path):
    world = toy_world(tmp_path / "world", "reason_seg")
    suite = SUITES["ReasonSeg-premise|val"]
    assert suite.metric == "premise" and names("reason_premise") == [suite.name]
    everything, pairs = build_source("ReasonSeg|val", world), suite.open(world)
    assert len(pairs) == len(everything) > 0
    for index in range(len(pairs)):
        true, false = pairs[index].targets
        assert true.mask().any() and true.phrase == everything[index].targets[0].phrase
        assert false.mask is None and false.correction
    path = next((world / "reason_seg/ReasonSeg/val").glob("*.json"))
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "false_premise_QA"}))
    with pytest.raises(ValueError, match=rf"{path.name}: 'false_premise_QA' has no question to pair"):
        list(map(suite.open(world).__getitem__, range(len(pairs))))


MINE = {"name": "mine|val", "source": "jsonl", "metric": "overlap", "options": {"file": "a.jsonl"}}


def custom(*entries: dict) -> tuple[SuiteConfig, ...]:
    return from_dict(EvalConfig, {"custom": list(entries)}, "eval").custom


def test_own_suites_join_the_catalog_and_state_their_options():
    own = custom(MINE, {"name": "street", "source": "folder", "metric": "semantic", "present_only": True})
    assert [s.name for s in find_suites(["custom"], own)] == ["mine|val", "street"]
    assert [s.name for s in find_suites(["str*", "muse|val", "mine|val"], own)] == ["street", "muse|val", "mine|val"]
    (suite,) = find_suites(["mine|val"], own)
    assert (suite.metric, suite.base, suite.options) == ("overlap", "jsonl", {"file": "a.jsonl"})
    assert "mine|val" in table(own) and "mine|val" not in table()
    assert find_suites(["mine|val"], custom({**MINE, "metric": "generalised"}))[0].teacher_forced_protocol == "two_pass"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "muse|val"}, r"eval.custom\[1\].name: 'muse\|val' is taken"),
        ({"name": "mine|val"}, r"eval.custom\[1\].name: 'mine\|val' is taken"),
        ({"name": "reason"}, r"eval.custom\[1\].name: 'reason' is taken"),
        ({"name": "a/b"}, r"eval.custom\[1\].name: 'a/b' is no name"),
        (
            {"name": "b", "metric": "overlaps"},
            r"\[1\].metric \(b\): no metric 'overlaps' \(did you mean 'overlap'",
        ),
        ({"name": "b", "source": "json"}, r"custom\[1\].source \(b\): no source 'json' \(did you mean 'jsonl'"),
        (
            {"name": "b", "options": {"files": 1}},
            r"\[1\].options \(b\): no option of jsonl 'files'.*file, images",
        ),
        ({"name": "b", "option": {}}, r"no field in eval.custom\[1\] 'option' \(did you mean 'options'"),
        ({"metric": None}, r"eval.custom\[1\].metric: expected str"),
    ],
)
def test_what_is_wrong_with_an_own_suite_is_named_with_its_place(change, message):
    with pytest.raises(ValueError, match=message):
        find_suites(["custom"], custom(MINE, {**MINE, **change}))
    with pytest.raises(ValueError, match=r"eval.custom\[0\]: needs source, metric; its fields are name, source"):
        custom({"name": "x"})


def test_own_suites_are_read_from_a_list_or_a_recipe(tmp_path):
    (tmp_path / "list.yaml").write_text(yaml.safe_dump([MINE]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"eval": {"custom": [MINE]}}))
    assert read_custom(tmp_path / "list.yaml") == read_custom(tmp_path / "recipe.yaml") == custom(MINE)
    (tmp_path / "none.yaml").write_text("system: x\n")
    (tmp_path / "bad.yaml").write_text("- {name: x\n")
    with pytest.raises(ValueError, match=r"none.yaml defines no suite; it needs eval.custom"):
        read_custom(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"bad.yaml: "):
        read_custom(tmp_path / "bad.yaml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        read_custom(tmp_path / "nowhere.yaml")


def test_a_metric_that_does_not_fit_the_data_is_refused_with_those_that_do(tmp_path):
    world = toy_world(tmp_path / "world", "jsonl", "folder")
    options = {"file": "my_queries/val.jsonl"}
    (suite,) = find_suites(["x"], custom({**MINE, "name": "x", "metric": "semantic", "options": options}))
    with pytest.raises(ValueError, match=r"'x': metric 'semantic' is for classes data, jsonl gives .* generalised"):
        suite.open(world)


def test_consecutive_expressions_are_asked_together():
    """pixellm.md 12, check 10: 17 expressions are 6, 5, 4 and 2."""
    record = Record(Path("x.jpg"), "refer", tuple(Target(f"{k}", None) for k in range(17)))
    grouped = Grouped([record], SUITES["multirefcoco|unc|val"].groups)[0]
    sizes = [len(turn.answer) for (turn,) in grouped.dialogues]
    assert grouped.kind == "multi" and sizes == [6, 5, 4, 2]
    assert [hole.target for (turn,) in grouped.dialogues for hole in turn.answer] == list(range(17))


def test_the_list_has_a_line_for_every_suite():
    lines = table().splitlines()
    assert len(lines) == len(SUITES) + 1 and all(
        line.startswith(name) for line, name in zip(lines[1:], SUITES, strict=True)
    )
