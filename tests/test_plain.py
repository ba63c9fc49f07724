"""Reading JSON and YAML from outside: bounded in memory and depth, and in one place."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path

import pytest

from utils.config import load_recipe, load_yaml, override
from utils.plain import MAX_DEPTH, MAX_NODES, parse_json, parse_yaml, read_yaml

ROOT = Path(__file__).resolve().parents[1]
CODE = [path for path in ROOT.rglob("*.py") if not {".venv", "tests", "runs"} & set(path.relative_to(ROOT).parts)]


FOR_OTHERS = {
    "merge_lora_weights_and_save_hf_model.py",
    "evaluation/auto_assistant.py",
    *(f"tools/portable/{name}.py" for name in ("card", "folder")),
}


ALLOWED_NAMES = {
    "card": {"transformers"},  # its version
    "auto_assistant": {"getattr"},  # of torch and of a configuration
}


def laughs(levels: int, width: int = 9) -> str:
    """Aliases of aliases: `width ** levels` values in a few lines."""
    lines = [f"a0: &a0 [{', '.join(['lol'] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def merges(levels: int) -> str:
    """The same by merge keys, which copy while the text is read."""
    lines = ["m0: &m0 {x: 1}", *(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, levels))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (laughs(9), f"more than {MAX_NODES} values"),
        (merges(30), f"more than {MAX_NODES} values"),
        ("a: &a [1, *a]", "an alias stands inside what it names .line 1"),
        ("a: &a {b: *a}", "an alias stands inside"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)), f"more than {MAX_DEPTH} deep"),
        ("[" * 100_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: [1", "not valid YAML"),
        (f"a: {'9' * 5000}", "4300 digits"),
        ("a: 2026-13-45", "month"),
        ("a: 1\n---\nb: 2", "single document"),
        ("train: {lr: 1}\ndata: 2\ntrain: {steps: 4}", "the key 'train' stands twice in one mapping .lines 1 and 3"),
        ("a: [{b: 1, b: 1}]", "the key 'b' stands twice"),
    ],
)
def test_a_yaml_text_that_does_harm_is_an_error(text, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        parse_yaml(text)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"recipe.yaml: .*{says}"):
        load_recipe(tmp_path)


def test_a_merged_key_may_be_replaced():
    assert parse_yaml("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}")["d"] == {"b": 3, "c": 2}


def test_aliases_in_measure_are_what_they_stand_for():
    assert parse_yaml("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1},
        "b": [{"x": 1}, {"x": 1}],
        "c": {"x": 1, "y": 2},
    }
    assert parse_yaml("") is None and parse_yaml("1e-3") == "1e-3" and parse_yaml("[off]") == [False]


def test_a_yaml_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"x\.yaml: .*utf-8"):
        read_yaml(tmp_path / "x.yaml")


def test_overrides_are_read_by_the_same_rules():
    with pytest.raises(ValueError, match=r"--set options\.x: an alias stands inside"):
        override({}, "options.x=&a [*a]")


def test_bases_that_go_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    with pytest.raises(ValueError, match=r"b.yaml: its base \./a.yaml leads back"):
        load_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, b"[" * 100_000])
def test_json_that_is_nested_deeply_is_an_error(text):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)


def test_json_numbers():
    with pytest.raises(ValueError, match="4300 digits"):
        parse_json("1" * 5000)
    for text in ("NaN", '{"a": [-Infinity]}'):
        with pytest.raises(ValueError, match="is not a JSON number"):
            parse_json(text, finite=True)
    assert math.isnan(parse_json("NaN")) and parse_json('{"a": 1e3}', finite=True) == {"a": 1000.0}
    with pytest.raises(json.JSONDecodeError):
        parse_json("{")


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"yaml\.(safe_load|load|full_load|unsafe_load)\b", set()),
        (r"yaml\.\w*Loader", {"utils/plain.py"}),
        (r"\bpickle\.loads?\(|cPickle|dill|joblib|shelve|marshal", set()),
        (r"Unpickler\b", {"utils/safe_pickle.py"}),
        (r"torch\.load\((?!.*weights_only=True)", set()),
        (r"allow_pickle=True|weights_only=False", set()),
        # words in what is written for others; the next test looks at the code
        (r"trust_remote_code|AutoModel|AutoTokenizer|AutoConfig\.", FOR_OTHERS),
        # the names of classes, which are read as text, and written
        (r"auto_map", {"model/checkpoints/config_file.py", "tools/portable/folder.py"}),
        (r"(?<![\w.])(eval|exec|compile|__import__)\(", set()),
        (r"shell=True|os\.system|os\.popen", set()),
        (r"extractall|unpack_archive", set()),
    ],
)
def test_nothing_in_the_project_runs_what_it_reads(pattern, allowed):
    found = {str(path.relative_to(ROOT)) for path in CODE if re.search(pattern, path.read_text(encoding="utf-8"))}
    assert found <= allowed, f"{pattern} in {found - allowed}"


@pytest.mark.parametrize(
    "path", [path for path in CODE if str(path.relative_to(ROOT)) in FOR_OTHERS], ids=lambda path: path.name
)
def test_code_written_for_others_is_never_asked_for_here(path):
    """Outside of texts, nothing names what loads a folder's code, nor could reach it by its name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        str(getattr(node, field, "")) for node in ast.walk(tree) for field in ("id", "attr", "arg", "name", "asname")
    }
    assert not [
        name
        for name in names
        if re.match(r"Auto(Model|Config|Tokenizer|Processor)|.*remote_code|.*dynamic_module", name)
    ]
    assert not names & {"getattr", "import_module", "__import__", "transformers"} - ALLOWED_NAMES.get(path.stem, set())
