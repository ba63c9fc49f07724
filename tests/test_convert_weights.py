"""Published checkpoints of every system become the project's folder and come back with the same names and numbers."""

from __future__ import annotations

import json

import pytest
import torch

from model.checkpoints.files import read_tensors
from systems.assistant import load
from tests.records import OWN
from tests.test_golden_gsva import ALPHA, write_release
from tools import convert_weights

SYSTEMS = sorted(path.name for path in OWN.iterdir() if (path / "golden.json").is_file())
HEADS = "model.head_options.decoder_heads=4"


@pytest.mark.parametrize("name", SYSTEMS)
def test_there_and_back(name, tmp_path, capsys):
    source, project, back = OWN / name, tmp_path / "project", tmp_path / "back"
    tower = ["--vision_tower", str(source / "clip")]
    assert convert_weights.main(["--version", str(source), "--save_path", str(project), "--set", HEADS, *tower]) == 0
    assert f"a {name} assistant" in capsys.readouterr().out
    assert (project / "model.safetensors").is_file() and load(project, device="cpu").system.name == name
    words = ["--version", str(project), "--save_path", str(back), "--format", "original", "--set", HEADS]
    assert convert_weights.main(words) == 0
    told = json.loads((project / "conversion.json").read_text())
    before, after = read_tensors(source), read_tensors(back)
    expected = {
        key: value for key, value in before.items() if ".vision_tower." not in key and key not in told["ignored"]
    }
    assert expected.keys() == after.keys()
    assert all(torch.equal(expected[key].float(), after[key].float()) for key in expected)
    assert told["mapped"] == len(before) - len([key for key in told["ignored"] if key in before])
    assert not told["missing"] and not told["unexpected"] and not told["new"]
    assert {told["ignored"][key] for key in told["ignored"] if "inv_freq" in key} == {"a table that is computed"}


def test_a_bare_file_beside_its_base(tmp_path, capsys):
    base, file = write_release(tmp_path)
    words = ["--version", str(base), "--weight", str(file), "--system", "gsva", "--save_path", str(tmp_path / "merged")]
    words += ["--vision_tower", str(OWN / "gsva" / "clip"), "--set", HEADS, "--set", f"model.lora.alpha={ALPHA}"]
    assert convert_weights.main(words) == 0
    merged = load(tmp_path / "merged", device="cpu").model.state_dict()
    published = load(OWN / "gsva", model={"head_options": {"decoder_heads": 4}}, device="cpu").model.state_dict()
    assert merged.keys() == published.keys()
    assert all(torch.allclose(merged[key], published[key], atol=2e-5, rtol=0) for key in merged)
    assert "ignored base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq: a table" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save_path", "x"], "--version .* and --save_path .* are needed"),
        (["--version", "nowhere/at/all", "--save_path", "x"], "cannot load nowhere/at/all"),
    ],
)
def test_what_cannot_be_converted_is_said(words, message):
    with pytest.raises(SystemExit, match=message):
        convert_weights.main(words)


def test_quantised_layers_are_never_written(tmp_path):
    """No program reads such a folder."""
    pytest.importorskip("bitsandbytes")
    words = ["--version", str(OWN / "lisa"), "--vision_tower", str(OWN / "lisa" / "clip"), "--set", HEADS]
    with pytest.raises(
        SystemExit, match=r"convert_weights\.py: quantised weights are not written.*model\.load_in_4bit=false"
    ):
        convert_weights.main([*words, "--save_path", str(tmp_path / "small"), "--load_in_4bit"])
    assert not any(tmp_path.iterdir())
