"""Safe reading of JSON and YAML from outside: plain values only, at a cost that is bounded by the size of the text.

Every YAML file is read here. What cannot be read raises a ValueError that says why; callers add the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from utils.text import read_text

MAX_DEPTH = 64  # of nested mappings and lists
BASE_TEN = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")  # or, with their mark, 2 and 16
MAX_NODES = 100_000  # values of a YAML file, those of an alias counted at every use


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """The value of a JSON text. finite: refuse NaN and Infinity, which Python reads although they are not JSON.

    Syntax errors are json.JSONDecodeError, a ValueError that knows the place.
    """
    try:
        return json.loads(text, parse_constant=not_finite) if finite else json.loads(text)
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deeply") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file of settings, with finite numbers only; errors name the file."""
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
    """The value of a YAML text; refuses tags that create objects, aliases that multiply ("billion laughs"), and a key
    that stands twice in a mapping, of which YAML libraries silently take the last."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})  # before construction, where merge keys (<<) copy what their aliases stand for
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML's plain values without two kinds of whole numbers of YAML 1.1 that nobody means: 11:30:00 in base 60 (of a
    time limit in minutes, 41400), and 010 in base 8. They are text."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, BASE_TEN if tag.endswith(":int") else pattern) for tag, pattern in resolvers]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def leaves(value: Any) -> bool:
    """Whether a value, or one inside it, is a path that leaves its folder: absolute, or with "..", "~" or a drive."""
    if isinstance(value, dict):
        return any(map(leaves, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(leaves, value))
    if not isinstance(value, str):
        return False
    path = PurePosixPath(value.replace("\\", "/"))
    return path.is_absolute() or bool(PureWindowsPath(value).drive) or ".." in path.parts or value.startswith("~")


def _weigh(node: yaml.Node, weights: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(number of values at and below `node`, depth of their nesting), with aliases replaced by what they stand for.

    An alias is the same node object again, so nine lists of nine aliases each can stand for 9^9 values. Weighing visits
    every node once and adds up numbers, so it costs the size of the text whatever the aliases multiply to.

    weights: results by id(node); None while a node is being weighed, which finds an alias inside what it names.
    """
    if id(node) in weights:
        result = weights[id(node)]
        if result is None:
            raise ValueError(f"an alias stands inside what it names (line {node.start_mark.line + 1})")
        return result
    weights[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value  # of a mapping: (key, value) pairs
    inner = [_weigh(one, weights) for part in parts for one in (part if isinstance(part, tuple) else (part,))]
    weight = 1 + sum(count for count, _ in inner)
    depth = 1 + max((below for _, below in inner), default=0)
    if weight > MAX_NODES:
        raise ValueError(f"it holds more than {MAX_NODES} values once its aliases are replaced by what they stand for")
    if depth > MAX_DEPTH:
        raise ValueError(f"its lists and mappings are nested more than {MAX_DEPTH} deep")
    weights[id(node)] = weight, depth
    return weight, depth


def _check_keys(node: yaml.MappingNode) -> None:
    """Raises where a key stands twice. Merge keys (<<) may: each adds what its alias has."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise ValueError(f"the key {key.value!r} stands twice in one mapping (lines {lines[name]} and {line})")
            lines[name] = line


def not_finite(name: str) -> None:
    """For `parse_constant`: refuses NaN and Infinity."""
    raise ValueError(f"{name} is not a JSON number")
