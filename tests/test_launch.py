"""The launch scripts hand the right words to the launchers, which are stand-ins here: no machine has other machines."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import ROOT

SAY = '#!/bin/sh\necho "$(basename "$0") $*"\n'


@pytest.fixture
def run(tmp_path):
    """Runs a script with stand-ins that print their words; `scontrol` knows the machines."""
    for name in ("deepspeed", "srun"):
        (tmp_path / name).write_text(SAY)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'n07\\nn08\\n'\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)

    def start(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
        kept = {
            name: value for name, value in os.environ.items() if name not in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        given = {**kept, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
        command = ["bash", str(ROOT / "scripts" / script), *map(str, words)]
        return subprocess.run(command, env=given, capture_output=True, text=True, timeout=30)

    return start


@pytest.fixture
def hostfile(tmp_path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("node1 slots=8\nnode2 slots=8\n")
    return path


def test_hostfile_over_ssh(run, hostfile):
    said = run("train_multi_node.sh", hostfile, "configs/lisa_7b.yaml", "--exp_name", "two words").stdout
    assert said == (
        f"deepspeed --hostfile {hostfile} --master_port 29500 --launcher pdsh train_ds.py "
        "--config configs/lisa_7b.yaml --exp_name two words\n"
    )


def test_hostfile_without_ssh(run, hostfile):
    said = run("train_multi_node.sh", hostfile, "a.yaml", NODE_RANK="1", MASTER_ADDR="node1", MASTER_PORT="7").stdout
    assert "--master_port 7 --no_ssh --node_rank 1 --master_addr node1 train_ds.py --config a.yaml" in said
    lost = run("train_multi_node.sh", hostfile, "a.yaml", NODE_RANK="1")
    assert lost.returncode and "give the first machine: MASTER_ADDR" in lost.stderr


def test_slurm_starts_a_launcher_a_node_that_meet_at_the_first(run):
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[07-08]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "99"}
    said = run("train_slurm.sbatch", "a.yaml", "--epochs", "3", **job).stdout
    assert said == (
        "srun --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc_per_node gpu --rdzv_backend c10d --rdzv_id 99 "
        "--rdzv_endpoint n07:29500 train_ds.py --config a.yaml --epochs 3\n"
    )
    assert "--nproc_per_node 3 " in run("train_slurm.sbatch", "a.yaml", **job, PROCESSES="3").stdout


def test_a_slurm_job_whose_time_ends_saves_and_is_queued_again(tmp_path):
    """The stand-in for srun saves when it gets the signal, after a while, as processes do."""
    for name, text in (
        ("srun", "trap 'sleep 1; echo saved; exit 143' TERM; echo started; while :; do sleep 0.1; done"),
        ("scontrol", '[ "$1" = requeue ] && echo "queued $2 again" || echo n07'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n07", "SLURM_NNODES": "1", "SLURM_JOB_ID": "99"}
    given = os.environ | job | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "scripts" / "train_slurm.sbatch"), "a.yaml"]
    with subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\nqueued 99 again\n"


@pytest.mark.parametrize(
    ("script", "words", "theirs"),
    [
        ("check_two_nodes.sh", (), "together"),
        ("check_two_nodes.sh", (), "alone"),
        ("demo.sh", (), "train"),
        ("real_mini.sh", (".",), "train"),
        ("real_mini.sh", (".",), "generate"),
    ],
)
def test_what_a_script_did_not_make_it_does_not_remove(run, tmp_path, script, words, theirs):
    """OUT may be where all runs are; what else is in it stays, and a folder of the script's names stops it."""
    out = tmp_path / "runs"
    for name in ("mine", theirs):
        (out / name / "checkpoints").mkdir(parents=True)
        (out / name / "checkpoints" / "last").write_text("step_5000")
    before = sorted(out.rglob("*"))
    done = run(script, *words, out)
    assert done.returncode == 1 and f"{script}: {out}/{theirs} holds what this script did not make" in done.stderr
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(("script", "words"), [("demo.sh", ()), ("real_mini.sh", (".",)), ("camvid.sh", (".",))])
def test_a_new_folder_is_made_where_the_script_is_called(tmp_path, script, words):
    theirs = tmp_path / "a folder" / "out" / "train"
    (theirs / "checkpoints").mkdir(parents=True)
    command = ["bash", str(ROOT / "scripts" / script), *words, "out"]
    done = subprocess.run(command, cwd=theirs.parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and f"{script}: {theirs} holds what this script did not make" in done.stderr


def test_folders_of_an_earlier_start_are_emptied(tmp_path):
    program = f'source {ROOT}/scripts/fresh.sh; cd {tmp_path}; fresh "one two" three'
    for _ in range(2):
        subprocess.run(["bash", "-c", program, "demo.sh"], check=True)
        (tmp_path / "one two" / "stale").touch()
    (tmp_path / "three" / ".made_by").write_text("real_mini.sh")
    done = subprocess.run(["bash", "-c", program, "demo.sh"], capture_output=True, text=True)
    assert done.returncode == 1 and "three holds what" in done.stderr and (tmp_path / "one two" / "stale").exists()


def test_no_script_removes_folders_in_another_way():
    removing = {path.name for path in (ROOT / "scripts").glob("*.s*") if "rm -r" in path.read_text()}
    assert removing == {"fresh.sh"}


STARTS_PYTHON = re.compile(r"^\s*(?:exec )?(?:srun .*)?(?:python|torchrun|deepspeed) ", re.MULTILINE)
FINDS_PYTHON = re.compile(r"^(?:\w+ \|\| )?source .*(?:setup|activate)\.sh", re.MULTILINE)
SOURCED = {"setup.sh", "activate.sh"}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.s[hb]*")), ids=lambda path: path.name)
def test_a_script_finds_its_environment_before_it_starts_python(path):
    """A user who has run nothing else has no python with the packages."""
    text = path.read_text(encoding="utf-8")
    started, found = STARTS_PYTHON.search(text), FINDS_PYTHON.search(text)
    if path.name not in SOURCED and started:
        assert found and found.start() < started.start()


@pytest.mark.parametrize(("status", "said"), [(0, ""), (1, "set up from requirements.txt\n")])
def test_the_environment_of_the_shell_is_kept_where_it_has_the_packages(tmp_path, status, said):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "activate.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup.sh").write_text('echo "set up from $1"\n')
    (tmp_path / "python").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", "-c", "set -euo pipefail; source scripts/activate.sh"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == said


