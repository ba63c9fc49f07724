"""Every suite of the catalog runs on the toy world with every system, and says what was done where the two differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evaluation.catalog import ENTRIES
from evaluation.metrics import Figure
from evaluation.protocols import FORCED, GENERATED, TWO_PASS
from evaluation.report.markdown import as_markdown, as_table
from evaluation.results import EvaluationResults
from evaluation.runner import evaluate
from evaluation.score import rescore
from evaluation.suites import GROUPS
from systems.assistant import Assistant, build
from systems.base import SYSTEMS
from tests.records import OWN
from tests.tiny_assistant import CLASSES, tiny, toy_world
from toy.world import __main__ as make_toy_dataset
from utils.config import load_recipe
from utils.flags import CONFIGS

ONE_OF_EACH_GROUP = tuple(next(suite.name for suite in ENTRIES if suite.group == group) for group in GROUPS)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), *make_toy_dataset.LAYOUTS, val_images=1)


def assistant_of(system: str) -> Assistant:
    """Random weights in the published format, or an untrained toy where no paper published any."""
    if (OWN / system).is_dir():
        return tiny(system, eager=6)
    return build(load_recipe(CONFIGS / "toy" / f"{system}.yaml"), device="cpu", trainable=False)


def run(
    assistant: Assistant, world: Path, suites, protocol: str = GENERATED, out: Path | None = None
) -> EvaluationResults:
    return evaluate(assistant, list(suites), world, protocol, 1, out, max_new_tokens=3, workers=0, classes=CLASSES)


def figures(results: EvaluationResults) -> dict[str, list[Figure]]:
    return {name: suite.figures for name, suite in results.suites.items()}


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_every_kind_of_suite_runs_with_every_system_and_is_scored_again_from_its_predictions(system, world, tmp_path):
    results = run(assistant_of(system), world, ONE_OF_EACH_GROUP, out=tmp_path)
    assert not results.missing and list(results.suites) == list(ONE_OF_EACH_GROUP)
    for suite in results.suites.values():
        assert suite.images == 1 and suite.queries and suite.figures
        assert suite.protocol == GENERATED
        assert 0 <= suite.unfinished <= suite.queries and suite.parse_failures >= 0
    again = rescore([tmp_path / "predictions"])
    assert figures(again) == figures(results)
    assert {name: suite.notes for name, suite in again.suites.items()} == {
        name: suite.notes for name, suite in results.suites.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [GENERATED, FORCED])
@pytest.mark.parametrize("system", list(SYSTEMS))
def test_every_suite_runs_with_every_system(system, protocol, world):
    results = run(assistant_of(system), world, ["all"], protocol)
    assert not results.missing and list(results.suites) == [suite.name for suite in ENTRIES]


def test_what_a_suite_means_for_a_system_that_cannot_do_it_is_said_in_log_and_results(world, tmp_path, caplog):
    lisa = assistant_of("lisa")
    with caplog.at_level("INFO", logger="assistant"):
        free = run(lisa, world, ["ade20k", "grefcoco|unc|val", "multirefcoco|unc|val"], GENERATED, tmp_path)
        forced = run(lisa, world, ["grefcoco|unc|val", "fprefcoco|berkeley_exclude_unified|val", "vqa"], FORCED)
    notes = {name: " ".join(suite.notes) for name, suite in free.suites.items()}
    assert "an answer without a mask counts as a refusal" in notes["grefcoco|unc|val"]
    assert "classes in" in notes["ade20k|val"] and "not in one list" in notes["ade20k|val"]
    assert "each target alone" in notes["multirefcoco|unc|val"]
    for text in (as_table(free), as_markdown(free), caplog.text, (tmp_path / "results.json").read_text()):
        assert "counts as a refusal" in text
    two_pass, *given = forced.suites.values()
    assert two_pass.protocol == TWO_PASS
    assert "only an empty mask counts as a refusal" in " ".join(two_pass.notes)
    assert all("leaves nothing to decide" in " ".join(suite.notes) for suite in given)


def test_a_suite_at_home_says_nothing(world):
    gsva = run(assistant_of("gsva"), world, ["grefcoco|unc|val"], FORCED)
    lasagna = run(assistant_of("lasagna"), world, ["ade20k", "refcoco|unc|val"])
    assert [suite.notes for results in (gsva, lasagna) for suite in results.suites.values()] == [[], [], []]


def test_a_suite_with_a_broken_picture_is_given_up_and_the_others_go_on(world, tmp_path):
    broken = tmp_path / "world"
    shutil.copytree(world / "ade20k", broken / "ade20k")
    shutil.copytree(world / "reason_seg", broken / "reason_seg")
    shutil.copytree(world / "toy_classes", broken / "toy_classes")
    picture = next((broken / "ade20k" / "images" / "validation").iterdir())
    picture.write_bytes(picture.read_bytes()[:200])
    assistant = assistant_of("lasagna")
    results = run(assistant, broken, ["ade20k", "cityscapes", "ReasonSeg|val"])
    assert list(results.suites) == ["ReasonSeg|val"]
    missing = results.missing
    assert missing["ade20k|val"].startswith("given up: ") and picture.name in missing["ade20k|val"]
    assert str(broken) in missing["cityscapes|val"]
