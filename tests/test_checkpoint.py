"""Engine and checkpoints: a run resumes exactly, half-written folders are never picked, few are kept."""

import json
import math
import os
import resource
import shutil
import stat
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from training.checkpoint import TENSORS, Checkpoints, TrainState, check_writable, restore
from training.engine import Engine, check_settings, engine_settings
from training.validation import validate
from utils import dist
from utils.config import DataConfig, EvalConfig, ModelConfig, Recipe, TrainConfig
from utils.files import write_atomically


class Net(nn.Module):
    """Three linears; the first is frozen, the last has a dropout in front."""

    def __init__(self):
        super().__init__()
        self.frozen, self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.hidden(torch.relu(self.frozen(x.to(self.frozen.weight.dtype)))))
        return self.out(nn.functional.dropout(x, 0.1, self.training)).float().square().mean()


def recipe(stage: Any, precision: Any = "fp32", **train) -> Recipe:
    """Under ZeRO-3 everything is sharded, which small tensors otherwise are not."""
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    fields: dict[str, Any] = {
        "zero_options": options,
        "epochs": 1,
        "steps_per_epoch": 10,
        "warmup_steps": 2,
        "lr": 1e-2,
        "batch_size": 4,
        **train,
    }
    return Recipe(
        model=ModelConfig(precision=precision),
        train=TrainConfig(zero_stage=stage, grad_accumulation_steps=2, **fields),
    )


def net(engine: Engine) -> Net:
    assert isinstance(engine.module, Net)
    return engine.module


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


WAYS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "precision"), WAYS)
def test_resumed_run_equals_uninterrupted_one(tmp_path, stage, precision):
    settings = recipe(stage, precision)
    whole = run(engine(settings), range(8))
    first = engine(settings)
    start = run(first, range(4))
    folder = Checkpoints(tmp_path).save(first, TrainState(step=4, samples=32))
    second = engine(settings)
    state = restore(second, folder, settings)
    assert (state.step, state.samples) == (4, 32)
    assert start + run(second, range(4, 8)) == whole
    assert whole[-1] < whole[0]


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-6), ("bf16", 1e-2)])
def test_any_stage_goes_on_from_any_other(tmp_path, precision, near):
    """With the same weights and moments to the bit; in bf16 the stages sum gradients with other roundings."""
    whole = run(engine(recipe(2, precision)), range(8))
    losses = []
    for step, stage in enumerate((0, 3, 2, 1, 3, 0, 1, 2)):
        trained = engine(recipe(stage, precision))
        if step:
            folder = tmp_path / f"step_{step}"
            restore(trained, folder, recipe(stage, precision))
            for kind, file in TENSORS.items():
                found, stored = trained.gather(kind), load_file(folder / file)
                assert all(torch.equal(found[name], stored[name]) for name in stored)
        losses += run(trained, range(step, step + 1))
        Checkpoints(tmp_path).save(trained, TrainState(step=step + 1))
    assert losses == pytest.approx(whole, rel=near)


@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 2), ("all", 3)])
def test_offloaded_run_goes_on_exactly_and_like_the_others(tmp_path, offload, stage):
    settings = recipe(stage, offload=offload)
    whole, plain = run(engine(settings), range(6)), run(engine(recipe(stage)), range(6))
    assert whole == pytest.approx(plain, rel=1e-5)
    first = engine(settings)
    start = run(first, range(3))
    folder = Checkpoints(tmp_path).save(first, TrainState(step=3))
    second = engine(settings)
    restore(second, folder, settings)
    assert start + run(second, range(3, 6)) == whole


