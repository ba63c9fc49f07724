"""The files around the code agree with it and with one another: citation, changelog, editor, pre-commit, public CI."""

from __future__ import annotations

import configparser
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OLDEST = PROJECT["tool"]["ruff"]["target-version"].removeprefix("py")  # Python, without the dot
PINS = dict(
    re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements-dev.txt").read_text(encoding="utf-8"), re.MULTILINE)
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_file_names_every_credited_paper():
    citation = yaml.safe_load(read("CITATION.cff"))
    needed = {"cff-version": "1.2.0", "type": "software", "license": "Apache-2.0"}
    assert needed.items() <= citation.items() and citation["title"] and citation["message"] and citation["authors"]
    cited = {reference["url"].rpartition("/")[2]: reference for reference in citation["references"]}
    credited = dict(re.findall(r"\*([^*]+?)\.\*[^*\n]*arXiv (\d{4}\.\d{5})", read("README.md")))
    assert len(credited) == 5 and set(cited) == set(credited.values())
    for title, number in credited.items():
        assert cited[number]["title"].casefold() == title.casefold()
        assert cited[number]["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]
        assert cited[number]["authors"] and cited[number]["year"] >= 2023


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = read("CHANGELOG.md")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds and kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_editors_and_ruff_agree():
    config = configparser.ConfigParser()
    config.read_string(read(".editorconfig").replace("root = true", "[root]", 1))
    assert config.getint("*.py", "max_line_length") == PROJECT["tool"]["ruff"]["line-length"]
    assert config.getint("*.py", "indent_size") == 4


def test_pre_commit_runs_the_ruff_of_the_requirements():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    revisions = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in hooks if repo["repo"] != "local"}
    assert revisions["ruff-pre-commit"] == f"v{PINS['ruff']}"
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", revision) for revision in revisions.values())
    names = {hook["id"] for repo in hooks for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "end-of-file-fixer", "check-added-large-files", "codespell", "ty"} <= names


def test_every_warning_is_an_error_unless_it_is_named():
    """A warning of our own cannot be excepted: each exception names a message, or a package that it comes from."""
    first, *exceptions = PROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert first == "error"
    for exception in exceptions:
        action, message, category, *module = exception.split(":")
        assert action == "ignore" and category
        assert message or module or category == "ResourceWarning", exception
        assert not module or not (ROOT / module[0].split(".")[0]).exists(), exception


def test_types_are_checked_everywhere_but_in_the_tests():
    """The folders left out hold no code of ours."""
    assert "\nty check\n" in read("scripts/test.sh") and "ty" in PINS
    ignored = {line.strip("/") for line in read(".gitignore").splitlines()}
    assert set(PROJECT["tool"]["ty"]["src"]["exclude"]) <= ignored | {"tests"}
    assert PROJECT["tool"]["ty"]["environment"]["python-version"].replace(".", "") == OLDEST


def test_the_public_ci_runs_what_there_is():
    workflow = yaml.safe_load(read(".github/workflows/test.yml"))
    jobs = workflow["jobs"]
    versions = jobs["fast"]["strategy"]["matrix"]["python-version"]
    assert versions[0].replace(".", "") == OLDEST and versions == ["3.11", "3.12", "3.13"]
    commands = "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
    assert {"bash scripts/test.sh", "bash scripts/test.sh -m slow"} <= set(commands.splitlines())
    for name in re.findall(r"[\w./-]+\.(?:sh|txt|py)\b", commands):
        assert (ROOT / name).is_file(), name
    markers = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    assert "slow" in markers
    assert all("timeout-minutes" in job for job in jobs.values())
    triggers = workflow[True]  # how YAML 1.1 reads `on`
    assert triggers["schedule"] and {"push", "pull_request"} <= set(triggers)
    assert workflow["permissions"] == {"contents": "read"}


def test_commands_of_the_contributors_pages_are_there():
    for page in ("CONTRIBUTING.md", "SECURITY.md"):
        for name in re.findall(r"(?:bash|python) ((?!-)[\w/]+\.(?:sh|py))", read(page)):
            assert (ROOT / name).is_file(), f"{page}: {name}"


def test_what_the_security_page_says_of_the_code():
    """Reading a file never runs code: the calls that could do so do not occur outside the tests. (Remote code of
    transformers: tests/test_plain.py.)"""
    forbidden = re.compile(
        r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|yaml\.(?:unsafe_|full_)?load\(|"
        r"\bpickle\.loads?\(|\bjoblib\b|\bmarshal\b|shell\s*=\s*True|os\.system\("
    )
    tops = [path for path in ROOT.iterdir() if path.name not in {".venv", "tests", "runs", "dataset", "output"}]
    sources = [path for top in tops for path in ([top] if top.suffix == ".py" else top.rglob("*.py"))]
    assert len(sources) > 100
    assert not [f"{path.name}: {found[0]}" for path in sources if (found := forbidden.search(path.read_text("utf-8")))]
    loads = [path.name for path in sources for call in re.findall(r"torch\.load\([^)]*\)", path.read_text("utf-8"))
             if "weights_only=True" not in call]  # fmt: skip
    assert not loads, f"torch.load without weights_only=True: {loads}"
