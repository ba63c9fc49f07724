"""The card of a merged folder, and its upload: shown first, asked for, and of the written files alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from evaluation.metrics.base import Figure
from evaluation.results import EvaluationResults, SuiteResult, write_results
from model.checkpoints.save import save_folder
from systems.assistant import Assistant
from tests.tiny_assistant import tiny
from tools.portable.card import model_card, read_results, results_of_run
from tools.portable.folder import complete
from tools.portable.push import check_name, push
from utils.config import from_dict, merge, to_dict
from utils.recipe import Recipe


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    found = tiny("lisa")
    mixture = [{"task": "refer_seg", "rate": 3, "sets": ["refcoco", {"source": "refclef", "rate": 2}]}]
    values = {"data": {"mixture": mixture, "dataset_dir": "/somewhere/else"}, "model": {"version": "somebody/llava-7b"}}
    found.recipe = from_dict(Recipe, merge(to_dict(found.recipe), values))
    return found


@pytest.fixture(scope="module")
def folder(assistant, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("share") / "mine"
    parts = (assistant.model, place, assistant.tokenizer, assistant.recipe)
    save_folder(*parts, more=lambda draft: complete(draft, assistant, "me/mine"))
    return place


def results(value: float = 0.25) -> EvaluationResults:
    figures = [Figure("gIoU", "standard", value, (0.2, 0.3)), Figure("gIoU", "as_released", None)]
    return EvaluationResults({"refcoco|unc|val": SuiteResult(figures, "generate", images=7, queries=9)})


def test_card(assistant):
    card = model_card(assistant, "me/mine", {"runs/scores": results()}, "apache-2.0")
    _, front, text = card.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["license"] == "apache-2.0" and meta["base_model"] == "somebody/llava-7b"
    assert {"lisa", "referring-segmentation"} <= set(meta["tags"])
    for words in (
        "# mine\n",
        'AutoModel.from_pretrained("me/mine", trust_remote_code=True)',
        "pip install torch transformers pillow sentencepiece protobuf",
        "| system | `lisa`: LISA (arXiv 2308.00692)",
        "| mask head | `sam`: SAM as the mask head",
        "- refer_seg, rate 3: refcoco (1), refclef (2)",
        "runs/scores:\n\n### refcoco|unc|val\n\n7 images, 9 queries",
        "| gIoU | standard | generate | 0.2500 | 0.2000 to 0.3000 |",
        "| gIoU | as_released | generate | - |  |",
        "- CLIP: MIT\n- SAM: Apache-2.0\n- the Python files here: Apache-2.0",
    ):
        assert words in text, words
    assert "None were given" in model_card(assistant, "mine", {})


def test_a_card_names_no_place_of_this_machine(assistant, tmp_path):
    recipe = from_dict(Recipe, merge(to_dict(assistant.recipe), {"model": {"version": str(tmp_path / "llava")}}))
    card = model_card(Assistant(**{**vars(assistant), "recipe": recipe}), "mine", {})
    assert "| started from | llava |" in card and str(tmp_path) not in card and "base_model" not in card


def test_results_are_those_of_the_checkpoint(tmp_path):
    write_results(results(), tmp_path / "validation")
    with pytest.raises(ValueError, match=r"results\.json holds no results of test_sem\.py"):
        (tmp_path / "results.json").write_text("[]")
        read_results(tmp_path)
    for step in (4, 8):
        place = tmp_path / "checkpoints" / f"step_{step}"
        place.mkdir(parents=True)
        (place / "trainable.safetensors").touch()
    (tmp_path / "checkpoints" / "best").write_text("step_4")
    (tmp_path / "checkpoints" / "last").write_text("step_8")
    assert not results_of_run(tmp_path, "last")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"kind": "val", "step": n}) + "\n" for n in (4, 8)))
    assert not results_of_run(tmp_path, "best")
    assert list(results_of_run(tmp_path, "last")) == ["Validation in training, step_8"]


class Hub:
    """A hub that writes down what it is asked for."""

    calls: ClassVar[list[tuple]] = []
    refuses = False

    def create_repo(self, name, **options):
        if self.refuses:
            raise RuntimeError("401 Unauthorized")
        self.calls.append(("create_repo", name, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    monkeypatch.setattr("tools.portable.push.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


@pytest.mark.parametrize("answer", ["", "n", "no", "x", "upload"])
def test_nothing_is_uploaded_without_a_yes(folder, hub, monkeypatch, capsys, answer):
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert not push(folder, "me/mine", public=False, yes=False)
    assert not hub.calls and "nothing was uploaded" in capsys.readouterr().out


def test_what_was_written_is_uploaded_after_it_was_shown(folder, hub, monkeypatch, capsys):
    (folder / "private.txt").write_text("added later")
    shown = []
    monkeypatch.setattr("builtins.input", lambda prompt: shown.append(capsys.readouterr().out) or "Y")
    assert push(folder, "me/mine", public=False, yes=False)
    (text,) = shown
    written = json.loads((folder / "written.json").read_text())
    assert {"README.md", "model.safetensors", "wording.yaml", "modeling_segmentation_assistant.py"} <= set(written)
    assert all(f"  {name}\n" in text for name in written if not name.endswith(".py")) and "private.txt" not in text
    size = sum((folder / name).stat().st_size for name in [*written, "written.json"])
    assert f"{size / 2**20:.2f} MiB  in all" in text and re.search(r"\d+ Python files", text)
    assert "me/mine (private if it is new)" in text and "data.dataset_dir=/somewhere/else" in text
    create, upload = hub.calls
    assert create == ("create_repo", "me/mine", {"private": True, "exist_ok": True})
    assert sorted(upload[1].pop("allow_patterns")) == sorted([*written, "written.json"])
    assert upload[1]["repo_id"] == "me/mine" and upload[1]["folder_path"] == folder


def test_yes_asks_nothing_and_public_is_asked_for(folder, hub, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("it asked"))
    assert push(folder, "me/mine", public=True, yes=True)
    assert hub.calls[0][2]["private"] is False
    monkeypatch.setattr(Hub, "refuses", True)
    with pytest.raises(OSError, match=r"did not take me/mine: 401 Unauthorized .*hf auth login"):
        push(folder, "me/mine", public=True, yes=True)


def test_what_could_not_work_is_refused_first(hub, monkeypatch):
    check_name("me/mine", yes=True)
    for name in ("mine", "me/mine/more", "me/ mine", "-/x"):
        with pytest.raises(ValueError, match="--push_to_hub"):
            check_name(name, yes=True)
    with pytest.raises(ValueError, match="there is no terminal: --yes"):
        check_name("me/mine", yes=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    check_name("me/mine", yes=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        check_name("me/mine", yes=True)
