"""A merged folder loads where there are torch and transformers, but not this project, with the same answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from data.tokens import mask_ids
from evaluation.auto_assistant import SegmentationAssistant
from evaluation.predictor import Predictor
from model.checkpoints.files import read_tensors
from model.checkpoints.save import save_folder
from systems.assistant import Assistant, build, load
from systems.base import SYSTEMS, build_system
from systems.wording import wording_file
from tests import ask_elsewhere
from tests.records import OWN
from tests.tiny_assistant import tiny
from tests.tiny_base import base_tensors, write_base, write_sam
from tests.tiny_qwen import stock_model
from tests.tiny_run import environment, write_recipe
from tests.tiny_sam2 import SIDES, stock
from tests.tiny_words import tiny_qwen_tokenizer
from tools.portable.copies import AVAILABLE, ROOT, copies
from tools.portable.folder import CLASS, ENTRY, complete, own_modules
from utils.config import load_recipe

TOKENS = 12  # of an answer
QUESTION = "Where does the light come from?"
PIXEL = {"mask_head": "pixel", "tower": {"pad": True}, "head_options": {"levels": [-2], "width": 32, "mlp_dim": 64}}
# Packages of requirements.txt that somebody with torch and transformers need not have.
WITHOUT = ("accelerate", "cv2", "deepspeed", "matplotlib", "peft", "pycocotools", "rapidfuzz", "sacrebleu", "scipy")
LOADED = Path("street.jpg")


def eager(assistant: Assistant, loudness: float = 400.0) -> Assistant:
    """The same assistant, whose answers to anything have mask tokens."""
    token = mask_ids(assistant.tokenizer, assistant.system.tokens)[0]
    name = next(name for name, _ in assistant.model.named_parameters() if name.endswith("lm_head.weight"))
    assistant.model.get_parameter(name).data[token] *= loudness
    return assistant


def made(folder: Path, **model) -> Assistant:
    """LISA as a recipe with these parts of a model builds it, before any training."""
    return eager(build(load_recipe(write_recipe(folder, model=model)), "cpu", trainable=False))


def write(assistant: Assistant, folder: Path) -> Path:
    """A merged folder, as the merge program writes it."""
    parts = (assistant.model, folder, assistant.tokenizer, assistant.recipe)
    save_folder(*parts, more=lambda draft: complete(draft, assistant, folder.name))
    return folder


def published() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in read_tensors(OWN / "lisa").items()}


def elsewhere(place: Path, *words: str) -> str:
    """Runs Python in `place`, apart from this project and from the user's packages; returns what it prints."""
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    variables |= {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", *words], cwd=place, env=variables, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


def same_elsewhere(place: Path, *folders: str, without: tuple[str, ...] = WITHOUT) -> None:
    """Asserts that AutoModel elsewhere and `Predictor` here answer alike, to the last bit of every mask."""
    # without loss, so that OpenCV and Pillow read the same
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(place / "photo.png")
    settings = {"without": without, "folders": folders, "image": "photo.png", "question": QUESTION, "tokens": TOKENS}
    (place / "settings.json").write_text(json.dumps(settings | {"project": f"{ROOT}/"}))
    shutil.copy(ask_elsewhere.__file__, place / "ask.py")
    elsewhere(place, "ask.py", "settings.json")
    heard = json.loads((place / "heard.json").read_text())
    for name in folders:
        own = Predictor.from_pretrained(place / name, device="cpu", max_new_tokens=TOKENS)
        told, masks = ask_elsewhere.answers(own.ask, own, own.classes, own.chat, place / "photo.png", QUESTION)
        assert heard[name] == told
        with np.load(place / f"{name}.npz") as found:
            assert len(found.files) == len(masks) > 3
            assert all(np.array_equal(mask, found[key]) for key, mask in zip(found.files, masks, strict=True))
        assert any(mask.any() and not mask.all() for mask in masks)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two merged folders, `sam` and `pixel`."""
    folder = tmp_path_factory.mktemp("portable")
    write(tiny("lisa", eager=5), folder / "sam")
    base = write_base(folder / "base", base_tensors(published()))
    write(made(folder, version=str(base), **PIXEL), folder / "pixel")
    return folder


def test_auto_model_answers_as_the_predictor(place):
    """Both folders in one process: neither takes the other's code for its own."""
    same_elsewhere(place, "sam", "pixel")
