"""Reads and writes recipes: YAML with `base:`, dotted overrides, checks of every value. The resolved recipe is saved in
the run folder and read back.

`python -m utils.config` prints the reference of all fields, docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from utils.files import write_atomically
from utils.model_recipe import CacheConfig, LoraConfig, ModelConfig, TowerConfig
from utils.plain import leaves, parse_yaml, read_yaml
from utils.recipe import (
    DataConfig,
    DatasetConfig,
    EvalConfig,
    LossConfig,
    Recipe,
    RunConfig,
    SuiteConfig,
    TaskConfig,
    TrainConfig,
)
from utils.registry import unknown
from utils.renamed import find_config, new_name, with_new_names

__all__ = [
    "CacheConfig",
    "DataConfig",
    "DatasetConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "Recipe",
    "RunConfig",
    "SuiteConfig",
    "TaskConfig",
    "TowerConfig",
    "TrainConfig",
    "bounds_text",
    "choices",
    "from_dict",
    "load_recipe",
    "load_yaml",
    "merge",
    "override",
    "recipe_of",
    "save_recipe",
    "to_dict",
    "with_overrides",
    "without_none",
]
LENGTHS = (("steps",), ("epochs", "steps_per_epoch"))  # of `train`: the two ways to say how long


def from_dict(cls: Any, values: dict[str, Any], where: str = "") -> Any:
    """Builds a (nested) dataclass from plain values.

    An unknown key, a wrong type, a value that is no choice or out of range raises a ValueError that names its dotted
    place. A whole recipe may have the field names of earlier ones (RENAMED).
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where or cls.__name__}: expected a mapping, got {values!r}")
    if cls is Recipe:
        values = with_new_names(values)
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(unknown(f"field in {where or 'the recipe'}", str(key), hints))
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where}: needs {', '.join(missing)}; its fields are {', '.join(hints)}")
    cast = {key: _cast(value, hints[key], f"{where}.{key}".lstrip(".")) for key, value in values.items()}
    for entry in dataclasses.fields(cls):
        if entry.metadata.get("path") and isinstance(path := cast.get(entry.name), str):
            cast[entry.name] = os.path.expanduser(path)
    made = cls(**cast)
    for entry in dataclasses.fields(cls):
        if "range" in entry.metadata and isinstance(value := getattr(made, entry.name), (int, float)):
            _check_range(value, *entry.metadata["range"], f"{where}.{entry.name}".lstrip("."))
    if cls is RunConfig:
        _check_run(made, where)
    return made


def _check_range(value: float, low: float | None, high: float | None, above: bool, below: bool, where: str) -> None:
    inside = (low is None or value > low or (value == low and not above)) and (
        high is None or value < high or (value == high and not below)
    )
    if not (inside and math.isfinite(value)):
        raise ValueError(
            f"{where}: {value!r} is out of range; it must be {bounds_text(low, high, above, below) or 'finite'}"
        )


def _check_run(run: RunConfig, where: str) -> None:
    """A run folder of its own below the folder of all runs."""
    parts = Path(run.exp_name).parts
    if not run.exp_name.strip() or not parts or leaves(run.exp_name):
        raise ValueError(
            f"{where}.exp_name: {run.exp_name!r} names no folder below run.log_base_dir; give the run a name "
            "(--exp_name), such as lisa-7b"
        )
    if not run.log_base_dir.strip():
        raise ValueError(f"{where}.log_base_dir is empty; name the folder of all runs, such as ./runs")


