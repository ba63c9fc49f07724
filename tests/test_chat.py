"""The chat program: one question or a loop; masks, an overlay and a JSON; mistakes are reported, not fatal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import chat
from evaluation.protocols import Reply
from systems.assistant import build
from tests.records import OWN
from tests.tiny_assistant import tiny
from utils.config import load_recipe

TOY = "configs/toy/{}.yaml"
PICTURE = OWN / "lisa" / "image0.png"
PROMPT = "Where is the dog in this image?"


@pytest.fixture(scope="module")
def assistants():
    return {"lisa": tiny("lisa", eager=5), "lasagna": tiny("lasagna", eager=8)}


@pytest.fixture
def use(assistants, monkeypatch):
    """Lets the program find a loaded assistant, whose louder mask token makes it answer with masks."""

    def choose(name: str) -> None:
        monkeypatch.setattr(chat, "load_assistant", lambda args: assistants[name])

    return choose


def run(tmp_path: Path, *words: str) -> int:
    return chat.main(["--version", "any", "--vis_save_path", str(tmp_path), "--max_new_tokens", "12", *words])


def test_one_question_saves_every_mask_an_overlay_and_a_json(use, tmp_path, capsys):
    use("lisa")
    assert run(tmp_path, "--image", str(PICTURE), "--prompt", PROMPT) == 0
    report = json.loads((tmp_path / "image0.json").read_text())
    height, width = np.asarray(Image.open(PICTURE)).shape[:2]
    assert len(report["masks"]) > 1 and report["image"] == str(PICTURE)
    for entry in report["masks"]:
        mask = np.asarray(Image.open(entry["file"]))
        assert mask.shape == (height, width) and set(np.unique(mask)) <= {0, 255}
        assert int((mask == 255).sum()) == entry["area"]
        assert 0.5 < entry["score"] <= 1 if mask.any() else entry["score"] == 0
    assert np.asarray(Image.open(report["overlay"])).shape[1] == width
    (answer,) = report["answers"]
    said = capsys.readouterr().out
    assert answer["text"].count("[SEG]") == len(report["masks"]) and answer["text"] in said
    assert not answer["finished"] and "The answer was cut at --max_new_tokens 12" in said


def test_a_second_answer_about_an_image_keeps_the_first(use, tmp_path):
    use("lisa")
    for _ in range(2):
        run(tmp_path, "--image", str(PICTURE), "--prompt", PROMPT)
    assert {path.name for path in tmp_path.glob("*.json")} == {"image0.json", "image0_2.json"}


@pytest.mark.parametrize(("name", "questions"), [("lisa", 2), ("lasagna", 1)])
def test_a_class_list_is_asked_in_the_words_of_the_system(use, tmp_path, name, questions):
    use(name)
    assert run(tmp_path, "--image", str(PICTURE), "--classes", "dog, sky") == 0
    report = json.loads((tmp_path / "image0.json").read_text())
    assert len(report["answers"]) == questions and "dog" in report["answers"][0]["question"]
    if name == "lisa":
        assert {mask["name"] for mask in report["masks"]} <= {"dog", "sky"}


def test_the_loop_says_what_is_wrong_and_continues(use, tmp_path, monkeypatch, capsys):
    use("lisa")
    damaged = tmp_path / "broken.png"
    damaged.write_bytes(PICTURE.read_bytes()[:200])
    turns = {PROMPT: tmp_path / "none.jpg", "Where?": damaged, "a [SEG] b": PICTURE, "Where is it?": PICTURE}
    typed = iter(["", *(str(word) for turn in turns.items() for word in turn)])

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert run(tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "The prompt is empty" in said and "none.jpg" in said and "broken.png" in said
    assert "may not be typed" in said
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["image0.json"]


def test_bad_command_lines_are_refused(use, tmp_path):
    use("lisa")
    with pytest.raises(SystemExit, match="--version is needed"):
        chat.main([])
    for nothing in (["--prompt", " "], ["--prompt", ""], ["--classes", ""], ["--classes", " ,", "--prompt", ""]):
        with pytest.raises(SystemExit, match="needs a --prompt or a list of --classes"):
            run(tmp_path, "--image", str(PICTURE), *nothing)
    with pytest.raises(SystemExit, match=r"--model_max_length 99999: this language model has \d+ positions"):
        run(tmp_path, "--image", str(PICTURE), "--model_max_length", "99999")
    with pytest.raises(SystemExit, match="go with --image"):
        run(tmp_path, "--prompt", PROMPT)
    assert run(tmp_path, "--image", str(tmp_path / "none.png"), "--prompt", PROMPT) == 1
    assert run(tmp_path, "--image", str(PICTURE), "--classes", "sky,sky") == 1


def test_the_program_loads_a_published_checkpoint_with_the_originals_flags(tmp_path, capsys):
    words = ["--version", str(OWN / "lisa"), "--vision-tower", str(OWN / "lisa" / "clip"), "--precision=fp32"]
    words += ["--conv_type", "llava_v1", "--image_size=1024", "--lora_r", "8", "--local-rank=0", "--use_mm_start_end"]
    words += ["--vis_save_path", str(tmp_path), "--image", str(PICTURE), "--prompt", PROMPT, "--max_new_tokens", "2"]
    assert chat.main(words) == 0
    assert "--image_size has no meaning here" in capsys.readouterr().out
    assert (tmp_path / "image0_overlay.png").is_file()


def reply(assistant, text: str, masks: int) -> Reply:
    """An answer as the protocol would hand it over, with its claims read by the system."""
    drawn = torch.ones(masks, *np.asarray(Image.open(PICTURE)).shape[:2])
    return Reply(text, tuple(assistant.system.read(text)), drawn)


@pytest.mark.parametrize(
    ("name", "text", "named", "absent"),
    [
        ("gsva", "Sure, red car:[SEG], blue dog:[REJ], tall tree:[SEG].", ["red car", "tall tree"], ["blue dog"]),
        ("sesame", "There is no blue dog here, but there is red car.", [], []),
        ("sesame", "There is no blue dog here. Do you mean red car? It is [SEG].", [""], []),
        ("unified", "[REJ]. There is no blue dog here.", [], []),
        ("unified", "[REJ]. There is no blue dog here, but there is red car: [SEG].", ["red car"], []),
        (
            "unified",
            "the red car [SEG] and the tall tree [SEG]. they stand on the road.",
            ["the red car", "the tall tree"],
            [],
        ),
        ("unified", "sky[SEG]red car[REJ]tree[SEG]", ["sky", "tree"], ["red car"]),
    ],
)
def test_what_is_there_and_what_is_not_is_said(tmp_path, capsys, monkeypatch, name, text, named, absent):
    assistant = tiny(name) if (OWN / name).is_dir() else build(load_recipe(TOY.format(name)), "cpu", trainable=False)
    monkeypatch.setattr(chat, "load_assistant", lambda args: assistant)
    monkeypatch.setattr("evaluation.predictor.generate", lambda *_: [[reply(assistant, text, text.count("[SEG]"))]])
    assert run(tmp_path, "--image", str(PICTURE), "--prompt", PROMPT) == 0
    report, said = json.loads((tmp_path / "image0.json").read_text()), capsys.readouterr().out
    assert [mask["name"] for mask in report["masks"]] == named and report["absent"] == absent
    assert text in said and all(f"  {thing}: not in the image" in said for thing in absent)
    assert all(f"  {thing}: " in said or f"  {thing} (what is there instead): " in said for thing in named if thing)
    assert "  : " not in said and len({mask["colour"] for mask in report["masks"]}) == len(named)
    offered = [mask["name"] for mask in report["masks"] if mask["instead"]]
    assert offered == (named if ", but there is" in text else []) and said.count("(what is there instead)") == len(
        offered
    )
