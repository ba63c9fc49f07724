"""A published folder of Sa2VA or UniPixel answers as any other, without an option, and its code is never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import chat
from data.patch_view import PatchView
from evaluation.predictor import Predictor
from model.heads import sam2_weights
from model.heads.sam2 import Decoding
from systems.assistant import Assistant, load
from tests.records import OWN
from tests.tiny_released import FOLDERS, KNOWN_TRUNK, MARK, write_released
from tools import convert_weights

PICTURE = OWN / "lisa" / "image0.png"
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def known():
    """The trunk of the tiny folders counts as a released one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sam2_weights._HIERA, "hiera_toy", KNOWN_TRUNK)
        yield


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, known, tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def assistant(folder) -> Assistant:
    return load(folder, device="cpu")


def test_its_settings_are_those_of_the_release(assistant, folder):
    view, head = assistant.model.vlm.view, assistant.model.head
    assert isinstance(view, PatchView)
    published = Decoding("best_of_three", 2, "one_step", "bilinear", "object")
    side, resize, limits = 768, "once", (100_352, 3_211_264)
    if assistant.system.name == "sa2va":
        published = Decoding("best_of_three", 2, "two_step", "pil_bicubic", "none")
        side, resize, limits = 1024, "twice", (401_408, 1_605_632)
    assert head.decoding == published and head.view.size == side
    assert (view.resize, view.min_pixels, view.max_pixels) == (resize, *limits)
    report = assistant.model.report
    assert not report.missing and not report.unexpected and not report.fresh and len(report.ignored) >= 7
    assert not (folder / MARK).exists()


def test_its_prompts_are_those_of_the_release(assistant):
    """sa2va.md 4.3, unipixel.md 2."""
    words = assistant.tokenizer.decode([index for index in assistant.encoder.prompt("<image>\nWhere?") if index >= 0])
    with_system = assistant.system.name == "unipixel" or assistant.model.architecture.vlm == "qwen2_5_vl"
    break_ = "" if assistant.system.name == "unipixel" else "\n"
    opening = SYSTEM_TURN if with_system else ""
    ending = f"<|vision_end|>{break_}Where?<|im_end|>\n<|im_start|>assistant\n"
    assert words == f"{opening}<|im_start|>user\n<|vision_start|>{ending}"


def test_the_chat_program_answers(folder, tmp_path, capsys):
    arguments = ["--version", str(folder), "--image", str(PICTURE), "--prompt", "Please segment the dog in this image."]
    assert chat.main([*arguments, "--vis_save_path", str(tmp_path), "--max_new_tokens", "12"]) == 0
    report = json.loads((tmp_path / "image0.json").read_text(encoding="utf-8"))
    token = "<|seg|>" if "unipixel" in folder.name else "[SEG]"
    text = report["answers"][0]["text"]
    assert text.count(token) - len(report["masks"]) in (0, 1) and report["masks"]  # a last token has no mask (Sa2VA)
    for entry in report["masks"]:
        assert np.asarray(Image.open(entry["file"])).shape == np.asarray(Image.open(PICTURE)).shape[:2]
    assert not (folder / MARK).exists() and "code was run" not in capsys.readouterr().out


def test_the_api_answers(folder):
    answer = Predictor.from_pretrained(folder, max_new_tokens=8, device="cpu").ask(PICTURE, "Where is the dog?")
    present = [one for one in answer.segments if one.present]
    assert present and all(0 <= one.score <= 1 for one in present)
    assert not (folder / MARK).exists()


def test_converted_to_a_folder_of_ours_it_is_the_same(folder, assistant, tmp_path):
    out = tmp_path / "ours"
    assert convert_weights.main(["--version", str(folder), "--save_path", str(out)]) == 0
    again = load(out, device="cpu")
    assert again.system.name == assistant.system.name and again.views == assistant.views
    assert again.model.head.decoding == assistant.model.head.decoding
    assert again.encoder.prompt("<image>Hi") == assistant.encoder.prompt("<image>Hi")
    state = assistant.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    theirs = {path.name for path in folder.glob("*.py")}
    assert theirs and not theirs & {path.name for path in out.iterdir()}


def test_an_unknown_trunk_asks_for_what_no_shape_shows(folder, monkeypatch):
    monkeypatch.delitem(sam2_weights._HIERA, "hiera_toy")
    with pytest.raises(ValueError, match=r"no released size.*window_size_per_stage.*model\.head_options\.sizes"):
        load(folder, device="cpu")


def test_another_wrapper_of_remote_code_is_refused_by_name(folder, tmp_path):
    """Of an InternVL, which is not here: no import, but the classes that are known."""
    other = shutil.copytree(folder, tmp_path / "other")
    values = json.loads((other / "config.json").read_text(encoding="utf-8"))
    values |= {
        "architectures": ["Sa2VAChatModel"],
        "model_type": "sa2va_chat",
        "vision_config": {"model_type": "internvit"},
    }
    values["auto_map"] = {"AutoModel": "modeling_released.Sa2VAChatModel"}
    (other / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no vision-language model 'sa2va_chat'; have: .*llava.*qwen2_5_vl, qwen3_vl"):
        load(other, device="cpu")
    assert not (folder / MARK).exists() and not (other / MARK).exists()


@pytest.mark.parametrize(("size", "message"), [(10**9, "ASSISTANT_MAX_VIEW"), (770, "multiple of 32"), ("x", "int")])
def test_a_hostile_size_is_refused(folder, tmp_path, size, message):
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "sam2_image_size" not in values:
        pytest.skip("this release has the side of its view in its code")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**values, "sam2_image_size": size}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(other, device="cpu")
