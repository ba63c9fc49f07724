"""The LISA family's command line, mapped onto the recipe. `python -m utils.flags` prints docs/flags.md."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.config import Recipe, from_dict, load_yaml, merge, recipe_of, to_dict, with_overrides
from utils.flag_table import FLAGS, MIXTURE, SWAPS, TASK_DATA, WITHOUT_MEANING, Flag, page
from utils.reference import reference
from utils.registry import unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RELEASED = CONFIGS / "released"  # what the command lines of the releases mean


def resolve(argv: list[str], takes: Callable[..., list[str]], say: Callable = print) -> Recipe:
    """The recipe of a command line: dataclass default < --config < family flag < --set.

    takes: the systems that accept these options (what --num_all_classes sets) and flags, the default one first. Without
    --config the system is that of --system, or the one that takes the flags and knows the tasks of the mixture, and its
    `configs/released/<system>.yaml` is the base.
    """
    arguments = vars(_parser().parse_all(underscored(argv)))
    for name in ("config", "system", *MIXTURE):
        if not arguments.get(name, "-").strip():  # as of a shell variable that is not set
            raise ValueError(f"--{name} is empty: leave it out, or give a value")
    flags = set(arguments)
    config = arguments.pop("config", None)
    system = arguments.pop("system", None)
    assignments = arguments.pop("set", [])
    for name, why in WITHOUT_MEANING.items():
        if name in arguments:
            del arguments[name]
            if why:
                say(f"--{name} does nothing here: {why}")
    over: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.name in arguments:
            *outer, last = flag.field.split(".")
            over = merge(over, _nest(outer, {last: arguments.pop(flag.name)}))
    if config:
        base = load_yaml(config)
        if system:
            base["system"] = system
    else:
        system = system or _system_of(over.get("options", {}), flags, _tasks_named(arguments), takes)
        if system not in takes({}):
            raise ValueError(f"--system: {unknown('system', system, takes({}))}")
        base = _base(system)
    try:
        values = to_dict(from_dict(Recipe, merge(base, over)))
    except ValueError:
        if config:
            recipe_of(base, config)  # where the file alone is wrong, the message names it
        raise
    for name, swap in SWAPS.items():
        if arguments.pop(name, False):
            suites = [suite for suite in values["eval"]["suites"] if suite != swap.removes]
            values["eval"]["suites"] = [*suites, swap.adds]
    values["data"]["mixture"] = mix(values["data"]["mixture"], arguments)
    return from_dict(Recipe, with_overrides(values, assignments))


def check_flags(argv: Sequence[str]) -> None:
    """Ends the program where the command line asks for help, or has a flag that does not exist or lacks its value."""
    _parser().parse_all(underscored(argv))


def underscored(argv: Sequence[str]) -> list[str]:
    """Flag names with underscores, whichever way they were written. Values stay, except that a `~` for the home folder,
    which shells leave as it is after an equals sign, is replaced."""
    normal = []
    for text in argv:
        name, equals, value = text.partition("=")
        if name.startswith("--"):
            value = os.path.expanduser(value) if value.startswith("~/") else value
            text = f"--{name[2:].replace('-', '_')}{equals}{value}"
        normal.append(text)
    return normal


def mix(mixture: list[dict[str, Any]], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's mixture changed by --dataset, --sample_rates and --<task>_data.

    A task or set that the recipe already has keeps its rate and options; a new one starts at rate 1. The recipe knows a
    task at rate 0 but does not train on it, until --dataset names it and --sample_rates gives it a rate. A recipe may
    have several entries of one task; these flags, which know a task by its name, are refused then.
    """
    used = [name for name in arguments if name in ("dataset", "sample_rates") or name.endswith(TASK_DATA)]
    if not used:
        return mixture
    known = [task["task"] for task in mixture]
    if twice := [name for name in known if known.count(name) > 1]:
        raise ValueError(
            f"--{used[0]}: the recipe has several entries of task {twice[0]}; change its data.mixture instead"
        )
    tasks = {task["task"]: dict(task) for task in mixture}
    listing = _split(arguments.get("dataset", ""), "||")  # of --dataset
    names = listing or list(tasks)
    sets = {name.removesuffix(TASK_DATA): text for name, text in arguments.items() if name.endswith(TASK_DATA)}
    for name, text in sets.items():
        if name not in names:
            raise ValueError(f"--{name}{TASK_DATA}: {unknown('task', name, names)}")
        task = tasks.get(name, {"task": name, "rate": 1.0, "sets": ()})
        entries = {entry["source"]: entry for entry in task["sets"]}
        sources = [entry["source"] for entry in task["sets"]]
        if twice := [source for source in _split(text, "||") if sources.count(source) > 1]:
            raise ValueError(
                f"--{name}{TASK_DATA}: the recipe has several sets of source {twice[0]}; change its data.mixture "
                "instead"
            )
        new = [entries.get(source, {"source": source, "rate": 1.0, "options": {}}) for source in _split(text, "||")]
        tasks[name] = {**task, "sets": new}
    for name in names:
        if name not in tasks:
            raise ValueError(
                f"--dataset: {unknown('task', name, tasks)}; give a new task its sets by --{name}{TASK_DATA}"
            )
    result = [dict(tasks[name]) for name in names]
    idle = [task for task in result if not task["rate"]]
    if "sample_rates" in arguments:
        rates = _split(arguments["sample_rates"], ",")
        # Numbers are for all tasks; where --dataset names none, they may leave out the tasks at rate 0.
        active = [task for task in result if task["rate"]]
        to_set = result if listing or len(rates) == len(result) else active
        if len(rates) != len(to_set):
            expected = ", ".join(task["task"] for task in to_set)
            raise ValueError(f"--sample_rates has {len(rates)} numbers for {len(to_set)} tasks ({expected})")
        for task, rate in zip(to_set, rates, strict=True):
            task["rate"] = rate
    unused = [task["task"] for task in idle if not task["rate"] and task["task"] in (*listing, *sets)]
    if unused:
        raise ValueError(
            f"the recipe has {', '.join(unused)} at rate 0 and does not train on it: name every task in --dataset and "
            "give each its rate in --sample_rates"
        )
    return result


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"{self.prog}: {message}")

    def parse_all(self, args: list[str]) -> argparse.Namespace:
        """As `parse_args`, with the nearest flag in the message about an unknown one."""
        namespace, extra = self.parse_known_args(args)
        for text in extra:
            name = text.partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            if text.lower() in ("true", "false"):
                hint = "switches are written --name or --no_name, without a value"
            self.error(f"unknown {'flag' if text.startswith('-') else 'argument'} {text!r}; {hint}")
        return namespace


