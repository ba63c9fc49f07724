"""A run folder belongs to one recipe and one training; nothing in it changes before that is certain."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from safetensors.torch import load_file, save_file

import train_ds
from tests.tiny_run import BASE, ROOT, environment, train_log, write_reason_seg, write_recipe
from training.compatibility import differences
from training.lock import Lock
from training.run import find_resume, open_run
from utils import dist
from utils.config import Recipe, from_dict, load_recipe, merge, save_recipe, to_dict

HOLD = (
    "import sys, time; from pathlib import Path; from training.lock import Lock; lock = Lock(Path(sys.argv[1])); "
    "lock.acquire(); lock.sign(); print('held', flush=True); time.sleep(600)"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("belonging")
    write_reason_seg(folder / "data")
    train = {"epochs": 1, "steps_per_epoch": 2, "save_steps": 1, "grad_accumulation_steps": 1}
    return folder, write_recipe(folder, train=train)


@pytest.fixture(scope="module")
def finished(world):
    """Checkpoints of both steps."""
    folder, recipe = world
    train_ds.main(["--config", str(recipe), "--exp_name", "done", "--no_eval"])
    return folder / "runs" / "done"


@pytest.fixture
def run(finished):
    """A copy of it, and its recipe."""
    copy = finished.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished, copy)
    recipe = load_recipe(copy)
    return copy, replace(recipe, run=replace(recipe.run, exp_name="copy"))


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(recipe: Recipe, **sections) -> Recipe:
    return from_dict(Recipe, merge(to_dict(recipe), sections))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "system=sesame"], r"system: lisa in the run, sesame asked for"),
        (["--lora_r", "4"], r"model\.lora\.r: 2 in the run, 4 asked for"),
        (["--lora_alpha", "64"], r"model\.lora\.alpha: 4 in the run, 64 asked for"),
        (
            ["--lora_target_modules", "q_proj,k_proj"],
            r"target_modules: \['q_proj', 'v_proj'\] in the run, \['q_proj', 'k",
        ),
        (["--conv_type", "plain"], r"model\.conv_type: None in the run, plain asked for"),
        (["--no-use_mm_start_end"], r"model\.use_mm_start_end: True in the run, False asked for"),
        (["--vision_pretrained", "sam.pth"], r"model\.vision_pretrained: None in the run, sam\.pth asked for"),
        (["--version", str(BASE.parent / "gsva")], r"model\.version: .*lisa in the run, .*gsva asked for"),
        (["--set", "model.tower.position_resize=correct"], r"model\.tower\.position_resize"),
        (["--set", "model.head_options.anything=1"], r"model\.head_options\.anything: None in the run, 1 asked for"),
        (["--set", "train.seed=1"], r"train\.seed: 0 in the run, 1 asked for"),
        (["--set", "model.train_vocabulary=new_tokens"], r"model\.train_vocabulary"),
    ],
)
def test_what_gives_the_weights_another_meaning_is_refused_and_nothing_changes(world, finished, words, said):
    """The finished run stays what it is, and does not answer "finished" to another recipe."""
    before = tree(finished)
    with pytest.raises(SystemExit, match=rf"(?s)belongs to another recipe.*{said}.*--exp_name"):
        train_ds.main(["--config", str(world[1]), "--exp_name", "done", "--no_eval", *words])
    assert tree(finished) == before


def test_every_difference_is_listed_at_once(world, finished):
    with pytest.raises(SystemExit, match=r"(?s)lora\.r: 2 .*lora\.alpha: 4 "):
        train_ds.main(["--config", str(world[1]), "--exp_name", "done", "--lora_r", "3", "--lora_alpha", "5"])


def test_a_checkpoint_of_another_run_is_compared_too(world, finished):
    words = ["--config", str(world[1]), "--exp_name", "from", "--resume", str(finished / "checkpoints" / "step_2")]
    with pytest.raises(SystemExit, match=r"done/checkpoints/step_2 belongs to another recipe.*\n.*lora\.alpha: 4"):
        train_ds.main([*words, "--lora_alpha", "8"])
    assert not (world[0] / "runs" / "from" / "recipe.yaml").exists()


def test_a_run_that_began_elsewhere_does_not_take_the_weights_that_are_named(world, run, finished):
    copy, recipe = run
    other = replace(recipe, train=replace(recipe.train, resume=str(finished / "checkpoints" / "step_2")))
    with pytest.raises(FileExistsError, match=r"copy already holds a run up to step_2, which did not begin at .*done"):
        find_resume(other)
    save_recipe(other, copy)  # as a start that began there has written
    assert find_resume(other) == copy / "checkpoints" / "step_2"


def test_what_merely_differs_is_said_and_recorded(world, run, capsys):
    folder, _ = run
    train_ds.main(["--config", str(world[1]), "--exp_name", "copy", "--no_eval", "--epochs", "2", "--lr", "5e-4"])
    assert [row["step"] for row in train_log(folder)] == [1, 2, 3, 4]
    assert (
        "train.epochs: 1 in the run, 2 asked for; train.lr: 0.001 in the run, 0.0005 asked for"
        in capsys.readouterr().out
    )
    first, second = json.loads((folder / "meta.json").read_text())
    assert "changes" not in first and second["changes"] == {"train.epochs": [1, 2], "train.lr": [1e-3, 5e-4]}
    assert second["from"].endswith("copy/checkpoints/step_2") and second["step"] == 2
    assert load_recipe(folder).train.lr == 5e-4


def test_a_score_of_another_figure_stays_forgotten_if_the_start_is_killed(world, run, monkeypatch):
    folder, _ = run
    newest = folder / "checkpoints" / "step_2" / "state.json"
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"best": 0.9, "best_step": 2}))
    words = ["--config", str(world[1]), "--exp_name", "copy", "--no_eval", "--epochs", "2"]
    words += ["--set", "eval.best_by=cIoU"]

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.run.save_recipe", die)
    with pytest.raises(KeyboardInterrupt):
        train_ds.main(words)
    monkeypatch.undo()
    assert json.loads(newest.read_text())["best"] is None
    train_ds.main(words)
    assert load_recipe(folder).eval.best_by == "cIoU"


def test_precision_auto_is_recorded_as_what_it_meant(world, run, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(dist, "computes_bf16", lambda: False)
    words = ["--exp_name", "copy", "--no_eval", "--epochs", "2", "--set", "model.precision=auto"]
    train_ds.main(["--config", str(world[1]), *words])
    assert load_recipe(folder).model.precision == "fp32"  # as the run before it: no change
    assert json.loads((folder / "meta.json").read_text())[-1]["changes"] == {"train.epochs": [1, 2]}


def test_a_finished_run_keeps_the_recipe_that_it_was_trained_with(world, run, capsys):
    folder, _ = run
    before = (folder / "recipe.yaml").read_bytes()
    train_ds.main(
        ["--config", str(world[1]), "--exp_name", "copy", "--no_eval", "--lr", "5e-4", "--set", "data.mixture.0.rate=2"]
    )
    assert (
        "is finished, and nothing was trained with other settings: data.mixture.0.rate: 1.0 in the run, 2.0 asked"
        in capsys.readouterr().out
    )
    assert (folder / "recipe.yaml").read_bytes() == before
    assert json.loads((folder / "meta.json").read_text())[-1]["changes"]["train.lr"] == [1e-3, 5e-4]


def test_a_run_of_before_the_fields_were_renamed_resumes(world, run):
    """The recipe of a run folder with the old names, every default stated as it was saved then."""
    folder, _ = run
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    model, loss = values["model"], values["loss"]
    model["head"] = model.pop("head_options")
    model["decoder_heads"] = model["head"].pop("decoder_heads")
    model["weight"] = model.pop("checkpoint_file")
    model["tower"]["positions"] = model["tower"].pop("position_resize")
    loss["alpha"] = loss.pop("overlap_weight")
    loss["refinement"] = loss.pop("overlap_refinement")
    loss["refused"] = "counted" if loss.pop("count_refused") else "excluded"
    values["train"]["clip"] = values["train"].pop("grad_clip")
    del values["train"]["steps"]
    values["eval"]["no_eval"] = not values["eval"].pop("validate")
    values["eval"]["pictures"] = values["eval"].pop("num_examples")
    del values["eval"]["every_steps"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    train_ds.main(["--config", str(world[1]), "--exp_name", "copy", "--no_eval", "--epochs", "2"])
    assert [row["step"] for row in train_log(folder)] == [1, 2, 3, 4]
    assert json.loads((folder / "meta.json").read_text())[-1]["changes"] == {"train.epochs": [1, 2]}
    assert "overlap_weight" in (folder / "recipe.yaml").read_text()


def test_amounts_among_options_and_how_it_is_computed_may_differ(run, tmp_path):
    _, recipe = run
    now = changed(
        recipe,
        options={"num_classes_per_sample": 9},
        model={"precision": "bf16", "pack_length": 99, "lora": {"dropout": 0.0}},
        data={"workers": 3, "mixture": [{"task": "reason_seg", "rate": 2.0, "sets": ["ReasonSeg|train"]}]},
    )
    meaning, others = differences(recipe, now, {})
    assert not meaning and {change.field for change in others} == {
        *("options.num_classes_per_sample", "model.precision", "model.pack_length", "model.lora.dropout"),
        *("data.workers", "data.mixture.0.rate"),
    }
    default = changed(recipe, options={"wording": "lisa"})  # says what was so anyway
    assert not differences(recipe, default, {})[0]
    shutil.copy(ROOT / "systems" / "wording" / "lisa.yaml", tmp_path / "mine.yaml")  # other words may come into it
    mine = changed(recipe, options={"wording": str(tmp_path / "mine.yaml")})
    assert [change.field for change in differences(recipe, mine, {})[0]] == ["options.wording"]
    tokens = changed(recipe, system="pixellm", options={})
    more = changed(recipe, system="pixellm", options={"seg_token_num": 2})
    assert [str(change) for change in differences(tokens, more, {})[0]] == [
        "options.seg_token_num: None in the run, 2 asked for"
    ]


def test_a_base_counts_by_what_it_holds_not_by_its_place(run, tmp_path):
    folder, recipe = run
    content = json.loads((folder / "meta.json").read_text())[-1]["content"]
    shutil.copytree(BASE, tmp_path / "moved")
    moved = changed(recipe, model={"version": str(tmp_path / "moved")})
    meaning, others = differences(recipe, moved, content)
    assert not meaning and [change.field for change in others] == ["model.version"]
    (file,) = (tmp_path / "moved").glob("*.bin") or (tmp_path / "moved").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert [change.field for change in differences(recipe, moved, content)[0]] == ["model.version"]
    replaced = changed(recipe, model={"version": str(tmp_path / "moved")})  # another base at the place of the run's
    assert [change.field for change in differences(moved, replaced, content)[0]] == ["what model.version holds"]


@pytest.mark.parametrize("harm", ["gone", "not YAML", "an unknown field"])
def test_checkpoints_without_a_readable_recipe_are_not_gone_on_with(run, harm):
    folder, recipe = run
    file = folder / "recipe.yaml"
    if harm == "gone":
        file.unlink()
    else:
        file.write_text("{" if harm == "not YAML" else yaml.safe_dump({"sistem": "lisa"}))
    before = tree(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=r"recipe\.yaml.*what (they|the run's checkpoints) mean"):
        find_resume(recipe)
    assert tree(folder) == before


def test_a_damaged_history_is_named(run):
    folder, recipe = run
    (folder / "meta.json").write_text('[{"started"')
    with pytest.raises(ValueError, match=r"copy/meta\.json is damaged.*rename it"):
        find_resume(recipe)


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "missing", "state", "counters", "renamed"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_offered(world, run, harm):
    folder, recipe = run
    newest, older = (folder / "checkpoints" / f"step_{step}" for step in (2, 1))
    file = newest / "exp_avg.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "flipped":
        data[-3] ^= 1
        file.write_bytes(data)
    elif harm == "emptied":
        file.write_bytes(b"")
    elif harm == "missing":
        file.unlink()
    elif harm == "renamed":
        (newest / "state.json").write_text((older / "state.json").read_text())
    else:
        (newest / {"state": "state.json", "counters": "engine.json"}[harm]).write_text('{"step": ')
    before = tree(folder)
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"step_2 is .*step_1.* is complete: --resume {older} resumes"
    ):
        find_resume(recipe)
    assert tree(folder) == before
    (older / "trainable.safetensors").write_bytes(b"")
    with pytest.raises((ValueError, FileNotFoundError), match="No earlier one here is complete"):
        find_resume(recipe)


def test_the_one_before_is_gone_on_with_and_the_newer_stands_aside(world, run, finished):
    folder, _ = run
    (folder / "checkpoints" / "step_2" / "trainable.safetensors").write_bytes(b"")
    (folder / "checkpoints" / "step_1_copy").mkdir()  # somebody's own
    (folder / "checkpoints" / "step_9").mkdir()
    (folder / "checkpoints" / "notes.txt").write_text("")
    words = ["--config", str(world[1]), "--exp_name", "copy", "--no_eval"]
    train_ds.main([*words, "--resume", str(folder / "checkpoints" / "step_1")])
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"step_1", "step_2", "aside_step_2", "step_1_copy", "step_9", "notes.txt", "last", "best"}
    ends = [load_file(run / "checkpoints" / "step_2" / "trainable.safetensors") for run in (folder, finished)]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])
    assert [row["step"] for row in train_log(folder)] == [1, 2]


def test_the_same_command_again_goes_on_and_does_not_go_back(world, run):
    """A scheduler gives the command of an interrupted job again; --resume in it names where the first start began."""
    folder, _ = run
    words = ["--config", str(world[1]), "--exp_name", "copy", "--no_eval", "--epochs", "2"]
    words += ["--resume", str(folder / "checkpoints" / "step_1")]
    train_ds.main(words)
    before = [path.stat().st_ino for path in sorted((folder / "checkpoints").glob("step_*"))]
    train_ds.main(words)
    assert [path.stat().st_ino for path in sorted((folder / "checkpoints").glob("step_*"))] == before
    assert [path.name for path in (folder / "checkpoints").glob("aside_*")] == ["aside_step_2"]


def test_what_stands_aside_can_be_resumed(world, run):
    folder, _ = run
    checkpoints = folder / "checkpoints"
    (checkpoints / "step_2").rename(checkpoints / "aside_step_2")
    words = ["--config", str(world[1]), "--exp_name", "copy", "--no_eval", "--set", "train.steps_per_epoch=3"]
    train_ds.main([*words, "--resume", str(checkpoints / "aside_step_2")])
    assert [row["step"] for row in train_log(folder)] == [1, 2, 3]
    assert {path.name for path in checkpoints.glob("*step_*")} == {"step_1", "aside_step_2", "step_3"}


@pytest.mark.parametrize(("last", "best"), [(None, None), ("step_1", "step_1"), ("step_77", "step_77"), ("", "\0")])
def test_pointers_are_repaired_when_a_run_goes_on(world, run, last, best):
    folder, _ = run
    for pointer, text in (("last", last), ("best", best)):
        path = folder / "checkpoints" / pointer
        path.write_text(text) if text is not None else path.unlink()
    train_ds.main(["--config", str(world[1]), "--exp_name", "copy", "--no_eval"])
    assert [(folder / "checkpoints" / name).read_text() for name in ("last", "best")] == ["step_2\n"] * 2


def test_a_run_that_is_trained_elsewhere_is_refused_until_that_process_is_dead(world, run):
    folder, recipe = run
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = tree(folder)
        with pytest.raises(SystemExit, match=rf"copy is in use: process {holder.pid} on .*--exp_name"):
            train_ds.main(["--config", str(world[1]), "--exp_name", "copy", "--no_eval"])
        assert tree(folder) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with open_run(recipe):
        pass


def test_forked_workers_neither_hold_nor_lose_the_lock(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(600)
    try:
        ended = os.fork()
        if ended == 0:
            os._exit(0)
        os.waitpid(ended, 0)
        other = [sys.executable, "-c", HOLD.replace("600", "0"), str(tmp_path)]
        assert subprocess.run(other, cwd=ROOT, env=environment(), capture_output=True).returncode == 1
        lock.release()
        assert subprocess.run(other, cwd=ROOT, env=environment(), capture_output=True).returncode == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_nothing_is_left_by_a_start_that_fails(world, run, monkeypatch):
    """Weights that do not fit, found by `restore` alone: recipe, history, log and pointers are as before."""
    folder, _ = run
    file = folder / "checkpoints" / "step_2" / "trainable.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    (folder / "checkpoints" / "step_2" / "sums.json").unlink()
    before = tree(folder)
    with pytest.raises(ValueError, match="other weights train"):
        train_ds.main(["--config", str(world[1]), "--exp_name", "copy", "--no_eval", "--lr", "1"])
    assert tree(folder) == before


def test_the_best_score_begins_again_when_something_else_is_measured(world, run, capsys):
    folder, _ = run
    state = folder / "checkpoints" / "step_2" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "best": 0.75, "best_step": 2}))
    train_ds.main(["--config", str(world[1]), "--exp_name", "copy", "--epochs", "2", "--set", "eval.best_by=cIoU"])
    assert "the best score so far, 0.75, no longer counts" in capsys.readouterr().out
    assert (folder / "checkpoints" / "best").read_text() == "step_4\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a file system")
def test_a_read_only_run_folder_is_named(world, run):
    folder, recipe = run
    mounted = subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("may not mount here")
    try:
        with pytest.raises(OSError, match=r"copy cannot be written: Read-only file system"), open_run(recipe):
            pass
    finally:
        subprocess.run(["umount", folder], check=True)
