"""Recipes are checked when they are read; those of earlier versions load; the page of all fields is fresh."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from systems.base import systems_accepting
from training.engine import engine_settings
from utils import renamed
from utils.config import Recipe, TrainConfig, from_dict, load_recipe, load_yaml, merge, override, save_recipe, to_dict
from utils.flags import resolve
from utils.reference import reference, sections
from utils.renamed import MOVED, RENAMED, find_config, with_new_names

ROOT = Path(__file__).resolve().parents[1]
OLD = {  # every field of earlier recipes, with a value that is not its default
    "model": {
        "decoder_heads": 4,
        "head": {"train_encoder": True},
        "weight": "w.bin",
        "tower": {"positions": "correct"},
    },
    "data": {"sampling": "once"},
    "loss": {"alpha": 3.0, "refinement": "paper", "refused": "counted"},
    "train": {"clip": 0.5},
    "eval": {"pictures": 9, "no_eval": True},
    "options": {"blank_after_list": True},
}
NEW = {
    "model": {
        "head_options": {"train_encoder": True, "decoder_heads": 4},
        "checkpoint_file": "w.bin",
        "tower": {"position_resize": "correct"},
    },
    "data": {"sampling": "epoch"},
    "loss": {"overlap_weight": 3.0, "overlap_refinement": "paper", "count_refused": True},
    "train": {"grad_clip": 0.5},
    "eval": {"num_examples": 9, "validate": False},
    "options": {"blanks": "all"},
}


@pytest.fixture
def messages(monkeypatch) -> Iterator[list[str]]:
    """The warnings about earlier names. Each is given once per process, so the record of other tests is cleared."""
    renamed.announce.cache_clear()
    said: list[str] = []
    monkeypatch.setattr(renamed.log, "warning", lambda text, *values: said.append(text % values))
    yield said
    renamed.announce.cache_clear()


@pytest.mark.parametrize(
    ("field", "value", "nearest", "choices"),
    [
        ("model.precision", "fp8", None, "auto, bf16, fp16, fp32"),
        ("model.attn_implementation", "flash", None, "auto, eager, flash_attention_2, sdpa"),
        ("model.tokenization", "transformers-4.30", "transformers-4.31", "transformers-4.31, transformers-4.44"),
        ("model.train_vocabulary", "new", None, "full, new_tokens"),
        ("model.tower.stats", "clip", None, "sam, tower"),
        ("model.tower.position_resize", "bicubic", None, "correct, released"),
        ("data.on_bad_sample", "ignore", None, "raise, skip"),
        ("data.long_rows", "cat", "cut", "cut, cut_rounds, error, keep"),
        ("data.exclude_val", "all", None, "cross_refer, eval_suites, off, refer_family"),
        ("data.sampling", "twice", None, "epoch, rates"),
        ("loss.mask_size", "ful", "full", "decoder, full"),
        ("loss.overlap_refinement", "all", None, "none, overlap_only, paper"),
        ("train.zero_stage", 4, None, "0, 1, 2, 3"),
        ("train.zero_stage", True, None, "0, 1, 2, 3"),
        ("train.offload", "disk", None, "all, none, optimizer"),
        ("train.on_bad_loss", "skipp", "skip", "skip, stop"),
        ("eval.protocol", "forced", None, "generate, teacher_forced"),
    ],
)
def test_a_value_that_is_no_choice_is_named_with_all_there_are(field, value, nearest, choices):
    values = value
    for key in reversed(field.split(".")):
        values = {key: values}
    with pytest.raises(ValueError) as error:
        from_dict(Recipe, values)
    hint = f" (did you mean '{nearest}'?)" if nearest else ""
    said = str(error.value)
    assert said.startswith(f"no {field} '{value}'{hint if nearest else ''}") and said.endswith(f"have: {choices}")


def test_a_bare_off_and_a_quoted_number_are_choices():
    values = yaml.safe_load("data: {exclude_val: off}\ntrain: {zero_stage: '3'}")
    recipe = from_dict(Recipe, values)
    assert (recipe.data.exclude_val, recipe.train.zero_stage) == ("off", 3)


def test_every_field_has_a_line_of_help_and_the_page_is_fresh():
    for section, cls in sections(Recipe, ""):
        for entry in dataclasses.fields(cls):
            is_section = section == "" and dataclasses.is_dataclass(entry.default)
            assert entry.metadata["help"] or is_section, f"{section}.{entry.name}"
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == reference(), "docs/configuration.md is stale: python -m utils.config > docs/configuration.md"


def test_old_names_load_with_a_message_for_each(messages):
    assert from_dict(Recipe, OLD) == from_dict(Recipe, NEW)
    assert len(messages) == len(RENAMED) == len(set(messages))
    assert "the recipe field loss.alpha is now loss.overlap_weight" in messages
    assert "the recipe field loss.refused: counted is now loss.count_refused: true" in messages
    assert "the recipe field data.sampling: once is now data.sampling: epoch" in messages
    from_dict(Recipe, OLD)
    assert len(messages) == len(RENAMED), "each once"


def test_names_of_today_are_not_touched(messages):
    assert with_new_names(NEW) == NEW and not messages


@pytest.mark.parametrize("name", ["recipe.yaml", "above.yaml"])
def test_old_files_load_also_as_a_base(tmp_path, messages, name):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(OLD))
    (tmp_path / "above.yaml").write_text("base: recipe.yaml\n")
    assert load_recipe(tmp_path / name) == load_recipe(tmp_path) == from_dict(Recipe, NEW)


def test_a_saved_recipe_of_before_states_a_default_that_is_none_today(tmp_path, messages):
    """Old run folders state decoder_heads: 8, which counted less than the head's own option, and is every head's
    default: a run resumes with a recipe that does not state it."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"decoder_heads": 8, "head": {}}}))
    assert load_recipe(tmp_path).model.head_options == {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"decoder_heads": 8, "head": {"decoder_heads": 4}}}))
    assert load_recipe(tmp_path).model.head_options == {"decoder_heads": 4}
    (tmp_path / "above.yaml").write_text(yaml.safe_dump({"base": "recipe.yaml", "model": {"decoder_heads": 2}}))
    assert load_recipe(tmp_path / "above.yaml").model.head_options == {"decoder_heads": 2}


