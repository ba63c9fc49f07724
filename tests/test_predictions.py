"""No prediction is ever lost: a killed run resumes and ends as if it were never killed; files alone give figures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import test_sem
from evaluation.predictions import PredictionFile
from evaluation.protocols import FORCED
from evaluation.runner import evaluate
from evaluation.score import rescore
from model.embedding_cache import fingerprint
from tests.records import OWN
from tests.tiny_assistant import CLASSES, tiny, toy_world
from tests.tiny_run import environment
from utils import dist

ROOT = Path(__file__).resolve().parents[1]
SUITES = ["ade20k|val", "refcoco|unc|val", "ReasonSeg|val"]
PICTURES = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy_world(tmp_path_factory.mktemp("world"), "ade20k", "refcoco", "reason_seg", val_images=PICTURES)


@pytest.fixture(scope="module")
def assistant():
    return tiny("lasagna", eager=8)


def run(assistant, world: Path, out: Path, suites=("ReasonSeg|val",), **options) -> dict:
    options = {"protocol": FORCED, "classes": CLASSES, "resume": True, **options}
    return timeless(evaluate(assistant, list(suites), world, out_dir=out, **options).to_json())


def timeless(results: dict) -> dict:
    return {name: {k: v for k, v in suite.items() if k != "seconds"} for name, suite in results["suites"].items()}


def file_of(out: Path, part: str = "") -> Path:
    return out / "predictions" / f"ReasonSeg_val{part}.jsonl"


def indices(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


def contents(path: Path) -> dict:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["index"]: {k: v for k, v in line.items() if k != "seconds"} for line in lines}


def pictures_seen(assistant, monkeypatch) -> list[int]:
    seen, encode = [], type(assistant.model.vlm).encode_images
    monkeypatch.setattr(
        type(assistant.model.vlm),
        "encode_images",
        lambda self, pixels, *rest: (seen.append(len(pixels)), encode(self, pixels, *rest))[1],
    )
    return seen


KILLED_AFTER_TWO = """
import os, signal, sys
import test_sem
from evaluation.predictions import PredictionFile

write, lines = PredictionFile.write, []

def write_and_die(file, line):
    write(file, line)
    lines.append(line)
    if len(lines) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