@pytest.mark.parametrize(
    ("script", "words", "found"),
    [
        ("eval_lisa.sh", ["weights", "data"], ["--version {here}/weights", "--dataset_dir {here}/data"]),
        ("eval_sesame.sh", ["me/weights", "/data"], ["--version me/weights", "--dataset_dir /data"]),
        (
            "train_lisa.sh",
            ["me/llava", "weights", "data"],
            ["--version me/llava", "--vision_pretrained {here}/weights"],
        ),
        ("train_pixellm.sh", ["configs", "data"], ["--version configs", "--dataset_dir {here}/data"]),
    ],
)
def test_paths_are_those_of_the_folder_that_a_script_is_called_from(tmp_path, script, words, found):
    here = tmp_path / "a folder"
    for name in ("weights", "data", "bin"):
        (here / name).mkdir(parents=True)
    for name in ("python", "deepspeed"):
        (here / "bin" / name).write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$@"\n')
        (here / "bin" / name).chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / script), *words]
    environment = os.environ | {"PATH": f"{here / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
    assert all(text.format(here=here) in done.stdout for text in found), done.stdout
    done = subprocess.run(
        ["bash", f"scripts/{script}", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert f"--dataset_dir {words[-1]} " in f"{done.stdout} ".replace("\n", " ")


PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p .venv/bin; [ -L .venv/bin/python ] || cp "$0" .venv/bin/python; touch .venv/pip
    echo "VIRTUAL_ENV='$PWD/.venv'" >.venv/bin/activate;;
  "-c import pip") test -e .venv/pip;;
  "-m pip") test -e .venv/pip && touch installed;;
esac
"""


@pytest.mark.parametrize("before", ["nothing", "a python that is gone", "no pip", "another place"])
def test_an_environment_that_does_not_work_is_made_again_or_refused(tmp_path, before):
    """A set-up that was interrupted, a Python that was replaced, a folder that was moved."""
    root = tmp_path / "a folder"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", root / "scripts")
    (root / "requirements.txt").touch()
    python, venv = root / "python", root / ".venv"
    python.write_text(PYTHON)
    python.chmod(0o755)
    if before != "nothing":
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "activate").write_text("VIRTUAL_ENV=/gone/.venv\n")
    if before == "a python that is gone":
        (venv / "bin" / "python").symlink_to("/gone/python3")
    elif before != "nothing":
        shutil.copy(python, venv / "bin")
    if before == "another place":
        (venv / "pip").touch()
    words = ["bash", "-c", "set -euo pipefail; source 'a folder/scripts/setup.sh' requirements.txt; echo done"]
    environment = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if before == "another place":
        assert done.returncode == 1 and "was made at /gone/.venv, and works only there" in done.stderr
    else:
        assert done.stdout.endswith("done\n") and (root / "installed").exists(), done.stderr


def test_a_machine_without_python_says_so(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    words = [shutil.which("bash"), "-c", f"set -euo pipefail; source '{ROOT}/scripts/setup.sh'"]
    done = subprocess.run(words, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and "Python 3.11 or newer is needed, and there is no python3" in done.stderr


@pytest.mark.parametrize("script", ["train_multi_node.sh", "train_slurm.sbatch"])
def test_missing_words_stop_at_the_door(run, tmp_path, script):
    done = run(script, SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode and "usage:" in done.stderr
    if script == "train_multi_node.sh":
        assert "no hostfile" in run(script, tmp_path / "none", "a.yaml").stderr
