"""A training run becomes one folder with the same answers, in either layout, from a run folder or a given file."""

import errno
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import merge_lora_weights_and_save_hf_model as program
import train_ds
from data.collate import SampleBuilder, collate
from data.sources import build_source
from evaluation.metrics.base import Figure
from evaluation.results import EvaluationResults, SuiteResult, write_results
from model.checkpoints.layouts import published_table
from model.checkpoints.save import check_target
from model.heads import HEADS
from model.vlm import VLMS
from systems.assistant import Assistant, load
from tests.test_share import Hub
from tests.tiny_model import LLAVA
from tests.tiny_run import BASE, write_reason_seg, write_recipe
from utils.config import load_recipe
from utils.files import atomic_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of training, at a rate that moves every adapter."""
    folder = tmp_path_factory.mktemp("merge")
    write_reason_seg(folder / "data", train=2, val=1)
    train = {"epochs": 1, "grad_accumulation_steps": 1, "warmup_steps": 0, "lr": 1e-2, "steps_per_epoch": 4}
    recipe = write_recipe(folder, train=train)
    train_ds.main(["--config", str(recipe), "--no_eval"])
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def truth(run):
    """The run's own answers, adapters merged in memory, in fp32."""
    return answers(load(run, checkpoint="last"))


@torch.no_grad()
def answers(assistant: Assistant) -> torch.Tensor:
    """Token logits and mask logits of one image, teacher forced, in one row."""
    source = build_source("ReasonSeg|val", assistant.recipe.data.dataset_dir)
    maker = SampleBuilder(assistant.system.task, assistant.encoder, assistant.views)
    sample = maker.build(source[0], np.random.default_rng(0))
    output = assistant.model(collate([sample]))
    return torch.cat([output.token_logits.flatten(), *(masks.flatten() for masks in output.masks)])


def merge(*words) -> None:
    program.main([str(word) for word in words])


def place(assistant: Assistant, run) -> Assistant:
    """The same assistant, asked about the run's data (a folder of weights does not choose data)."""
    return replace(assistant, recipe=load_recipe(run))