@pytest.mark.parametrize(
    ("assignment", "section", "name", "value"),
    [
        ("loss.alpha=3", "loss", "overlap_weight", 3),
        ("loss.refused=counted", "loss", "count_refused", True),
        ("eval.no_eval=true", "eval", "validate", False),
        ("model.head.fusion=trained", "model", "head_options", {"width": 8, "fusion": "trained"}),
        ("model.head={fusion: trained}", "model", "head_options", {"fusion": "trained"}),
        ("model.decoder_heads=4", "model", "head_options", {"width": 8, "decoder_heads": 4}),
        ("model.tower.positions=correct", "model", "tower", {"position_resize": "correct"}),
    ],
)
def test_old_names_can_be_set(messages, assignment, section, name, value):
    values = override({"model": {"head_options": {"width": 8}}}, assignment)
    assert values[section][name] == value and len(messages) == 1


@pytest.mark.parametrize("name", sorted(MOVED))
def test_recipes_of_before_are_found_where_they_are_now(tmp_path, messages, name):
    if name.endswith(".json"):
        assert find_config(ROOT / "configs" / name) == ROOT / "configs" / MOVED[name]
        return
    now = load_recipe(ROOT / "configs" / MOVED[name])
    assert load_recipe(ROOT / "configs" / name) == now
    (tmp_path / "mine.yaml").write_text(f"base: {ROOT}/configs/{name}\n")
    assert load_recipe(tmp_path / "mine.yaml") == now
    assert messages[-1] == f"{ROOT}/configs/{name} is now {ROOT}/configs/{MOVED[name]}"


def test_a_file_of_ones_own_at_the_old_place_counts(tmp_path):
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "lisa.yaml").write_text("system: gsva\n")
    (tmp_path / "lisa.yaml").write_text("system: lisa\n")
    assert load_yaml(tmp_path / "lisa.yaml") == {"system": "lisa"}


def test_the_length_of_training_is_given_in_one_way():
    train = TrainConfig()
    assert (train.steps, train.epochs) == (None, 10)
    assert TrainConfig(steps=7).epochs is None and TrainConfig(steps=7).total_steps == 7
    assert TrainConfig(epochs=3, steps_per_epoch=5).total_steps == 15
    for values in ({"epochs": 3}, {"steps_per_epoch": 5}, {"epochs": 3, "steps_per_epoch": 5}):
        with pytest.raises(ValueError, match=r"train\.steps \(7\) and train\.\w+ \(\d\).*both say how long"):
            from_dict(Recipe, {"train": {"steps": 7, **values}})
    with pytest.raises(ValueError, match=r"eval\.every_steps goes with train\.steps"):
        from_dict(Recipe, {"eval": {"every_steps": 5}})