def _parser() -> _Parser:
    parser = _Parser(
        description="Trains a segmentation assistant. Precedence: default < --config < flag < --set.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog="Flags may be written with dashes or underscores.",
    )
    parser.add_argument("--config", metavar="YAML", help="recipe to start from (see configs/)")
    parser.add_argument("--system", metavar="NAME", help="with no --config: whose recipe to start from")
    parser.add_argument("--set", action="append", metavar="A.B=V", help="set any recipe field, e.g. train.zero_stage=3")
    parser.add_argument("--help_config", action=_HelpConfig, nargs=0, help="print all recipe fields and exit")
    for flag in FLAGS:
        text = f"{flag.help} [{flag.field}]"
        if flag.value is not None:
            parser.add_argument(*flag.spellings, action="store_const", const=flag.value, help=text)
        elif flag.value_type is bool:
            parser.add_argument(*flag.spellings, action=_Switch, dest=flag.name, nargs=0, help=text)
        elif flag.switch:
            alone, negated = flag.switch
            parser.add_argument(f"--{flag.name}", nargs="?", const=alone, metavar="V", help=f"{text}; alone: {alone}")
            parser.add_argument(f"--no_{flag.name}", action="store_const", const=negated, dest=flag.name)
        else:
            parser.add_argument(f"--{flag.name}", type=_reader(flag), metavar="V", help=text)
    for name, text in MIXTURE.items():
        parser.add_argument(f"--{name}", metavar="V", help=text)
    for name, swap in SWAPS.items():
        parser.add_argument(f"--{name}", action="store_true", help=swap.help)
    for name, why in WITHOUT_MEANING.items():
        parser.add_argument(
            f"--{name}", nargs="?", metavar="V", help=f"accepted, changes nothing: {why}" if why else argparse.SUPPRESS
        )
    return parser


class _HelpConfig(argparse.Action):
    """Prints the reference of recipe fields and ends the program."""

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        print(reference(), end="")
        raise SystemExit


class _Switch(argparse.Action):
    """`--name` sets True, `--no_name` False."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def _reader(flag: Flag) -> Callable[[str], Any]:
    if flag.value_type in (int, float, str):
        return flag.value_type
    return lambda text: _split(text, flag.separator)


def at_least(low: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `low` up."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if number < low:
            raise argparse.ArgumentTypeError(f"{number} is out of range; it must be {low} or more")
        return number

    return read


def _split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]


def _nest(keys: list[str], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def _base(system: str) -> dict[str, Any]:
    """What the released command line of a system means."""
    path = _base_file(system)
    return load_yaml(path) if path.is_file() else {"system": system}


def _base_file(system: str) -> Path:
    return RELEASED / f"{system}.yaml"


def _tasks_of(system: str) -> set[str]:
    return {task["task"] for task in _base(system).get("data", {}).get("mixture", ())}


def _tasks_named(arguments: dict[str, Any]) -> set[str]:
    tasks = {name.removesuffix(TASK_DATA) for name in arguments if name.endswith(TASK_DATA)}
    return tasks | set(_split(arguments.get("dataset", ""), "||"))


def _system_of(options: dict[str, Any], flags: set[str], tasks: set[str], takes: Callable[..., list[str]]) -> str:
    """The default system where it takes options and flags and knows the tasks, else the only one that does.

    A system that nobody has released has no such file: a command line never means it without --system.
    """
    default = takes({})[0]
    names = [name for name in takes(options, flags) if _base_file(name).is_file()]
    names = [name for name in names if tasks <= _tasks_of(name)] or names
    if default in names:
        return default
    if len(names) != 1:
        have = ", ".join(names) or "none"
        raise ValueError(f"which system? pass --system or --config (those that take {', '.join(options)}: {have})")
    return names[0]


if __name__ == "__main__":
    print(page(), end="")
