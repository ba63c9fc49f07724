"""Every system on every backbone with every mask head, on tiny random weights: trained, stopped and resumed, merged,
asked. What cannot be put together is refused before weights are read.

    pytest -m "slow or not slow" tests/test_combinations.py
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import merge_lora_weights_and_save_hf_model as merge
import train_ds
from data.collate import Sample, SampleBuilder, collate
from data.mixture import Mixture
from data.tokens import mask_ids
from data.types import IMAGE_PLACEHOLDER, Mask, Query
from evaluation.protocols import Reply, generate, teacher_forced
from model.heads import HEADS
from model.losses import objective
from model.vlm import VLMS
from systems.assistant import Assistant, build, load
from systems.base import SYSTEMS
from tests.tiny_assistant import CLASSES, toy_world
from tests.tiny_parts import BASES, Parts
from tests.tiny_run import train_log, write_recipe
from utils.config import load_recipe

IN_CI = {
    ("unified", "qwen3_vl", "sam2"),
    ("lisa", "internvl", "sam3"),
    ("pixellm", "qwen2_5_vl", "sam3"),
    ("sa2va", "llava", "pixel"),
}
ALL = [(system, backbone, head) for system in SYSTEMS for backbone in BASES for head in HEADS]
FIT = [(system, backbone, head) for system, backbone, head in ALL if VLMS[backbone].KEEPS_LAYERS or head != "pixel"]
STEPS = 4
TRAIN = {
    "epochs": 1,
    "steps_per_epoch": STEPS,
    "batch_size": 1,
    "grad_accumulation_steps": 1,
    "warmup_steps": 0,
    "lr": 3e-3,
}
MIXTURE = [
    {"task": "sem_seg", "sets": [{"source": "ade20k", "options": {"classes": CLASSES.format(source="ade20k")}}]},
    {"task": "refer_seg", "sets": ["refcoco"]},
    {"task": "reason_seg", "sets": ["ReasonSeg|train"]},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), "ade20k", "refcoco", "reason_seg", images=6, val_images=1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def cases(combinations: list[tuple[str, str, str]]) -> list[Any]:
    return [
        pytest.param(*case, id="-".join(case), marks=[] if case in IN_CI else pytest.mark.slow) for case in combinations
    ]


@pytest.mark.parametrize(("system", "backbone", "head"), cases(FIT))
def test_it_trains_resumes_merges_and_answers(system, backbone, head, parts, world, tmp_path):
    recipe = recipe_of(system, parts(backbone, head), world, tmp_path)
    base = build(load_recipe(recipe), device="cpu", trainable=False)
    samples = samples_of(base)

    train_ds.main(["--config", str(recipe), "--exp_name", "whole"])
    stopped = ["--config", str(recipe), "--exp_name", "stopped"]
    train_ds.main([*stopped, "--set", "train.time_limit_minutes=1e-6"])
    assert [row["step"] for row in train_log(tmp_path / "runs" / "stopped")] == [1]
    train_ds.main(stopped)
    runs = [tmp_path / "runs" / name for name in ("whole", "stopped")]
    curve, resumed = ([(row["step"], row["loss"]) for row in train_log(run)] for run in runs)
    assert curve == resumed and len(curve) == STEPS
    same_tensors(*(load_file(run / "checkpoints" / f"step_{STEPS}" / "trainable.safetensors") for run in runs))

    merge.main(["--run", str(runs[0]), "--tag", "last", "--save_path", str(tmp_path / "merged")])
    trained, merged = (
        aligned(load(runs[0], checkpoint="last", device="cpu")),
        aligned(load(tmp_path / "merged", device="cpu")),
    )
    assert (merged.system.name, merged.model.architecture.vlm, merged.model.architecture.head) == (
        system,
        backbone,
        head,
    )
    same_tensors(trained.model.state_dict(), merged.model.state_dict())
    assert loss_of(trained, samples) < loss_of(base, samples)
    assert_same_answers(trained, merged, samples)


@pytest.mark.parametrize(("system", "backbone", "head"), sorted({*ALL} - {*FIT}))
def test_what_cannot_be_put_together_is_refused_before_weights_are_read(system, backbone, head, parts, world, tmp_path):
    model = parts(backbone, head)
    unread = tmp_path / "base"
    unread.mkdir()
    for file in Path(model["version"]).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, unread)
    recipe = recipe_of(system, {**model, "version": str(unread)}, world, tmp_path)
    with pytest.raises(
        SystemExit, match=rf"mask head '{head}'.*the backbone '{backbone}' does not have; choose .* sam"
    ):
        train_ds.main(["--config", str(recipe)])


def recipe_of(system: str, model: dict[str, Any], world: Path, folder: Path) -> Path:
    data = {"dataset_dir": str(world), "mixture": MIXTURE}
    path = write_recipe(folder, model=model, data=data, train=TRAIN, eval={"suites": [], "validate": False})
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "system": system}))
    return path


def samples_of(assistant: Assistant) -> list[Sample]:
    """The first training samples of every set of the mixture."""
    maker = SampleBuilder(assistant.system.task, assistant.encoder, assistant.views)
    data = assistant.recipe.data
    mixtures = (Mixture.build(replace(data, mixture=(task,)), maker, seed=1) for task in data.mixture)
    return [mixture.sample(0) for mixture in mixtures]


@torch.no_grad()
def loss_of(assistant: Assistant, samples: list[Sample]) -> float:
    batches = [collate([sample]) for sample in samples]
    return sum(float(objective(assistant.model(batch), batch, assistant.recipe.loss).total) for batch in batches)


@torch.no_grad()
def assert_same_answers(one: Assistant, other: Assistant, samples: list[Sample]) -> None:
    """Fed with the true answers, and as they write their own, whose masks are compared, too."""
    for sample in samples:
        ours, theirs = one.model(collate([sample])), other.model(collate([sample]))
        assert torch.equal(ours.token_logits, theirs.token_logits)
        assert all(torch.equal(*masks) for masks in zip(ours.masks, theirs.masks, strict=True))
    query = Query(f"{IMAGE_PLACEHOLDER}\nWhere is it?", (Mask(0),))
    for assistant in (one, other):
        with_strong_prompts(assistant)
    for write in (generate, write_a_mask):
        ours, theirs = (write(assistant, samples, [[query]] * len(samples), 8) for assistant in (one, other))
        for (mine,), (yours,) in zip(ours, theirs, strict=True):
            assert mine.text == yours.text and torch.equal(mine.masks, yours.masks)
    forced = teacher_forced(one, samples, [[query]] * len(samples))
    for (mine,), (fed,) in zip(ours, forced, strict=True):
        assert len(mine.masks) == 1
        torch.testing.assert_close(mine.masks, fed.masks, rtol=1e-4, atol=1e-4)


def with_strong_prompts(assistant: Assistant) -> None:
    """A new text projection gives prompts so near to zero that the masks of some heads hardly depend on them."""
    *_, last = (layer for layer in assistant.model.project.modules() if isinstance(layer, nn.Linear))
    last.weight.mul_(100)


def write_a_mask(assistant: Assistant, *asked: Any) -> list[list[Reply]]:
    """What `generate` gives where the language model favours the tokens of a mask, which random weights do not; asked
    with the template of training, as `teacher_forced` does (SESAME's release asks with another)."""
    assistant.encoder.prompt_template = assistant.encoder.template
    script = iter([*mask_ids(assistant.tokenizer, assistant.system.tokens), assistant.tokenizer.eos_token_id])

    def favour(module: nn.Module, states: Any, logits: Tensor) -> Tensor:
        bonus = torch.zeros(logits.shape[-1])
        bonus[next(script)] = 1e6
        return logits + bonus

    hook = assistant.model.vlm.language.lm_head.register_forward_hook(favour)
    try:
        return generate(assistant, *asked)
    finally:
        hook.remove()


def aligned(assistant: Assistant) -> Assistant:
    """With the weights copied out of the mapped file, where they may begin anywhere: where they do decides which kernel
    multiplies them, and with it the last bit."""
    for weight in assistant.model.parameters():
        weight.data = weight.data.clone()
    return assistant


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
