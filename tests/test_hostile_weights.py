"""Weights folders by others: their recipe and config.json choose no path, no program and no size of this machine; and
prompts that are too long or no text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import chat
import test_sem
from data.types import IMAGE_PLACEHOLDER
from data.views import load_view
from evaluation import modes
from evaluation.predictor import Predictor, free_query
from model.checkpoints.load import load_folder
from model.checkpoints.save import save_folder
from systems.assistant import load
from systems.weights_recipe import recipe_in
from tests.records import OWN
from tests.tiny_assistant import tiny
from utils.config import (
    CacheConfig,
    DatasetConfig,
    Recipe,
    SuiteConfig,
    TaskConfig,
    TowerConfig,
    from_dict,
    load_recipe,
    to_dict,
)
from utils.plain import leaves

PICTURE = OWN / "lisa" / "image0.png"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    assistant, folder = tiny("lisa"), tmp_path_factory.mktemp("merged") / "lisa"
    save_folder(assistant.model, folder, assistant.tokenizer, assistant.recipe)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "merged"))


def change(file: Path, *keys: str, value) -> None:
    """Replaces one value deep inside a JSON or YAML file."""
    reads, writes = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    whole = reads(file.read_text())
    place = whole
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    file.write_text(writes(whole))


def test_a_recipe_sets_no_path_outside_its_folder(folder, tmp_path):
    recipe, away = load_recipe(folder), tmp_path / "away"
    model = replace(
        recipe.model,
        version=str(away),
        checkpoint_file=str(away / "w.bin"),
        vision_tower=str(away),
        vision_pretrained=str(away),
        embedding_cache=CacheConfig(str(away / "cache"), 1e9),
        tower=TowerConfig(preprocessor=str(away / "p.json")),
        allow_missing=True,
    )
    part = DatasetConfig("ade20k", 1.0, {"classes": "/etc/passwd", "ignore_unknown": True})
    data = replace(
        recipe.data,
        dataset_dir=str(away),
        index_dir=str(away),
        mixture=(
            TaskConfig("sem_seg", (DatasetConfig("ade20k", 1.0, {"classes": "/etc/passwd", "ignore_unknown": True}),)),
        ),
    )
    custom = (SuiteConfig("evil", "coco", "semantic", {"annotations": "/etc/x.json", "images": "../.."}),)
    run = replace(recipe.run, log_base_dir=str(away))
    changed = replace(recipe, model=model, data=data, run=run, eval=replace(recipe.eval, custom=custom))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(to_dict(changed)))
    assistant = load(folder, device="cpu")
    assert not away.exists() and assistant.model.head.cache is None
    assert str(away) not in json.dumps(to_dict(assistant.recipe))
    (part,) = assistant.recipe.data.mixture[0].sets
    assert part.options == {"ignore_unknown": True} and assistant.recipe.eval.custom == ()
    assert not assistant.recipe.model.allow_missing
    args = test_sem.parse(["--version", str(folder), "--list"])
    assert modes.own_suites(args) == ()


def test_what_gives_weights_meaning_is_kept(folder):
    recipe = load_recipe(folder)
    model = replace(recipe.model, conv_type="llava_llama_2", model_max_length=300, head_options={"train_encoder": True})
    inside = (SuiteConfig("mine", "jsonl", "overlap", {"file": "mine/val.jsonl"}),)
    changed = replace(recipe, model=model, eval=replace(recipe.eval, custom=inside))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(to_dict(changed)))
    found = recipe_in(folder)
    assert found.system == "lisa" and found.options == recipe.options and found.eval.custom == inside
    assert (found.model.conv_type, found.model.model_max_length) == ("llava_llama_2", 300)
    assert found.model.head_options == {"train_encoder": True}


def test_a_wording_elsewhere_is_refused_unless_the_caller_names_it(folder, tmp_path):
    change(folder / "recipe.yaml", "options", "wording", value=str(tmp_path / "mine.yaml"))
    with pytest.raises(ValueError, match=r"recipe\.yaml: options\.wording is the path .*--set options\.wording=PATH"):
        load(folder, device="cpu")
    assert load(folder, device="cpu", options={"wording": "lisa"}).system.name == "lisa"


def test_a_base_in_a_folder_of_weights_is_refused(folder):
    change(folder / "recipe.yaml", "base", value="../../secret.yaml")
    with pytest.raises(ValueError, match=r"recipe\.yaml: .*without a base"):
        load(folder, device="cpu")


def test_a_wording_template_that_asks_for_a_gigabyte_is_refused(folder, tmp_path):
    from systems.wording import load_wording  # the words of a recipe are checked like its data

    (tmp_path / "w.yaml").write_text("questions: ['Where is {phrase:>1000000000}?']\n")
    with pytest.raises(ValueError, match=r"w\.yaml: questions: .*must hold \{phrase\} once"):
        load_wording(str(tmp_path / "w.yaml"), {"questions": "phrase"})


@pytest.mark.parametrize(
    ("value", "outside"),
    [
        ("ade20k.txt", False),
        ("a/b..c/d", False),
        ("/etc/passwd", True),
        ("a/../b", True),
        ("..\\x", True),
        ("C:\\x", True),
        ("~/x", True),
        (["a", {"b": "/c"}], True),
        ({"x": ["y", 1, None]}, False),
    ],
)
def test_paths_that_leave_are_known(value, outside):
    assert leaves(value) == outside


SIZES = [
    (("text_config", "num_hidden_layers"), 10**6),
    (("text_config", "hidden_size"), 10**9),
    (("text_config", "intermediate_size"), 10**15),
    (("text_config", "num_attention_heads"), 0),
    (("text_config", "hidden_act"), "evil"),
    (("text_config", "rms_norm_eps"), float("nan")),
    (("vision_config", "num_hidden_layers"), 10**6),
    (("vision_config", "image_size"), 10**7),
    (("vision_config", "patch_size"), 0),
    (("vision_config",), "evil"),
    (("segmentation", "head_config", "vision_config", "num_hidden_layers"), 10**6),
    (("segmentation", "head_config", "vision_config", "image_size"), 10**6),
    (("segmentation", "head_config", "vision_config", "global_attn_indexes"), None),
    (("segmentation", "head_config", "mask_decoder_config", "num_multimask_outputs"), 10**6),
    (("segmentation", "head_config", "mask_decoder_config", "hidden_size"), -1),
    (("segmentation", "head_config", "prompt_encoder_config", "num_point_embeddings"), 10**9),
    (("segmentation", "head_config", "_attn_implementation"), "evil/kernel"),
    (("segmentation", "head_config"), [1]),
    (("segmentation", "sight"), {"size": 10**6}),
    (("segmentation", "sight"), {"colour": 1}),
    (("segmentation", "tower_name"), 7),
    (("segmentation",), 7),
    (("vision_feature_layer",), 10**6),
]


@pytest.mark.parametrize(("keys", "value"), SIZES, ids=[f"{'.'.join(keys)}={value}" for keys, value in SIZES])
def test_sizes_are_bounded_by_the_weights_before_anything_is_made(keys, value, folder):
    change(folder / "config.json", *keys, value=value)
    with pytest.raises(ValueError, match=r"config\.json|model\.tower|head_config"):
        load(folder, device="cpu")


@pytest.mark.parametrize("content", ["[" * 10**5, "7", "{", '{"a": 1e', "\xff"])
def test_a_damaged_config_names_the_file(content, folder):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load(folder, device="cpu")


def test_code_that_a_folder_names_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    for name in ("config.json", "tokenizer_config.json"):
        change(folder / name, "auto_map", value={"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})
        change(folder / name, "trust_remote_code", value=True)
    change(folder / "config.json", "architectures", value=["EvilForCausalLM"])
    assert load(folder, device="cpu").system.name == "lisa"


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "special_tokens_map_file", "name_or_path"])
def test_tokenizer_files_elsewhere_are_not_read(key, folder, tmp_path):
    change(folder / "tokenizer_config.json", key, value=str(tmp_path / "elsewhere"))
    assert len(load(folder, device="cpu").tokenizer) == len(
        load(folder, device="cpu").model.vlm.language.lm_head.weight
    )


@pytest.mark.parametrize("name", ["/etc", "../../clip", "~/clip"])
def test_a_tower_that_config_json_names_lies_in_the_folder_or_on_the_hub(name, folder):
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "vision_tower" not in k}, folder / "model.safetensors")
    change(folder / "config.json", "segmentation", "tower_name", value=name)
    with pytest.raises(ValueError, match=r"config\.json names the vision tower .*outside the folder.*--vision_tower"):
        load(folder, device="cpu")
    assert load(folder, device="cpu", model={"vision_tower": str(OWN / "lisa" / "clip")})


@pytest.mark.parametrize(
    "values",
    [
        {"size": 10**6},
        {"size": {}},
        {"size": "224"},
        {},
        {"size": 16, "image_std": [0, 1, 1]},
        {"size": 16, "image_mean": [1]},
        {"size": 16, "image_mean": "abc"},
        [1],
    ],
)
def test_picture_settings_are_checked(values, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        load_view(tmp_path)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny("lisa", eager=5), max_new_tokens=4)


def test_prompts_have_a_limit(predictor, monkeypatch):
    long = "where is the cat? " * 10_000
    for ask in (
        lambda: predictor.ask(PICTURE, long),
        lambda: predictor(PICTURE, [long]),
        lambda: predictor.replies([PICTURE], [[free_query(long)]]),
        lambda: predictor.assistant.encoder.prompt(f"{IMAGE_PLACEHOLDER}\n{long}"),
    ):
        with pytest.raises(ValueError, match=r"more than the limit of 32768 \(set ASSISTANT_MAX_PROMPT to raise it\)"):
            ask()
    monkeypatch.setenv("ASSISTANT_MAX_PROMPT", "20")
    with pytest.raises(ValueError, match=r"image0\.png: the prompt .*more than the limit of 20"):
        predictor.ask(PICTURE, "Where is the small dog?")


def test_a_question_beyond_the_positions_of_the_model_is_refused_however_it_is_asked(predictor):
    most = predictor.assistant.model.vlm.most_positions
    long = "sky " * most
    for ask in (
        lambda: predictor.ask(PICTURE, long),
        lambda: predictor(PICTURE, ["the dog", long]),
        lambda: predictor.classes(PICTURE, [long]),
        lambda: predictor.label_map(PICTURE, [long]),
        lambda: predictor.chat(PICTURE).ask(long),
    ):
        with pytest.raises(
            ValueError, match=rf"the question takes \d+ positions.* leaves none of {most} for an answer"
        ):
            ask()


@pytest.mark.parametrize("text", ["a \ud800 dog", "caf\udce9"])
def test_half_characters_in_prompts_are_named(text, predictor, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"holds '\\ud\w+' at character \d+, which is no character"):
        predictor.ask(PICTURE, text)
    with pytest.raises(ValueError, match="no character"):
        predictor(PICTURE, [text])
    monkeypatch.setattr(chat, "load_assistant", lambda args: predictor.assistant)
    words = ["--version", "any", "--vis_save_path", str(tmp_path), "--image", str(PICTURE)]
    assert chat.main([*words, "--prompt", text]) == 1
    assert "no character" in capsys.readouterr().out


def test_a_picture_whose_name_is_no_utf8_gets_its_answer(predictor, tmp_path, monkeypatch):
    picture = tmp_path / "caf\udce9.png"
    shutil.copy(PICTURE, picture)
    monkeypatch.setattr(chat, "load_assistant", lambda args: predictor.assistant)
    words = ["--version", "any", "--vis_save_path", str(tmp_path / "out"), "--max_new_tokens", "4"]
    assert chat.main([*words, "--image", str(picture), "--prompt", "Where is it?"]) == 0
    (file,) = (tmp_path / "out").glob("*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["image"] == str(picture)


def test_pictures_of_the_predictor_have_a_limit(predictor, monkeypatch):
    monkeypatch.setenv("ASSISTANT_MAX_PIXELS", "99")
    for picture in (Image.new("RGB", (10, 10)), np.zeros((10, 10, 3), np.uint8), PICTURE):
        with pytest.raises((ValueError, OSError), match=r"more than .*ASSISTANT_MAX_PIXELS"):
            predictor.ask(picture, "Where is it?")


def test_experiments_stay_in_the_folder_of_runs():
    recipe = {"run": {"exp_name": "group/one"}}
    assert from_dict(Recipe, recipe).run.folder == Path("runs/group/one")
    for name in ("../x", "a/../../x", "/x", "..", "~/x"):
        with pytest.raises(ValueError, match=r"exp_name: .*log_base_dir"):
            from_dict(Recipe, {"run": {"exp_name": name}})


def test_a_tokenizer_with_ids_beyond_its_size_is_refused(folder, monkeypatch):
    assistant = load(folder, device="cpu")
    names = {**assistant.tokenizer.get_vocab(), "zzz": 99_999}
    monkeypatch.setattr(assistant.tokenizer, "get_vocab", lambda: names)
    with pytest.raises(ValueError, match=r"the tokenizer's ids go up to 99999, but it has only \d+ tokens"):
        load_folder(folder, assistant.system.tokens, assistant.tokenizer)
