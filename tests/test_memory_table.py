"""docs/memory.md is what the planner says of the recipes, which counts added tokens as the base's family does."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.heads import HEADS
from model.vlm import VLMS
from tools.memory import plan
from tools.memory.__main__ import main, parse
from tools.memory.activation_memory import Footprint
from tools.memory.plan import StepMemory, meta_model
from tools.memory.table import HEADINGS, ROWS, line, planned
from tools.memory.zero_memory import ParameterCounts
from utils.config import load_recipe

NOTHING = Footprint(0, 0)
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
TABLE = [text for text in PAGE.splitlines() if text.startswith("| ")]


def test_the_page_has_every_row_once_and_every_head():
    assert TABLE[0] == line(HEADINGS) and len(TABLE) == 2 + len(ROWS)
    for row, text in zip(ROWS, TABLE[2:], strict=True):
        assert f"| `{row.recipe}`" in text and all(f"`{change}`" in text for change in row.changes[:1])
        assert len(text.split(" | ")) == len(HEADINGS)
    assert {text.split(" | ")[2] for text in TABLE[2:]} == set(HEADS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.yaml"], "no recipe nothing.yaml"),
        (["configs/lisa_7b.yaml", "--set", "train.lrr=3"], "no field in train 'lrr' (did you mean 'lr'?)"),
        (["configs/lisa_7b.yaml", "--set", "system=lissa"], "no system 'lissa' (did you mean 'lisa'?)"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_a_sentence_and_a_status_of_its_own(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"plan_memory.py: {said}")


@pytest.mark.parametrize("words", ["--length 0", "--dialogues -1", "--picture 0 5", "--reserve -5", "--gpus 0"])
def test_sizes_that_make_no_plan_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(["recipe.yaml", *words.split()])
    assert words.split()[0] in capsys.readouterr().err


def test_a_base_whose_sizes_are_not_known_is_said(monkeypatch, capsys):
    monkeypatch.setattr(plan, "measure_step", lambda *_: StepMemory(ParameterCounts(1, 1), NOTHING, NOTHING))
    for name, known in (("some/model-33b", False), ("llava-v1.5-13b", True)):
        main([str(ROOT / "configs/lisa_7b.yaml"), "--set", f"model.version={name}"])
        assert ("planned with the sizes of LLaVA 7B" in capsys.readouterr().out) != known


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join((row.recipe, *row.changes[:1])))
def test_the_figures_are_the_planner_s(row):
    assert planned(row) == TABLE[2 + ROWS.index(row)]


@pytest.mark.parametrize(("name", "added"), [("lisa_llava_7b_sam2", 3), ("lisa_qwen3_2b", 1), ("lisa_internvl3_2b", 1)])
def test_only_the_tokens_that_the_family_lacks_are_added(name, added):
    """LLaMA's have no wrap of the image, those of Qwen and InternVL have."""
    model = meta_model(load_recipe(ROOT / "configs" / f"{name}.yaml"))
    rows = VLMS[model.architecture.vlm].sizes(model.architecture.vlm_config).vocabulary
    wanted = {"llava": 32003, "qwen3_vl": 151936, "internvl": 151675}  # a Qwen's padding has room for one more
    assert len(model.added_ids) == added and rows == wanted[model.architecture.vlm]