def test_weights_are_full_while_evaluating_and_sharded_again_after():
    sharded = engine(recipe(3))
    other = run(engine(recipe(2)), range(4))
    assert run(sharded, range(2)) == pytest.approx(other[:4], rel=1e-6)
    assert net(sharded).hidden.weight.numel() == 0
    with sharded.gathered():
        assert net(sharded).hidden.weight.shape == (16, 16)
        with torch.no_grad():
            sharded.module.eval()
            first, second = (sharded.module(torch.ones(2, 8)) for _ in range(2))
        assert first == second and net(sharded).frozen.weight.shape == (16, 8)
        sharded.train()
    assert net(sharded).hidden.weight.numel() == 0
    assert run(sharded, range(2, 4)) == pytest.approx(other[4:], rel=1e-6)


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
    before = net(first).frozen.weight.clone()
    rates = []
    for step in range(10):
        run(first, range(step, step + 1))
        rates.append(first.lr)
    assert rates[:3] == pytest.approx([0.0, 0.5e-2, 1e-2])
    assert rates[2:] == pytest.approx([1e-2 * (10 - step) / 8 for step in range(2, 10)])
    assert torch.equal(net(first).frozen.weight, before)
    assert first.grad_norm is not None and first.grad_norm > 0


def test_a_cosine_after_a_warmup_that_is_a_share_of_the_run():
    """sa2va.md 5.1: linear over 5 % of the epoch, then a cosine to 0."""
    first = engine(recipe(2, schedule="cosine", warmup_share=0.2))
    rates = []
    for step in range(10):
        run(first, range(step, step + 1))
        rates.append(first.lr)
    assert rates[:3] == pytest.approx([0.0, 0.5e-2, rates[2]])
    assert rates[2:] == pytest.approx(
        [1e-2 * (1 + math.cos(math.pi * min(1, (step - 1) / 8))) / 2 for step in range(2, 10)]
    )
    assert rates[-1] == pytest.approx(0)


def test_settings_say_what_the_specification_says():
    found = engine_settings(recipe(2, "bf16", grad_clip=1.0), 1000, torch.device("cpu"))
    assert found["gradient_clipping"] == 1.0
    assert found["bf16"]["enabled"] and not found["fp16"]["enabled"]
    assert found["zero_optimization"]["stage"] == 2
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["scheduler"]["type"] == "WarmupDecayLR"


def test_settings_pass_on_what_is_offloaded_and_further_fields():
    found = engine_settings(recipe(3, "bf16", offload="all"), 1000, torch.device("cpu"))["zero_optimization"]
    assert found["offload_param"]["device"] == found["offload_optimizer"]["device"] == "cpu"
    assert found["stage3_param_persistence_threshold"] == 0
    found = engine_settings(recipe(1, "bf16", offload="optimizer"), 1000, torch.device("cpu"))["zero_optimization"]
    assert found["offload_optimizer"]["device"] == "cpu" and "offload_param" not in found
    found = engine_settings(recipe(2, "bf16"), 1000, torch.device("cpu"))["zero_optimization"]
    assert not {"offload_optimizer", "offload_param"} & found.keys()


@pytest.mark.parametrize(
    ("stage", "offload", "said"),
    [
        (2, "all", r"train\.offload=all needs train\.zero_stage 3, got 2"),
        (0, "optimizer", r"train\.offload=optimizer needs train\.zero_stage 1, 2, 3, got 0"),
    ],
)
def test_settings_that_there_are_not_are_refused(stage, offload, said):
    with pytest.raises(ValueError, match=said):
        check_settings(recipe(stage, offload=offload).train)


def test_every_group_waits_as_long_as_the_recipe_says():
    engine(recipe(2, timeout_minutes=7.0))
    groups = torch.distributed.distributed_c10d._world.pg_map
    waits = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    assert len(groups) > 1 and waits == {420.0}


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
        state = TrainState(step=step)
        checkpoints.save(first, state)
        if step == 1:
            checkpoints.note(state, best=True)
    return checkpoints


def test_few_are_kept_and_the_best_one(stored):
    assert [path.name for path in stored.complete()] == ["step_1", "step_3", "step_4"]
    assert (stored.folder / "last").read_text().strip() == "step_4"
    assert (stored.folder / "best").read_text().strip() == "step_1"


def test_a_checkpoint_has_the_permissions_of_any_new_file(tmp_path):
    """safetensors makes files for their owner alone; colleagues and other services read a run, too."""
    before = os.umask(0o022)
    try:
        saved = Checkpoints(tmp_path).save(engine(recipe(0)), TrainState(step=1))
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in saved.iterdir()} == {"0o644"}