def _cast(value: Any, kind: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _cast(value, without_none(kind), where)
    if origin is Literal:
        value = "off" if value is False and "off" in args else value  # how YAML reads a bare off
        if not any(type(value) is type(choice) and value == choice for choice in args):
            value = _choice_of(value, args, where)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_cast(item, args[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and not isinstance(value, dict):
        raise ValueError(f"{where}: expected a mapping, got {value!r}")
    if origin is dict or kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if kind is DatasetConfig and isinstance(value, str):  # `- ade20k` is short for `- {source: ade20k}`
            value = {"source": value}
        return value if isinstance(value, kind) else from_dict(kind, value, where)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(float, value, where)
    if kind is int and isinstance(value, str):
        return _number(int, value, where)
    if kind is str and not isinstance(value, (str, Path)):
        raise ValueError(f"{where}: expected str, got {value!r} ({type(value).__name__}); write text in quotes")
    if kind is str and isinstance(value, Path):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _choice_of(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    """The choice that a value of another type spells ("2" for 2); raises where it is none."""
    for choice in choices:
        if isinstance(value, str) and value == str(choice):
            return choice
    raise ValueError(unknown(where, str(value), [str(choice) for choice in choices]))


def _number(kind: type, value: Any, where: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}") from None


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain values (lists, not tuples) that YAML and `from_dict` take."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(recipe))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; lists and scalars replace.

    The length of training is one value with two spellings: `train.steps` replaces epochs, and the other way round.
    """
    if isinstance(over.get("train"), dict) and isinstance(base.get("train"), dict):
        base = {**base, "train": _without_other_length(base["train"], over["train"])}
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _without_other_length(train: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`train` without the fields that say how long in another way than `over` does."""
    ways = [any(over.get(name) is not None for name in names) for names in LENGTHS]
    if sum(ways) != 1:
        return train
    other = LENGTHS[ways.index(False)]
    return {name: value for name, value in train.items() if name not in other}


def load_yaml(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as plain values under the names of today. `base: other.yaml` (relative to the file) is read first
    and overridden.

    above: the files whose `base` led here.
    """
    path, values = _read(path)
    base = _base_of(path, values)
    if base is None:
        return with_new_names(values, complete=True)
    above = (*above, path.resolve())
    if find_config(base).resolve() in above:
        raise ValueError(f"{path}: its base {values['base']} leads back to it")
    return merge(load_yaml(base, above), with_new_names({key: values[key] for key in values if key != "base"}))


def _read(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """A recipe file, where it is today, and what it holds."""
    path = find_config(path)
    if not path.is_file():
        hint = (
            f"it is a folder; a run's is {path / 'recipe.yaml'}"
            if path.is_dir()
            else "see configs/ for the ones shipped"
        )
        raise FileNotFoundError(f"no recipe {path}; {hint}")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping at the top, got {type(values).__name__}")
    return path, values


def _base_of(path: Path, values: dict[str, Any]) -> Path | None:
    if "base" not in values:
        return None
    base = values["base"]
    if not isinstance(base, str) or not base.strip():
        raise ValueError(f"{path}: base must be the name of a recipe file, got {base!r}")
    return path.parent / os.path.expanduser(base)


def load_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file or of a run folder (its `recipe.yaml`)."""
    path = Path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
        if path.is_file() and "base" in (read_yaml(path) or {}):
            raise ValueError(f"{path}: the recipe in a folder of weights is a whole one, without a base")
    return recipe_of(load_yaml(path), path)


def recipe_of(values: dict[str, Any], path: str | Path) -> Recipe:
    """The recipe of what a file and its bases hold; errors name the one that is wrong."""
    try:
        return from_dict(Recipe, values)
    except ValueError as error:
        raise ValueError(f"{_file_at_fault(path, str(error))}: {error}") from None


def _file_at_fault(path: str | Path, message: str) -> Path:
    """The base that gives this error without the files above it; `path` where none does."""
    base = _base_of(*_read(path))
    if base is not None:
        try:
            from_dict(Recipe, load_yaml(base))
        except ValueError as error:
            if str(error) == message:
                return _file_at_fault(base, message)
    return Path(path)


def save_recipe(recipe: Recipe, folder: str | Path) -> Path:
    path = Path(folder) / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True))
    return path


def override(values: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Applies one `a.b=v` (v is read as YAML) to plain values; list items by index (`data.mixture.0.rate=2`)."""
    if "=" not in assignment:
        raise ValueError(f"--set takes a.b=value, got {assignment!r}")
    dotted, text = assignment.split("=", 1)
    value = _value(text, dotted)
    keys = dotted.split(".")
    if isinstance(value, dict) and _is_section(keys):  # as in a file: fields that are not named stay
        return merge(values, with_new_names(_put({}, keys, value, dotted)))
    if new_name(dotted) == dotted:
        section, _, name = dotted.partition(".")
        if section == "train" and isinstance(values.get("train"), dict):
            values = {**values, "train": _without_other_length(values["train"], {name: value})}
        return _put(values, keys, value, dotted)
    # The value is translated in a recipe of its own, and replaces what the field of today holds.
    translated: Any = with_new_names(_put({}, keys, value, dotted))
    keys = new_name(dotted).split(".")
    for key in keys:
        translated = translated[key]
    return _put(values, keys, translated, dotted)


def with_overrides(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """The values after all assignments of `--set`, in their order."""
    for assignment in assignments:
        values = override(values, assignment)
    return values


def _is_section(keys: list[str]) -> bool:
    """Whether a field is a section of the recipe, with fields of its own."""
    kind: Any = Recipe
    for key in keys:
        kind = without_none(typing.get_type_hints(kind).get(key)) if dataclasses.is_dataclass(kind) else None
    return dataclasses.is_dataclass(kind)


def _value(text: str, dotted: str) -> Any:
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {dotted}: {error}") from None
    text = text.strip()
    # A path or a name, of which YAML takes " #2" for a comment: there are none on a command line.
    return text if isinstance(value, str) and text.startswith(f"{value} ") else value


def _put(values: Any, keys: list[str], value: Any, dotted: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(values, list):
        if not key.isdigit() or int(key) >= len(values):
            raise ValueError(f"--set {dotted}: {key!r} is not an index below {len(values)}")
        return [_put(item, rest, value, dotted) if i == int(key) else item for i, item in enumerate(values)]
    values = values if isinstance(values, dict) else {}
    return {**values, key: _put(values.get(key, {}), rest, value, dotted)}


def choices(section: type, name: str) -> tuple[Any, ...]:
    """The choices of a field whose type is a Literal."""
    return typing.get_args(without_none(typing.get_type_hints(section)[name]))


def without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def bounds_text(low: float | None, high: float | None, above: bool, below: bool) -> str:
    ends = []
    if low is not None:
        ends.append(f"above {low}" if above else f"{low} or more")
    if high is not None:
        ends.append(f"below {high}" if below else f"at most {high}")
    return " and ".join(ends)


if __name__ == "__main__":
    from utils.reference import reference

    print(reference(), end="")