def test_one_way_to_give_the_length_replaces_the_other_below_it(tmp_path):
    epochs, steps = {"train": {"epochs": 3, "steps_per_epoch": 5, "lr": 1.0}}, {"train": {"steps": 7}}
    assert merge(epochs, steps) == {"train": {"lr": 1.0, "steps": 7}}
    assert merge(steps, epochs) == epochs
    assert merge(steps, {"train": {"epochs": 2}}) == {"train": {"epochs": 2}}
    assert override(epochs, "train.steps=7") == {"train": {"lr": 1.0, "steps": 7}}
    assert override(steps, "train.steps_per_epoch=9") == {"train": {"steps_per_epoch": 9}}
    (tmp_path / "mine.yaml").write_text(f"base: {ROOT}/configs/lisa_7b.yaml\ntrain: {{steps: 1000}}\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.train.total_steps == 1000
    assert load_recipe(save_recipe(recipe, tmp_path)) == recipe == from_dict(Recipe, to_dict(recipe))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {lrr: 1}", "no field in train 'lrr' (did you mean 'lr'?)"),
        ("off: 1", "no field in the recipe 'False'; have: data, "),
        ("model: {lora: {3: 1}}", "no field in model.lora '3'"),
        ("base:", "base must be the name of a recipe file, got None"),
        ("base: ''", "base must be the name of a recipe file, got ''"),
        ("train: {time_limit_minutes: 11:30:00}", "train.time_limit_minutes: expected float, got '11:30:00'"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    for read in (load_recipe, lambda path: resolve(["--config", str(path)], systems_accepting)):
        with pytest.raises(ValueError) as error:
            read(file)
        assert str(error.value).startswith(f"{file}: {said}")


def test_a_folder_in_place_of_a_recipe_says_where_the_recipe_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no recipe {tmp_path}; it is a folder; a run's is .*recipe.yaml"):
        load_yaml(tmp_path)


def test_numbers_are_those_that_people_mean(tmp_path):
    """YAML 1.1 reads 010 as 8 and 5e8 as text. Only where a number is due: a folder may be called 5e8."""
    zero = "zero_options: {a: 5e8, b: {c: -1E-3}, d: e5}"
    (tmp_path / "mine.yaml").write_text(
        f"options: {{folder: '5e8'}}\ntrain: {{steps: 100, batch_size: 010, lr: 5e-4, {zero}}}"
    )
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.train.batch_size == 10 and recipe.train.lr == 5e-4 and recipe.options == {"folder": "5e8"}
    settings = engine_settings(recipe, 10, torch.device("cpu"))["zero_optimization"]
    assert (settings["a"], settings["b"], settings["d"]) == (5e8, {"c": -1e-3}, "e5")


def test_the_home_folder_may_be_a_tilde_in_every_field_that_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("data: {dataset_dir: ~/data, index_dir: ~/index}")
    (tmp_path / "mine.yaml").write_text("base: ~/base.yaml\nmodel: {embedding_cache: {folder: ~/cache}}")
    recipe = load_recipe(tmp_path / "mine.yaml")
    folders = (recipe.data.dataset_dir, recipe.data.index_dir, recipe.model.embedding_cache.folder)
    assert folders == tuple(str(tmp_path / name) for name in ("data", "index", "cache"))
    assert from_dict(Recipe, {"train": {"resume": "~/run"}}).train.resume == str(tmp_path / "run")


def test_an_error_names_the_file_that_has_it(tmp_path):
    for low, middle, mine, error in (
        ("train: {lr: fast}", "", "loss: {dice: 1.0}", "low.yaml: train.lr: expected float, got 'fast'"),
        ("train: {lr: 1.0}", "loss: {dice: heavy}", "", "middle.yaml: loss.dice: expected float, got 'heavy'"),
        ("train: {lr: 1.0}", "", "loss: {dice: light}", "mine.yaml: loss.dice: expected float, got 'light'"),
    ):
        (tmp_path / "low.yaml").write_text(low)
        (tmp_path / "middle.yaml").write_text(f"base: low.yaml\n{middle}")
        (tmp_path / "mine.yaml").write_text(f"base: middle.yaml\n{mine}")
        with pytest.raises(ValueError, match=rf"^{re.escape(f'{tmp_path}/{error}')}"):
            load_recipe(tmp_path / "mine.yaml")
        with pytest.raises(ValueError, match=rf"^{re.escape(f'{tmp_path}/{error}')}"):
            resolve(["--config", str(tmp_path / "mine.yaml")], systems_accepting)


def test_a_section_that_is_set_keeps_the_fields_that_are_not_named():
    values = {"model": {"lora": {"r": 4, "target_modules": ["o_proj"]}}, "train": {"epochs": 3, "lr": 1.0}}
    assert override(values, "model.lora={r: 16}")["model"] == {"lora": {"r": 16, "target_modules": ["o_proj"]}}
    assert override(values, "model.embedding_cache={folder: a}")["model"]["embedding_cache"] == {"folder": "a"}
    assert override(values, "train={steps: 7}")["train"] == {"lr": 1.0, "steps": 7}
    assert override({"options": {"a": 1}}, "options={b: 2}") == {"options": {"b": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("/data/llava #2", "/data/llava #2"), ("'a #b'", "a #b"), ("3e-4", "3e-4"), ("null", None), ("a#b", "a#b")],
)
def test_a_value_that_is_set_has_no_comments(text, value):
    assert override({}, f"model.version={text}")["model"]["version"] == value
