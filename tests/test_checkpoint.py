"""Engine and checkpoints: the run goes on exactly, half-written folders are never picked, few are kept."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from training.checkpoint import Checkpoints, TrainState, check_writable, restore
from training.engine import Engine, engine_settings
from utils import dist
from utils.config import ModelConfig, Recipe, TrainConfig


class Net(nn.Module):
    """Three linears; the first is frozen, the last has a dropout in front."""

    def __init__(self):
        super().__init__()
        self.frozen, self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.hidden(torch.relu(self.frozen(x.to(self.frozen.weight.dtype)))))
        return self.out(nn.functional.dropout(x, 0.1, self.training)).float().square().mean()


def recipe(stage: int, precision: str = "fp32", **train) -> Recipe:
    train = {"epochs": 1, "steps_per_epoch": 10, "warmup_steps": 2, "lr": 1e-2, "batch_size": 4, **train}
    return Recipe(
        model=ModelConfig(precision=precision),
        train=TrainConfig(zero_stage=stage, grad_accumulation_steps=2, **train),
    )


def engine(settings: Recipe) -> Engine:
    dist.start()
    torch.manual_seed(0)
    return Engine(Net(), settings)


def run(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        for _ in range(2):
            loss = engine(torch.randn(4, 8))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (2, "bf16"), (0, "bf16"), (3, "fp32")])
def test_resumed_run_equals_uninterrupted_one(tmp_path, stage, precision):
    settings = recipe(stage, precision)
    whole = run(engine(settings), range(8))
    first = engine(settings)
    start = run(first, range(4))
    folder = Checkpoints(tmp_path).save(first, TrainState(step=4, samples=32, zero_stage=stage))
    second = engine(settings)
    state = restore(second, folder, settings)
    assert (state.step, state.samples) == (4, 32)
    assert start + run(second, range(4, 8)) == whole
    assert whole[-1] < whole[0]


def test_trained_weights_are_whole_and_only_the_trained_ones(tmp_path):
    first = engine(recipe(2))
    run(first, range(3))
    folder = Checkpoints(tmp_path).save(first, TrainState(step=3))
    saved = load_file(folder / "trainable.safetensors")
    live = {name: value for name, value in first.module.state_dict().items() if not name.startswith("frozen")}
    assert saved.keys() == live.keys()
    assert all(torch.equal(saved[name], live[name]) for name in saved)


def test_schedule_and_frozen_weights():
    first = engine(recipe(2))
    before = first.module.frozen.weight.clone()
    rates = []
    for step in range(10):
        run(first, range(step, step + 1))
        rates.append(first.lr)
    assert rates[:3] == pytest.approx([0.0, 0.5e-2, 1e-2])
    assert rates[2:] == pytest.approx([1e-2 * (10 - step) / 8 for step in range(2, 10)])
    assert torch.equal(first.module.frozen.weight, before)
    assert first.grad_norm > 0


def test_settings_say_what_the_specification_says():
    found = engine_settings(recipe(2, "bf16", clip=1.0), 1000, torch.device("cpu"))
    assert found["gradient_clipping"] == 1.0
    assert found["bf16"]["enabled"] and not found["fp16"]["enabled"]
    assert found["zero_optimization"]["stage"] == 2
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["scheduler"]["type"] == "WarmupDecayLR"


def test_nothing_to_train_is_refused():
    dist.start()
    with pytest.raises(ValueError, match="nothing to train"):
        Engine(Net().requires_grad_(False), recipe(0))


@pytest.fixture
def stored(tmp_path):
    """Checkpoints of steps 1 to 4, keeping two, step 1 the best."""
    first, checkpoints = engine(recipe(0)), Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.prepare()
    for step in range(1, 5):
        state = TrainState(step=step, zero_stage=0)
        checkpoints.save(first, state)
        if step == 1:
            checkpoints.note(state, best=True)
    return checkpoints


def test_few_are_kept_and_the_best_one(stored):
    assert [path.name for path in stored.complete()] == ["step_1", "step_3", "step_4"]
    assert (stored.folder / "last").read_text().strip() == "step_4"
    assert (stored.folder / "best").read_text().strip() == "step_1"


def test_half_written_ones_are_never_picked_and_cleared(stored):
    (stored.folder / ".unfinished_step_9" / "engine").mkdir(parents=True)
    (stored.folder / "step_8").mkdir()  # somebody's copy, without state
    assert stored.last().name == "step_4"
    stored.prepare()
    assert not (stored.folder / ".unfinished_step_9").exists()
    with pytest.raises(FileNotFoundError, match=r"step_8 is not a complete checkpoint: expected state\.json"):
        restore(engine(recipe(0)), stored.folder / "step_8", recipe(0))


def test_death_while_saving_leaves_the_last_one(stored, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpoint.save_file", die)
    with pytest.raises(KeyboardInterrupt):
        stored.save(engine(recipe(0)), TrainState(step=5, zero_stage=0))
    assert stored.last().name == "step_4"


def test_a_later_best_score_is_stored(stored):
    stored.note(TrainState(step=4, best=0.5, zero_stage=0), best=True)
    assert (stored.folder / "best").read_text().strip() == "step_4"
    assert json.loads((stored.folder / "step_4" / "state.json").read_text())["best"] == 0.5
    assert [path.name for path in stored.complete()] == ["step_3", "step_4"]


def test_other_stage_or_processes_are_refused(stored):
    with pytest.raises(ValueError, match=r"saved by 1 process.*stage 0, this run has 1 with stage 2"):
        restore(engine(recipe(2)), stored.last(), recipe(2))


def test_unusable_run_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot be written"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="needs about"):
        check_writable(tmp_path / "run", needed_bytes=1 << 60)
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OSError, match="cannot be written"):
            check_writable(tmp_path / "closed" / "run")
