"""The commands of README and documents work for a user who has run nothing but the demo and the tests.

Such a user's shell has no package of this project on its PATH: a block that starts python comes after the line
`source .venv/bin/activate`, in its page or in itself. Commands that name the toy world or the demo's run need nothing
else; the slow test runs them as they stand, in a copy of the repository with a demo of two training steps.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")})
ACTIVATION = "source .venv/bin/activate"
PYTHON = re.compile(r"^(?:\w+=\S* )*(?:python|torchrun|deepspeed|pytest|ruff|ty)\b")  # what only .venv has
PROGRAM = re.compile(rf"{PYTHON.pattern}|^bash ")
SELF_CONTAINED = re.compile(r"\bruns/demo\b|\bconfigs/toy/|\bassets/toy\b|--list\b|check_two_nodes\.sh")
TOO_LONG = re.compile(
    r"\bruns/more\b|scripts/(?:demo|test|miniature|real_mini|camvid|make_toy_base)\b|-m toy\.(?:study|base)\b"
)
SHORT = {  # what makes a command that would take minutes a matter of seconds, by program
    "train_ds.py": "--epochs 1 --steps_per_epoch 1 --no_eval",
    "test_sem.py": "--limit 1 --max_new_tokens 8",
    "chat.py": "--max_new_tokens 8",
}
DEMO = (  # scripts/demo.sh with few images, two steps of training and no report
    "-m toy.world runs/demo/dataset --images 60 --val_images 5 --only ade20k refcoco reason_seg llava_instruct",
    "train_ds.py --config configs/toy/lasagna.yaml --dataset_dir runs/demo/dataset --log_base_dir runs/demo "
    "--exp_name train --epochs 1 --steps_per_epoch 2 --no_eval",
    "merge_lora_weights_and_save_hf_model.py --run runs/demo/train --save_path runs/demo/merged",
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: str) -> Iterator[list[str]]:
    """The commands of each code block, fenced as bash or indented by four: continued lines joined, comments gone."""
    fence = ""  # the language of the fenced block that a line is in
    block: list[str] = []
    for line in [*re.sub(r"\\\n\s*", "", page).splitlines(), ""]:
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip().removeprefix("```") or "text"
            inside = False
        else:
            inside = fence in ("bash", "sh") or (not fence and line.startswith("    "))
        if inside:
            block.append(re.sub(r"(?:^|\s+)# .*", "", line).strip())
        elif block:
            yield [command for command in block if command]
            block = []


def self_contained(page: str) -> list[str]:
    """The commands of a page that need nothing but the repository and the demo's run."""
    commands = [command for block in blocks(page) for command in block]
    return [
        command
        for command in commands
        if PROGRAM.match(command) and SELF_CONTAINED.search(command) and not TOO_LONG.search(command)
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_environment_is_activated_before_python_starts(page):
    active = False
    for commands in blocks(page.read_text(encoding="utf-8")):
        for command in commands:
            active = active or command.startswith(ACTIVATION)
            assert active or not PYTHON.match(command), f"{name_of(page)}: without `{ACTIVATION}` before it: {command}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_programs_of_the_commands_are_there(page):
    for commands in blocks(page.read_text(encoding="utf-8")):
        for command in commands:
            for name in re.findall(r"(?:python|bash|deepspeed|sbatch) ((?!-)[\w./-]+\.(?:sh|py|sbatch))\b", command):
                assert (ROOT / name).is_file(), f"{name_of(page)}: {name}"
            for name in re.findall(r"python -m ([\w.]+)", command):
                path = ROOT / name.replace(".", "/")
                assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() or name == "pytest"


def test_the_last_words_of_the_demo_are_commands_after_the_activation():
    """They are printed for copying: paths are real, and the environment is activated first."""
    words = (ROOT / "scripts" / "demo.sh").read_text(encoding="utf-8").rpartition("<<END\n")[2]
    lines = [line.strip() for line in words.splitlines()]
    commands = [line for line in lines if PROGRAM.match(line)]
    assert lines.index(ACTIVATION) < lines.index(commands[0])
    assert [command.split()[1] for command in commands] == ["chat.py", "test_sem.py"]


def test_commands_are_read_from_fenced_and_indented_blocks():
    fenced = f"```bash\n{ACTIVATION}   # once\npython a.py \\\n    --x 1 # why\n```\n"
    page = f"Text\n\n{fenced}\n    bash b.sh OUT   # the rest\n\npython is prose\n\n```python\npython = 1\n```\n"
    assert list(blocks(page)) == [[ACTIVATION, "python a.py --x 1"], ["bash b.sh OUT"]]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository, as `git clone` and the two commands leave it: with .venv, and with a demo's run."""
    if not (ROOT / ".venv" / "bin" / "activate").is_file():
        pytest.skip("needs the .venv that scripts/setup.sh makes")
    folder = tmp_path_factory.mktemp("user") / "clone"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "runs", "dataset", "output", "vis_output", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    for words in DEMO:
        subprocess.run(
            [sys.executable, *words.split()], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, check=True
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if self_contained(page.read_text("utf-8"))], ids=name_of)
def test_commands_of_the_pages_run_in_a_new_shell(clone, page):
    mine = {str(Path(sys.executable).parent), str(ROOT / ".venv" / "bin")}
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part not in mine)
    environment = {"PATH": path, "HOME": str(clone.parent), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    for command in self_contained(page.read_text(encoding="utf-8")):
        program = next((word for word in shlex.split(command) if word in SHORT), "")
        shell = [ACTIVATION, f"{command} {SHORT[program]}"] if program else [ACTIVATION, command]
        if command.startswith("bash "):
            shell = [command]  # a script activates .venv itself
        done = subprocess.run(
            ["bash", "-ec", "\n".join(shell)], cwd=clone, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{name_of(page)}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