def test_half_written_ones_are_never_picked_and_cleared(stored):
    (stored.folder / ".unfinished_step_9" / "engine").mkdir(parents=True)
    (stored.folder / "step_8").mkdir()  # somebody's copy, without state
    assert stored.last().name == "step_4"
    stored.prepare()
    assert not (stored.folder / ".unfinished_step_9").exists()
    with pytest.raises(
        FileNotFoundError, match=r"step_8 is not a complete checkpoint: expected state\.json, engine\.json"
    ):
        restore(engine(recipe(0)), stored.folder / "step_8", recipe(0))


def test_death_while_saving_leaves_the_last_one(stored, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpoint.save_safetensors", die)
    with pytest.raises(KeyboardInterrupt):
        stored.save(engine(recipe(0)), TrainState(step=5))
    assert stored.last().name == "step_4"


def test_a_later_best_score_is_stored(stored):
    stored.note(TrainState(step=4, best=0.5), best=True)
    assert (stored.folder / "best").read_text().strip() == "step_4"
    assert json.loads((stored.folder / "step_4" / "state.json").read_text())["best"] == 0.5
    assert [path.name for path in stored.complete()] == ["step_3", "step_4"]


def test_the_score_of_another_run_s_weights_is_not_the_best_of_this_one(stored):
    before = tree(stored.folder)
    state = TrainState(step=9, best=0.9, no_better=2)
    stored.note(state, best=True)
    assert state.best is None and state.no_better == 0 and tree(stored.folder) == before


def test_without_validation_the_newest_is_best_until_one_has_a_score(stored):
    """A start with --no_eval neither takes the place of a validated checkpoint nor inherits its score."""
    settings: Any = replace(recipe(0, epochs=4, steps_per_epoch=1), eval=EvalConfig(validate=False))
    nothing: Any = None
    for best, expected in ((0.9, "step_1"), (None, "step_4")):
        state = TrainState(step=4, best=best, best_step=None if best is None else 1)
        validate(nothing, nothing, settings, state, stored, nothing)
        assert (stored.folder / "best").read_text().strip() == expected
        assert (stored.folder / expected).is_dir()


def tree(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_weights_that_diverged_never_become_a_checkpoint(stored, value):
    before = tree(stored.folder)
    broken = engine(recipe(0))
    with torch.no_grad():
        net(broken).hidden.weight[3, 5] = value
    with pytest.raises(FloatingPointError, match=r"diverged.*hidden\.weight.*Nothing was saved.*step_4.*train\.lr"):
        stored.save(broken, TrainState(step=5))
    assert tree(stored.folder) == before


def test_a_run_that_explodes_stops_at_its_next_save(tmp_path):
    wild = engine(recipe(2, lr=1e6))
    run(wild, range(3))
    assert all(bool(weight.isfinite().all()) for weight in wild.module.parameters())
    with pytest.raises(FloatingPointError, match=r"diverged.*have weights up to"):
        Checkpoints(tmp_path).save(wild, TrainState(step=3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_that_is_dropped_is_known(precision):
    """The loss is finite, its gradient is not: DeepSpeed leaves the weights as they are, and says nothing."""
    trained = engine(recipe(2, precision))
    run(trained, range(1))
    assert trained.updated and trained.grad_norm is not None
    before = trained.gather("weight")
    for _ in range(2):
        trained.backward((trained(torch.randn(4, 8)) * 0).sqrt())
        trained.step()
    assert not trained.updated and trained.grad_norm is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.gather("weight").items())


def test_moments_that_are_no_numbers_are_not_saved_either(tmp_path):
    first = engine(recipe(0))
    run(first, range(2))
    next(iter(first.engine.optimizer.state.values()))["exp_avg_sq"][0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"exp_avg_sq\.safetensors.*not finite"):
        Checkpoints(tmp_path).save(first, TrainState(step=2))


def test_a_full_disk_leaves_what_was_there_and_says_what_is_missing(stored):
    """A limit on the size of files (`ulimit -f`)."""
    stored.size, before, full = 3 << 30, tree(stored.folder), engine(recipe(0))
    run(full, range(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            OSError, match=r"File too large.*GiB free.*step 5 takes about 3\.00 GiB.*is complete \(.*step_4"
        ):
            stored.save(full, TrainState(step=5))
        assert tree(stored.folder) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a file system")
def test_no_space_left_on_a_real_file_system(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        first, checkpoints = engine(recipe(0)), Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(first, TrainState(step=1))
        before = tree(tmp_path)
        filler = tmp_path / "filler"
        filler.write_bytes(bytes((64 << 10) - 4096 * (3 + sum(1 + len(data) // 4096 for data in before.values()))))
        before[filler.relative_to(tmp_path)] = filler.read_bytes()
        with pytest.raises(OSError, match=r"No space left on device.*0\.00 GiB free.*step_1"):
            checkpoints.save(first, TrainState(step=2))
        with pytest.raises(OSError, match=r"meta\.json cannot be written: No space left on device"):
            write_atomically(tmp_path / "meta.json", "x" * (64 << 10))
        assert tree(tmp_path) == before
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_run_killed_between_pointer_and_note_validates_again(stored, monkeypatch):
    """`best` points to step 4, whose state does not know: the pointer goes back, and the older one is still there."""

    def die(path, _):
        if path.name == "state.json":
            raise KeyboardInterrupt
        path.write_text(_)

    monkeypatch.setattr("training.checkpoint.write_atomically", die)
    with pytest.raises(KeyboardInterrupt):
        stored.note(TrainState(step=4, validated=4, best=0.9, best_step=1), best=True)
    monkeypatch.undo()
    assert (stored.folder / "best").read_text().strip() == "step_4"
    state = stored.resume_at(stored.last(), TrainState(step=4, best=0.5, best_step=1))
    assert (stored.folder / "best").read_text().strip() == "step_1" and state.best == 0.5


def test_a_best_checkpoint_that_is_gone_makes_way_for_the_next(stored, caplog):
    shutil.rmtree(stored.folder / "step_1")
    state = stored.resume_at(stored.last(), TrainState(step=4, best=0.5, best_step=1))
    assert "step_1, is not there any more" in caplog.text
    assert (state.best, state.best_step) == (None, None) and not (stored.folder / "best").exists()


def test_strange_folders_beside_checkpoints_are_neither_read_nor_removed(stored):
    strange = ("step_", "step_4 (copy)", "step_4_backup", "step_04", "step_x", "step_12", "old")
    for name in strange:
        (stored.folder / name).mkdir()
        (stored.folder / name / "mine.txt").write_text(name)
    (stored.folder / "step_40").write_text("a file")
    shutil.copytree(stored.folder / "step_4", stored.folder / "step_99_copy")
    assert stored.last().name == "step_4"
    first = engine(recipe(0))
    stored.save(first, TrainState(step=12))  # a name that somebody has taken
    assert (stored.folder / "aside_step_12" / "mine.txt").is_file()
    assert all((stored.folder / name / "mine.txt").is_file() for name in strange if name != "step_12")
    assert [path.name for path in stored.complete()] == ["step_1", "step_4", "step_12"]


def test_every_process_raises_what_the_main_one_met():
    dist.start()
    with pytest.raises(OSError, match="full"):
        dist.on_main(lambda: (_ for _ in ()).throw(OSError("full")))
    assert dist.on_main(lambda: 3) == 3


def test_other_trained_weights_are_refused(stored):
    other = Net()
    other.out.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"a model in which other weights train: out\.bias"):
        restore(Engine(other, recipe(2)), stored.last(), recipe(2))


def test_another_number_of_pictures_a_step_is_told(stored, caplog):
    path = stored.last() / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 3, "pictures": 24}))
    state = restore(engine(recipe(2)), stored.last(), recipe(2))
    assert "24 images per step, now it is 8" in caplog.text
    assert (state.processes, state.pictures) == (1, 8)
    by_records = replace(recipe(2), data=DataConfig(sampling="epoch"))
    by_records = replace(by_records, train=replace(by_records.train, steps=None, epochs=2, steps_per_epoch=None))
    with pytest.raises(ValueError, match=r"its 4 steps had 24 images each; with 8 an epoch .*as before"):
        restore(engine(recipe(2)), stored.last(), by_records)


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
