"""JSON and YAML from outside as plain values: whatever such a file says, reading it costs no more than its size.

Every YAML file is read here. What cannot be read raises a ValueError that says why; callers add the file.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from utils.text import read_text

MAX_DEPTH = 64  # mappings and lists inside one another
MAX_NODES = 100_000  # values of a YAML file, an alias counted as often as it stands for something


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """The value of a JSON text. finite: refuse NaN and Infinity, which are no JSON but which Python reads.

    Syntax errors stay json.JSONDecodeErrors, which are ValueErrors that know the place.
    """
    try:
        return json.loads(text, parse_constant=_not_finite) if finite else json.loads(text)
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deeply") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file of settings holds, with finite numbers; errors name the file."""
    text = read_text(path)
    try:
        values = parse_json(text, finite=True)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping at the top, got {type(values).__name__}")
    return values


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; errors name it."""
    text = read_text(path)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, without tags that make objects and without aliases that multiply ("billion laughs")."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})  # before anything is constructed: merge keys (<<) copy what their aliases stand for
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def leaves(value: Any) -> bool:
    """Whether a value, or one inside it, is a path that leaves the folder it is meant to lie in."""
    if isinstance(value, dict):
        return any(map(leaves, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(leaves, value))
    if not isinstance(value, str):
        return False
    path = PurePosixPath(value.replace("\\", "/"))
    return path.is_absolute() or bool(PureWindowsPath(value).drive) or ".." in path.parts or value.startswith("~")


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """The number of values below and including `node`, and how deeply they are nested. known: the same of nodes seen;
    None of those that are being counted."""
    if id(node) in known:
        if known[id(node)] is None:
            raise ValueError(f"an alias stands inside what it names (line {node.start_mark.line + 1})")
        return known[id(node)]
    known[id(node)] = None
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    inner = [_weigh(one, known) for part in parts for one in (part if isinstance(part, tuple) else (part,))]
    weight, depth = 1 + sum(count for count, _ in inner), 1 + max((below for _, below in inner), default=0)
    if weight > MAX_NODES:
        raise ValueError(f"it holds more than {MAX_NODES} values once its aliases are replaced by what they stand for")
    if depth > MAX_DEPTH:
        raise ValueError(f"its lists and mappings are nested more than {MAX_DEPTH} deep")
    known[id(node)] = weight, depth
    return known[id(node)]


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