PredictionFile.write = write_and_die
test_sem.main(sys.argv[1:])
"""


def test_a_killed_program_resumes_and_gives_the_identical_result(world, tmp_path):
    command = [
        sys.executable,
        "-c",
        KILLED_AFTER_TWO,
        "--version",
        str(OWN / "lasagna"),
        "--suites",
        "ReasonSeg|val",
    ]
    command += ["--dataset_dir", str(world), "--vision_tower", str(OWN / "lasagna" / "clip")]
    command += ["--max_new_tokens", "150", "--out", str(tmp_path / "killed")]
    killed, whole = tmp_path / "killed" / "generate", tmp_path / "whole"
    process = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, timeout=600, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(file_of(killed).read_text().splitlines()) == 2
    assistant = tiny("lasagna")
    resumed = run(assistant, world, killed, protocol="generate", max_new_tokens=150, classes=None)
    straight = run(assistant, world, whole, protocol="generate", max_new_tokens=150, classes=None)
    assert resumed == straight
    assert contents(file_of(killed)) == contents(file_of(whole))
    assert timeless(json.loads((killed / "results.json").read_text())) == json.loads(json.dumps(straight))


@pytest.mark.parametrize("half", ["", '{"suite": "ReasonSeg|val", "index": 4, "ima'])
def test_a_cut_in_any_place_only_costs_the_open_batch(assistant, world, tmp_path, monkeypatch, half):
    straight = run(assistant, world, tmp_path, batch_size=2)
    complete = contents(file_of(tmp_path))
    lines = file_of(tmp_path).read_text().splitlines(keepends=True)
    file_of(tmp_path).write_text("".join(lines[:3]) + half)  # the second batch is open
    seen = pictures_seen(assistant, monkeypatch)
    assert run(assistant, world, tmp_path, batch_size=2) == straight
    assert seen == [2, 2]
    assert contents(file_of(tmp_path)) == complete and sorted(indices(file_of(tmp_path))) == list(range(PICTURES))


def test_a_finished_run_is_not_done_again_and_a_longer_one_continues_it(assistant, world, tmp_path, monkeypatch):
    run(assistant, world, tmp_path, limit=2)
    seen = pictures_seen(assistant, monkeypatch)
    run(assistant, world, tmp_path, limit=2)
    assert seen == []
    assert run(assistant, world, tmp_path)["ReasonSeg|val"]["pictures"] == PICTURES
    assert seen == [1] * (PICTURES - 2)


def test_other_settings_or_weights_start_from_scratch_and_keep_the_old_file(assistant, world, tmp_path, monkeypatch):
    run(assistant, world, tmp_path, limit=2)
    old = file_of(tmp_path).read_text()
    seen = pictures_seen(assistant, monkeypatch)
    run(tiny("lasagna", eager=2), world, tmp_path, limit=2)
    assert seen == [1, 1]
    assert Path(f"{file_of(tmp_path)}.old").read_text() == old
    run(tiny("lasagna", eager=2), world, tmp_path, limit=2, resume=False)
    assert seen == [1] * 4


def test_parts_of_several_processes_are_taken_over_by_one(assistant, world, tmp_path, monkeypatch):
    straight = run(assistant, world, tmp_path)
    lines = file_of(tmp_path).read_text().splitlines(keepends=True)
    file_of(tmp_path).write_text("".join(lines[0:3:2]))
    file_of(tmp_path, ".1").write_text("".join(lines[1:4:2]))
    seen = pictures_seen(assistant, monkeypatch)
    assert run(assistant, world, tmp_path) == straight and len(seen) == PICTURES - 4
    assert not file_of(tmp_path, ".1").exists()


def test_predictions_alone_give_every_figure(assistant, world, tmp_path, capsys):
    for protocol in ("generate", FORCED):
        out = tmp_path / protocol
        results = run(assistant, world, out, SUITES, protocol=protocol, max_new_tokens=6)
        assert timeless(rescore([out / "predictions"]).to_json()) == results
    file = out / "predictions" / "refcoco_unc_val.jsonl"
    capsys.readouterr()
    assert test_sem.main(["--from", str(file), "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "cIoU" in said and "as_released" in said and "ade20k" not in said
    written = json.loads((tmp_path / "again" / "results.json").read_text())
    assert 'data-suite="refcoco|unc|val"' in (tmp_path / "again" / "report" / "index.html").read_text()
    page = (tmp_path / "again" / "results.md").read_text()
    assert "| gIoU | standard | teacher_forced | 0." in page and " to " in page and "## refcoco|unc|val" in page
    assert timeless(written) == json.loads(json.dumps({"refcoco|unc|val": results["refcoco|unc|val"]}))
    with pytest.raises(SystemExit, match="in several protocols: generate, teacher_forced"):
        test_sem.main(["--from", str(tmp_path / "generate" / "predictions"), str(out / "predictions")])


def test_damaged_files_are_refused_by_line(assistant, world, tmp_path):
    run(assistant, world, tmp_path, limit=3)
    text = file_of(tmp_path).read_text()
    file_of(tmp_path).write_text(text.replace('{"suite"', '{"suite', 1))
    with pytest.raises(ValueError, match=r"ReasonSeg_val\.jsonl, line 1: not a prediction"):
        rescore([tmp_path / "predictions"])
    file_of(tmp_path).write_text(text + '"half')
    assert rescore([file_of(tmp_path)]).suites["ReasonSeg|val"].images == 3
    with pytest.raises(FileNotFoundError, match="holds no predictions"):
        rescore([tmp_path])
    (tmp_path / "other.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: not a prediction of this program"):
        rescore([tmp_path])


def test_what_the_main_process_cannot_read_the_others_learn_of(tmp_path, monkeypatch):
    """They would wait for it."""
    (tmp_path / "mine.jsonl").write_text("no line\n")
    sent: list = []
    monkeypatch.setattr(dist, "broadcast", lambda value: sent.append(value) or value)
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: not a prediction"):
        PredictionFile(tmp_path, "mine").begin({}, [[0]], resume=True)
    assert [isinstance(error, ValueError) for _, error in sent] == [True]


def test_without_a_folder_nothing_is_written():
    with PredictionFile(None, "x") as file:
        assert file.begin({}, [[0, 1], [2]], resume=True) == ([], [[0, 1], [2]])
        file.write({})


def test_a_fingerprint_distinguishes_weights(assistant):
    assert fingerprint(assistant.model) == fingerprint(tiny("lasagna", eager=8).model)
    assert fingerprint(assistant.model) != fingerprint(tiny("lasagna", eager=7).model)