def test_merged_folder_answers_as_the_run(run, truth, tmp_path):
    merge("--run", run, "--save_path", tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.model", "recipe.yaml"} <= names
    assert not any(".lora_" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(answers(place(load(tmp_path / "merged"), run)), truth, rtol=1e-5, atol=1e-5)


def test_training_changed_the_answers(run, truth):
    base = load(BASE, model={"vision_tower": str(BASE / "clip"), "head_options": {"decoder_heads": 4}})
    assert (answers(place(base, run)) - truth).abs().max() > 1e-2


def test_original_layout_answers_as_the_run(run, truth, tmp_path):
    merge("--run", run, "--save_path", tmp_path / "original", "--format", "original")
    names = torch.load(tmp_path / "original" / "pytorch_model.bin", weights_only=True).keys()
    published = (line.split()[0] for line in (BASE / "keys.txt").read_text().splitlines() if line.strip())
    assert set(names) == {name for name in published if not name.endswith("inv_freq") and "vision_tower" not in name}
    assert json.loads((tmp_path / "original" / "config.json").read_text())["architectures"] == ["LISAForCausalLM"]
    found = load(tmp_path / "original", model={"head_options": {"decoder_heads": 4}})
    torch.testing.assert_close(answers(place(found, run)), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["ours", "original names"])
def test_one_file_of_whole_weights(run, truth, tmp_path, wrapped):
    """What zero_to_fp32 makes of this program's shards, and of the original programs'."""
    weights = load_file(run / "checkpoints" / "step_4" / "trainable.safetensors")
    if wrapped:
        names = VLMS["llava"].published_names({**LLAVA, "projector_depth": 1})
        table = published_table(names, HEADS["sam"].WEIGHT_NAMES)
        weights = {f"base_model.model.{table.to_layout(name)}": value for name, value in weights.items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    recipe = run / "recipe.yaml"
    merge("--weight", tmp_path / "pytorch_model.bin", "--config", recipe, "--save_path", tmp_path / "merged")
    torch.testing.assert_close(answers(place(load(tmp_path / "merged"), run)), truth, rtol=1e-5, atol=1e-5)


def test_a_file_of_another_base_is_refused(run, tmp_path):
    """One published program trains with a random projector of its own, which stays frozen."""
    weights = load_file(run / "checkpoints" / "step_4" / "trainable.safetensors")
    torch.save({**weights, "model.mm_projector.weight": torch.randn(48, 32)}, tmp_path / "whole.bin")
    with pytest.raises(ValueError, match=r"whole\.bin: 1 frozen weights .*model\.mm_projector\.weight"):
        merge("--weight", tmp_path / "whole.bin", "--config", run / "recipe.yaml", "--save_path", tmp_path / "x")


def test_precision_of_the_written_weights(run, tmp_path):
    merge("--run", run, "--save_path", tmp_path / "half", "--precision", "bf16", "--tag", "step_4")
    kinds = {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}


def test_wrong_input_is_refused(run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"step_7.*have"):
        merge("--run", run, "--tag", "step_7", "--save_path", tmp_path / "x")
    with pytest.raises(SystemExit):
        merge("--run", run, "--lr", "3", "--save_path", tmp_path / "x")
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="not this recipe's; missing"):
        merge("--weight", tmp_path / "other.bin", "--config", run / "recipe.yaml", "--save_path", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def tree(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_read_or_was_not_written_here_is_never_replaced(run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    torch.save(load_file(run / "checkpoints" / "step_4" / "trainable.safetensors"), tmp_path / "whole.bin")
    recipe = ["--config", run / "recipe.yaml", "--version", base, "--vision_tower", base / "clip"]
    before = [tree(folder) for folder in (base, run, mine)]
    for target, words in ((base, "--overwrite"), (base.parent, "--overwrite"), (base / "clip", "--overwrite")):
        with pytest.raises(ValueError, match=r"is, or holds, .*which is read"):
            merge("--weight", tmp_path / "whole.bin", *recipe, "--save_path", target, words)
    for target in (run, run.parent):
        with pytest.raises(ValueError, match="which is read"):
            merge("--run", run, "--save_path", target, "--overwrite")
    with pytest.raises(FileExistsError, match=r"did not write \(thesis\.txt\).*--overwrite"):
        merge("--run", run, "--save_path", mine)
    assert [tree(folder) for folder in (base, run, mine)] == before
    merge("--run", run, "--save_path", mine, "--overwrite")
    merge("--run", run, "--save_path", mine, "--precision", "bf16")  # its own folder it may write again
    assert not (mine / "thesis.txt").exists() and set(json.loads((mine / "written.json").read_text())) <= {
        path.name for path in mine.iterdir()
    }
    (mine / "notes.txt").write_text("added later")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        merge("--run", run, "--save_path", mine)


def test_the_root_of_a_disk_is_refused(tmp_path):
    """A folder is replaced by a rename, which no mounted disk takes: a volume of a container, for one."""
    with pytest.raises(ValueError, match=r"is where a disk is mounted.*choose a folder in it"):
        check_target(tmp_path.anchor, overwrite=True)


def test_upload_and_card_from_the_command_line(run, tmp_path, monkeypatch, capsys):
    figures = [Figure("gIoU", "standard", 0.125, None)]
    write_results(EvaluationResults({"ReasonSeg|val": SuiteResult(figures, "generate", images=1)}), tmp_path / "scores")
    words = ("--run", run, "--save_path", tmp_path / "mine", "--results", tmp_path / "scores", "--license", "mit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="no terminal"):
        merge(*words, "--push_to_hub", "me/mine")
    with pytest.raises(SystemExit):
        merge(*words, "--push_to_hub", "me/mine", "--yes", "--format", "original")
    assert not (tmp_path / "mine").exists()
    monkeypatch.setattr("tools.portable.push.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    merge(*words, "--push_to_hub", "me/mine", "--yes")
    assert [name for name, *_ in Hub.calls] == [
        "create_repo",
        "upload_folder",
    ] and "MiB  in all" in capsys.readouterr().out
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "| gIoU | standard | generate | 0.1250 |" in card and 'license: "mit"' in card
    assert 'from_pretrained("me/mine"' in card and "- reason_seg, rate 1: ReasonSeg|train (1)" in card


@pytest.mark.parametrize("layout", ["project", "original"])
def test_a_merge_that_fails_leaves_the_folder_that_was_there(run, tmp_path, monkeypatch, layout):
    target = tmp_path / "merged"
    merge("--run", run, "--save_path", target, "--format", layout)
    before = tree(target)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("model.checkpoints.save._copy", full)
        with pytest.raises(OSError, match=r"merged cannot be written: No space left.*GiB free"):
            merge("--run", run, "--save_path", target, "--format", layout, "--precision", "bf16")
    assert tree(target) == before and [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_killed_swap_is_undone(tmp_path):
    """Between the two renames the old folder has the name of a draft; the next writer puts it back first."""
    (tmp_path / ".unfinished_replaced_out").mkdir()
    (tmp_path / ".unfinished_replaced_out" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as draft:
        (draft / "new").write_text("new")
        raise KeyboardInterrupt
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/old"]
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "new").write_text("new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/new"]
