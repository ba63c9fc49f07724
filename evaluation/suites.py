"""Finds suites by name, group and glob: those of the catalog, and those that a recipe or a file defines."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.sources import SOURCES
from evaluation.catalog import ENTRIES, Suite
from evaluation.metrics import SCORERS
from utils.config import EvalConfig, SuiteConfig, from_dict, load_recipe
from utils.plain import parse_yaml
from utils.registry import unknown
from utils.text import read_text

SUITES: dict[str, Suite] = {suite.name: suite for suite in ENTRIES}
GROUPS = tuple(dict.fromkeys(suite.group for suite in ENTRIES))
OWN_GROUP = "custom"
ALIASES = {  # other names of suites, sets and combined groups
    "generalised": ("gref", "zom"),
    "premise": ("fp", "r"),
    "multi": ("muse",),
    "reasonseg": ("reason",),
    "pc59": ("pascal_context",),
    "pas20": ("pascal_voc",),
    "MultiReasonSeg|val": ("muse|val",),
}
OWN_NAME = re.compile(r"[\w+-]+(\|[\w+-]+)*")  # files are named after it


def find_suites(patterns: Iterable[str], custom: Sequence[SuiteConfig] = ()) -> list[Suite]:
    """The suites of names, sets (`ade20k`, `refcoco`), groups (`semantic`, `fp`, `all`) and globs (`refcoco*|val`).

    A pattern may also be the name of the suite's source, as published flags write it. Suites come in the order of the
    patterns, each once. custom: suites in addition to those of the catalog, as in a recipe's `eval.custom`; their group
    is `custom`. Raises ValueError with the choices for a pattern that fits no suite.
    """
    entries = (*ENTRIES, *own_suites(custom))
    suites: dict[str, Suite] = {}
    for pattern in (part for name in patterns for part in ALIASES.get(name, (name,))):
        hits = [suite for suite in entries if suite.name == pattern]
        if not hits:
            hits = [suite for suite in entries if _fits(suite, pattern)]
        if not hits:
            raise ValueError(unknown("suite", pattern, _choices(entries)))
        suites |= {suite.name: suite for suite in hits}
    if not suites:
        raise ValueError(f"no suite named; have: {', '.join(_choices(entries))}")
    return list(suites.values())


def own_suites(custom: Sequence[SuiteConfig]) -> list[Suite]:
    """The suites that a recipe defines. Raises ValueError with the place in the recipe for a name that is taken, an
    unknown source, metric or option."""
    suites: dict[str, Suite] = {}
    for index, entry in enumerate(custom):
        where = f"eval.custom[{index}]"
        if not OWN_NAME.fullmatch(entry.name):
            raise ValueError(f"{where}.name: {entry.name!r} is no name; letters, digits, _, +, -, and | between parts")
        if entry.name in (*_choices(ENTRIES), *ALIASES, *suites):
            raise ValueError(f"{where}.name: {entry.name!r} is taken; give it another name")
        # Files are named after suites, with _ for |, so `a|b` and `a_b` would share theirs.
        files = {suite.name.replace("|", "_"): suite.name for suite in (*ENTRIES, *suites.values())}
        other = files.get(entry.name.replace("|", "_"))
        if other is not None:
            raise ValueError(
                f"{where}.name: the files of {entry.name!r} would be those of {other!r}; give it another name"
            )
        if entry.metric not in SCORERS:
            raise ValueError(f"{where}.metric ({entry.name}): {unknown('metric', entry.metric, SCORERS)}")
        base = entry.source.split("|")[0]
        if base not in SOURCES:
            raise ValueError(f"{where}.source ({entry.name}): {unknown('source', base, SOURCES)}")
        known = inspect.signature(SOURCES[base]).parameters.keys() - {"root"}
        for key in entry.options:
            if key not in known:
                raise ValueError(f"{where}.options ({entry.name}): {unknown(f'option of {base}', key, known)}")
        needs = ", ".join([entry.source, *(str(value) for value in entry.options.values())])
        suites[entry.name] = Suite(
            entry.name, OWN_GROUP, entry.metric, needs, entry.options, entry.source, entry.present_only, own=True
        )
    return list(suites.values())


def read_custom(path: str | Path) -> tuple[SuiteConfig, ...]:
    """The suites that a YAML file defines: a list of them, or a recipe with `eval.custom`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of suites {path}")
    try:
        values = parse_yaml(read_text(path))
        if isinstance(values, list):
            config = from_dict(EvalConfig, {"custom": values}, "eval")
        else:
            config = load_recipe(path).eval
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not config.custom:
        raise ValueError(f"{path} defines no suite; it needs eval.custom, or a list of name, source, metric, options")
    return config.custom


def table(custom: Sequence[SuiteConfig] = ()) -> str:
    """The table that `test_sem.py --list` prints: name, group, metric, protocols (the default first), data needed."""
    rows = [("suite", "group", "metric", "protocols", "data below the dataset folder")]
    rows += [(s.name, s.group, s.metric, s.protocols, s.needs) for s in (*ENTRIES, *own_suites(custom))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _choices(entries: Sequence[Suite]) -> list[str]:
    """Names, then groups, then sets, each once: a pattern most likely means one of the first."""
    names = [suite.name for suite in entries]
    groups = [suite.group for suite in entries]
    sets = [suite.set for suite in entries]
    return list(dict.fromkeys((*names, *groups, "all", *sets)))


def _fits(suite: Suite, pattern: str) -> bool:
    if pattern in ("all", suite.group, suite.set, suite.source or suite.name):
        return True
    return any(mark in pattern for mark in "*?[") and fnmatch.fnmatchcase(suite.name, pattern)
