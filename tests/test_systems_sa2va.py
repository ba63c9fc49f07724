"""Sa2VA's and UniPixel's words, tokens and reading, and what the `config.json` of their releases means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.encode import Encoder
from data.tokens import load_tokenizer
from data.types import Mask, Record, Target, Turn
from systems.assistant import _inferred, _with_overrides
from systems.base import SYSTEMS, build_system
from systems.sa2va import LISTS
from systems.wording import load_wording
from tests.records import OWN, ROOT
from utils.config import load_recipe, merge, to_dict

QWEN3 = {
    "architectures": ["Sa2VAChatModelQwen"],
    "model_type": "sa2va_chat",
    "text_config": {"model_type": "qwen3_vl_text"},
    "vision_config": {"model_type": "qwen3_vl"},
}
QWEN2_5 = {
    "auto_map": {"AutoConfig": "configuration_x.Sa2VAChatConfigQwen", "AutoModel": "modeling_x.Sa2VAChatModelQwen"},
    "model_type": "sa2va_chat",
    "text_config": {"architectures": ["Sa2VAChatModelQwen"], "model_type": "qwen2_5_vl_text"},
    "vision_config": {"model_type": "qwen2_5_vl"},
}
UNIPIXEL = {"architectures": ["PixelQwen2_5_VLForConditionalGeneration"], "sam2_hidden_tokens": 2}


def mask() -> np.ndarray:
    return np.ones((2, 2), bool)


def record(kind: str, *phrases: str, absent: tuple[str, ...] = (), **fields) -> Record:
    targets = [Target(phrase, mask) for phrase in phrases] + [Target(phrase, None) for phrase in absent]
    return Record(Path("photo.jpg"), kind, tuple(targets), **fields)


def converse(system: str, record: Record, seed: int = 0, **options):
    return build_system(system, options).task.converse(record, np.random.default_rng(seed))


def holes(dialogue) -> list[int]:
    return [part.target for turn in dialogue for part in turn.answer if isinstance(part, Mask)]


# --- Sa2VA


def test_tokens_stand_in_the_order_of_their_published_ids():
    tokens = build_system("sa2va").tokens
    assert tokens.added == ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")
    assert (tokens.mask, tokens.refuse, tokens.read, tokens.norm) == (("[SEG]",), None, "at", "after")
    assert build_system("sa2va", {"norm": "before"}).tokens.norm == "before"
    with pytest.raises(ValueError, match=r"options.norm: 'both' is not a choice; have: after, before"):
        build_system("sa2va", {"norm": "both"})


def test_expressions_are_turns_of_one_dialogue_drawn_with_replacement():
    """sa2va.md 5.3: five a sample, in lower case, the final full stop cut; the image stands in the first question."""
    names, drawn = ("The LEFT man. ", "a Dog", "red car"), []
    templates = load_wording("sa2va", LISTS).lists["phrase"]
    for seed in range(60):
        (dialogue,) = converse("sa2va", record("refer", *names, absent=("a unicorn",)), seed)
        assert len(dialogue) == 5 and all(len(holes((turn,))) == 1 for turn in dialogue)
        assert dialogue[0].question.startswith("<image>\n") and "<image>" not in dialogue[1].question
        for turn, index in zip(dialogue, holes(dialogue), strict=True):
            asked = {template.format(phrase=names[index].strip(" .").lower()) for template in templates}
            assert turn.question.removeprefix("<image>\n") in asked
        drawn += holes(dialogue)
    assert [drawn.count(index) / 300 for index in range(3)] == pytest.approx([1 / 3] * 3, abs=0.12)
    (alone,) = converse("sa2va", record("refer", "a dog"))
    assert holes(alone) == [0] * 5, "one expression is asked for five times, as released"
    assert converse("sa2va", record("refer", absent=("a unicorn",))) == []
    (two,) = converse("sa2va", record("refer", *names), num_classes_per_sample=2)
    assert len(two) == 2


def test_classes_are_drawn_without_replacement():
    names = tuple(f"Thing {index}" for index in range(7))
    (dialogue,) = converse("sa2va", record("classes", *names, vocabulary=(*names, "Other")))
    assert len(set(holes(dialogue))) == len(dialogue) == 5
    (dialogue,) = converse("sa2va", record("classes", *names[:3], vocabulary=names))
    assert holes(dialogue) == [0, 1, 2]


def test_several_objects_are_named_in_the_format_of_captions():
    one = record("multi", "cup", "big spoon", dialogues=((Turn("What is there?", (Mask(0), Mask(1))),),))
    ((turn,),) = converse("sa2va", one)
    assert turn.question.startswith("<image>\nWhat is there? ")
    assert turn.answer == ("<p> cup </p> ", Mask(0), " and <p> big spoon </p> ", Mask(1), ".")
    tokens = build_system("sa2va").tokens
    tokenizer = load_tokenizer(OWN / "lisa", tokens)
    row = Encoder(tokenizer, tokens).encode((turn,))
    ids = {name: tokenizer.get_vocab()[name] for name in tokens.added}
    assert [i for i in row.ids if i in ids.values()] == [ids[name] for name in ("<p>", "</p>", "[SEG]") * 2]
    assert [row.ids[place] for (place,) in row.mask_positions] == [ids["[SEG]"]] * 2


def test_every_kind_of_record_is_answered():
    why = ((Turn("<image>\nwhy", ("It swims.",)),),)
    for seed in range(10):
        for (turn,) in converse("sa2va", record("reason", "What swims?", dialogues=why), seed):
            assert "What swims?" in turn.question
    asked = ((Turn("<image>\nHi", ("Hello.",)), Turn("And?", ("Yes.",))),)
    assert converse("sa2va", record("vqa", dialogues=asked)) == list(asked)


def test_sa2va_asks_its_published_prompt():
    task = build_system("sa2va").task
    (query,) = task.queries(record("refer", "The left man "))
    assert query.question == "<image>\n Please segment the left man in this image."
    assert query.reference_answer == (Mask(0), ".") and query.phrases == ("the left man",)
    (query,) = task.queries(record("reason", "What swims?"))
    assert query.question == "<image>\n What swims? Please output segmentation mask."
    first, second = task.queries(record("classes", "Sky", vocabulary=("wall", "Sky")))
    assert first.question == "<image>\n Please segment wall in this image." and second.targets == (0,)
    several = record("multi", "cup", "spoon", dialogues=((Turn("", (Mask(0), Mask(1))),),))
    (query,) = task.queries(several)
    assert query.question == "<image>\n Please segment cup and spoon in this image."
    assert query.phrases == ("cup", "spoon")


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("Sure, it is [SEG].", [("", 0)]),
        ("[SEG], [SEG] and [SEG]", [("", 0), ("", 1), ("", 2)]),
        ("<p> A boy </p> [SEG] eats <p>a  pizza</p>[SEG] in a room.", [("A boy", 0), ("a pizza", 1)]),
        ("<p> two men </p> [SEG] [SEG]", [("two men", 0), ("", 1)]),
        ("<p> a dog </p> sleeps: [SEG]", [("", 0)]),
        ("<p> broken <p> cat </p> [SEG]", [("cat", 0)]),
        ("<p> a boy </p> runs to [SEG] and a girl </p> [SEG]", [("", 0), ("", 1)]),
        ("There is none.", []),
        ("", []),
    ],
)
def test_reading(answer, claims):
    assert [(claim.phrase, claim.mask) for claim in build_system("sa2va").read(answer)] == claims


# --- UniPixel


def test_unipixel_puts_no_break_after_the_image():
    for kind in ("refer", "reason", "multi"):
        fields = {"dialogues": ((Turn("Which?", (Mask(0),)),),)} if kind == "multi" else {}
        one = record(kind, "Red Car", **fields)
        (dialogue,) = converse("unipixel", one)
        assert dialogue[0].question.startswith("<image>") and "\n" not in dialogue[0].question
        (query,) = build_system("unipixel").task.queries(one)
        assert query.question.startswith("<image>") and "\n" not in query.question
    (query,) = build_system("unipixel").task.queries(record("refer", "Red Car"))
    assert query.question == "<image>Please segment the red car in this image."


def test_unipixels_tokens_and_reading():
    system = build_system("unipixel")
    assert system.tokens.added == ("<|ref|>", "<|seg|>", "<|mem|>")
    assert (system.tokens.read, system.tokens.norm) == ("before", "before")
    claims = system.read("A pizza <|seg|> and a glass <|seg|>.")
    assert [(claim.phrase, claim.mask) for claim in claims] == [("", 0), ("", 1)]


# --- published folders


def inferred(values: dict, folder: Path, wanted: str | None = None):
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "modeling_x.py").write_text("raise SystemExit('code of a folder was run')")
    return _inferred(folder, wanted, bare=False)


RECIPES = {"sa2va_qwen3_4b": QWEN3, "sa2va_qwen2_5_3b": QWEN2_5, "sa2va_qwen2_5_7b": QWEN2_5, "unipixel_3b": UNIPIXEL}
OF_TRAINING = {"version", "vision_pretrained", "lora", "tokenizer_legacy"}  # where weights are, and how they train


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_folder_means_what_its_recipe_says(name, tmp_path):
    """sa2va.md 2.3: the state is read before the norm for Qwen3-VL, after it for Qwen2.5-VL."""
    found, recipe = inferred(RECIPES[name], tmp_path), load_recipe(ROOT / "configs" / f"{name}.yaml")
    assert found.system == recipe.system
    ours, theirs = (build_system(one.system, one.options) for one in (recipe, found))
    assert (ours.tokens, ours.task) == (theirs.tokens, theirs.task)
    assert ours.released.prompt_template == theirs.released.prompt_template
    settings, asked = to_dict(found.model), to_dict(recipe.model)
    differ = {key for key in settings if settings[key] != asked[key]} - OF_TRAINING
    if found.system == "sa2va":  # inference resizes twice, training once (sa2va.md 3.1)
        assert (settings["tower"].pop("resize"), asked["tower"].pop("resize")) == ("twice", None)
    assert differ <= {"tower"} and settings["tower"] == asked["tower"]
    with pytest.raises(ValueError, match=f"holds a '{found.system}' assistant, 'lisa' was asked for"):
        inferred(RECIPES[name], tmp_path, "lisa")


def test_settings_of_a_caller_join_those_of_the_release(tmp_path):
    """An option of the mask head or a limit leaves the others as published."""
    given = {"head_options": {"reject": "object"}, "tower": {"resize": "once"}}
    found = inferred(QWEN3, tmp_path)
    recipe = _with_overrides(found, None, given, torch.device("cpu"))
    assert recipe.model.head_options == {**found.model.head_options, "reject": "object"}
    assert recipe.model.tower == replace(found.model.tower, resize="once")


def test_a_template_of_prompts_must_be_one():
    with pytest.raises(ValueError, match="no conversation template 'qwen'"):
        build_system("sa2va", {"prompt_template": "qwen"})


def test_sizes_of_a_published_unipixel_are_read(tmp_path):
    recipe = inferred({**UNIPIXEL, "sam2_hidden_tokens": 3, "sam2_image_size": 512}, tmp_path)
    assert (recipe.model.text_projection, recipe.model.prompts_per_token) == ("norm_mlp", 3)
    assert recipe.model.image_size == 512
    with pytest.raises(ValueError, match=r"config.json: model.prompts_per_token: .*'many'"):
        inferred(merge(UNIPIXEL, {"sam2_hidden_tokens": "many"}), tmp_path)


def test_names_of_classes_may_be_anything(tmp_path):
    odd = {**QWEN3, "auto_map": {"AutoModel": ["x", None], "AutoConfig": 7}, "text_config": {"architectures": "x"}}
    assert inferred(odd, tmp_path).system == "sa2va"


def test_the_new_systems_are_registered():
    assert {"sa2va", "unipixel"} <= set(SYSTEMS)
