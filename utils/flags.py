"""The LISA family's command line, mapped onto the recipe. `python -m utils.flags` prints docs/flags.md."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from utils.config import Recipe, from_dict, load_yaml, merge, to_dict, with_overrides, without_none
from utils.reference import reference
from utils.registry import unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RELEASED = CONFIGS / "released"  # what the command lines of the releases mean


@dataclass(frozen=True)
class Flag:
    """A flag, and the dotted recipe field that it sets.

    separator: between the items of a list. kind: the type of the value; None: the field's. switch: what --name without
    a value and --no_name set, where the field is no bool. value: what the flag sets, where it takes none and cannot be
    negated.
    """

    name: str
    field: str
    help: str
    separator: str = ","
    kind: type | None = None
    switch: tuple[str, str] | None = None
    value: bool | None = None

    @property
    def value_type(self) -> Any:
        return self.kind or _field_type(self.field)

    @property
    def spellings(self) -> tuple[str, ...]:
        """With underscores; the parser takes dashes as well."""
        negated = self.value is None and (self.value_type is bool or self.switch)
        return (f"--{self.name}", f"--no_{self.name}") if negated else (f"--{self.name}",)


FLAGS = (
    Flag("version", "model.version", "base LLaVA, or a finished checkpoint to continue from"),
    Flag("mllm_model_path", "model.version", "the same, as another paper calls it"),
    Flag("weight", "model.checkpoint_file", "training file over version's weights, e.g. a bare .bin of zero_to_fp32"),
    Flag("vision_tower", "model.vision_tower", "CLIP folder or hub name"),
    Flag("resize_vision_tower_size", "model.tower.size", "side of the vision tower's view"),
    Flag("pad_train_clip_images", "model.tower.pad", "show the tower the full image, padded, not its centre"),
    Flag("preprocessor_config", "model.tower.preprocessor", "image-processor file that says the size of the view"),
    Flag("vision_pretrained", "model.vision_pretrained", "SAM weights, file or folder"),
    Flag("segmentation_model_path", "model.vision_pretrained", "the same, as another paper calls it"),
    Flag("precision", "model.precision", "fp32, bf16 or fp16"),
    Flag("image_size", "model.image_size", "side of the mask encoder's view"),
    Flag("model_max_length", "model.model_max_length", "longest row that is trained on"),
    Flag("out_dim", "model.out_dim", "width of the mask prompt"),
    Flag("conv_type", "model.conv_type", "conversation template"),
    Flag("use_mm_start_end", "model.use_mm_start_end", "wrap the image in `<im_start>` and `<im_end>`"),
    Flag("train_mask_decoder", "model.train_mask_decoder", "train the mask decoder"),
    Flag("gradient_checkpointing", "model.gradient_checkpointing", "recompute activations in the backward pass"),
    Flag("load_in_8bit", "model.load_in_8bit", "8-bit language model (inference)"),
    Flag("load_in_4bit", "model.load_in_4bit", "4-bit language model; training adapters on it is QLoRA"),
    Flag("allow_missing", "model.allow_missing", "continue when a checkpoint lacks weights or has unexpected ones"),
    Flag("lora_r", "model.lora.r", "LoRA rank, 0: none"),
    Flag("lora_alpha", "model.lora.alpha", "LoRA scale times rank"),
    Flag("lora_dropout", "model.lora.dropout", "LoRA dropout"),
    Flag("lora_target_modules", "model.lora.target_modules", "linears that get LoRA"),
    Flag("dataset_dir", "data.dataset_dir", "root of all datasets"),
    Flag("workers", "data.workers", "loader processes"),
    Flag(
        "exclude_val",
        "data.exclude_val",
        "whose images to keep out of training: off, eval_suites, refer_family or cross_refer",
        switch=("refer_family", "off"),
    ),
    Flag(
        "sampling",
        "data.sampling",
        "rates: sample by rate; epoch: every record once per epoch",
        switch=("rates", "epoch"),
    ),
    Flag("num_classes_per_sample", "options.num_classes_per_sample", "dialogues per image at most", kind=int),
    Flag("num_all_classes", "options.num_all_classes", "classes per answer at most", kind=int),
    Flag("num_classes_per_question", "options.num_classes_per_question", "targets per question at most", kind=int),
    Flag("seg_token_num", "options.seg_token_num", "mask tokens per scale", kind=int),
    Flag("image_feature_scale_num", "options.image_feature_scale_num", "scales of mask tokens", kind=int),
    Flag("use_expand_question_list", "options.use_expand_question_list", "train on more questions", kind=bool),
    Flag("explanatory", "options.explanatory", "share of samples that ask for an explanation", kind=float),
    Flag("ce_loss_weight", "loss.ce", "weight of the text loss"),
    Flag("dice_loss_weight", "loss.dice", "weight of the dice loss"),
    Flag("bce_loss_weight", "loss.bce", "weight of the mask cross entropy"),
    Flag("epochs", "train.epochs", "epochs"),
    Flag("steps_per_epoch", "train.steps_per_epoch", "optimizer steps per epoch; without: 500, or every record once"),
    Flag("batch_size", "train.batch_size", "images per device and micro-step"),
    Flag("grad_accumulation_steps", "train.grad_accumulation_steps", "micro-steps per optimizer step"),
    Flag("lr", "train.lr", "peak learning rate"),
    Flag("beta1", "train.beta1", "AdamW"),
    Flag("beta2", "train.beta2", "AdamW"),
    Flag("print_freq", "train.print_freq", "steps between two log lines"),
    Flag("resume", "train.resume", "checkpoint folder to resume from"),
    Flag("auto_resume", "train.auto_resume", "resume from the run folder's last checkpoint"),
    Flag("val_dataset", "eval.suites", "validation suites", separator="||"),
    Flag("val_dataset_list", "eval.final_suites", "suites of the final evaluation"),
    Flag("final_eval", "eval.final_eval", "evaluate the final suites after the last step"),
    Flag("val_batch_size", "eval.batch_size", "images per step of a validation"),
    Flag("no_eval", "eval.validate", "no validation while training", value=False),
    Flag("eval_only", "eval.eval_only", "evaluate and exit"),
    Flag("log_base_dir", "run.log_base_dir", "folder of all runs"),
    Flag("exp_name", "run.exp_name", "name of the run folder"),
)

TASK_DATA = "_data"  # --<task>_data "a||b": the sets of a task of the mixture
MIXTURE = {
    "dataset": 'tasks of the mixture, "sem_seg||refer_seg||vqa||reason_seg"',
    "sample_rates": "their rates, 9,3,3,1",
    "sem_seg_data": 'sets of the task sem_seg, "ade20k||cocostuff"',
    "refer_seg_data": "sets of the task refer_seg",
    "neg_refer_seg_data": "sets of the task neg_refer_seg: expressions of other images",
    "correct_refer_seg_data": "sets of the task correct_refer_seg: false premises with corrections",
    "vqa_data": "sets of the task vqa",
    "multi_reason_seg_data": "sets of the task multi_reason_seg: questions about several objects",
    "reason_seg_data": 'sets of the task reason_seg, "ReasonSeg|train"',
}


@dataclass(frozen=True)
class Swap:
    """A flag that replaces one validation suite by another."""

    help: str
    removes: str
    adds: str


SWAPS = {"val_refzom": Swap("validate on Ref-ZOM instead of gRefCOCO", "grefcoco|unc|val", "refzom|final|test")}
WITHOUT_MEANING = {  # flags of the originals that are accepted, and why they change nothing
    "vis_save_path": "training renders no images of its own; chat.py and test_sem.py have it",
    "save_inter": "set train.save_steps to save between epochs",
    "start_epoch": "the checkpoint that is resumed knows its step",
    "resize_vision_tower": "--resize_vision_tower_size or --preprocessor_config gives it",
    "vision_tower_for_mask": "a mask head that decodes from the tower's features always does",
    "separate_mm_projector": "such a head always has a projector of its own",
    "merge_lora_path": "the original never reads it; merge_lora_weights_and_save_hf_model.py merges",
    "local_rank": "",  # every launcher passes it; the environment has the same
}


def resolve(argv: list[str], takes: Callable[..., list[str]], say: Callable = print) -> Recipe:
    """The recipe of a command line: dataclass default < --config < family flag < --set.

    takes: the systems that accept these options (what --num_all_classes sets) and flags, the default one first. Without
    --config the system is that of --system, or the one that takes the flags and knows the tasks of the mixture, and its
    `configs/released/<system>.yaml` is the base.
    """
    arguments = vars(_parser().parse_all(underscored(argv)))
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
    values = to_dict(from_dict(Recipe, merge(base, over)))
    for name, swap in SWAPS.items():
        if arguments.pop(name, False):
            suites = [suite for suite in values["eval"]["suites"] if suite != swap.removes]
            values["eval"]["suites"] = [*suites, swap.adds]
    values["data"]["mixture"] = mix(values["data"]["mixture"], arguments)
    return from_dict(Recipe, with_overrides(values, assignments))


def underscored(argv: Sequence[str]) -> list[str]:
    """Flag names with underscores, whichever way they were written; values stay."""
    normal = []
    for text in argv:
        name, equals, value = text.partition("=")
        normal.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else text)
    return normal


def mix(mixture: list[dict[str, Any]], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's mixture changed by --dataset, --sample_rates and --<task>_data.

    A task or set that the recipe already has keeps its rate and options; a new one starts at rate 1. The recipe knows a
    task at rate 0 but does not train on it, until --dataset names it and --sample_rates gives it a rate.
    """
    tasks = {task["task"]: dict(task) for task in mixture}
    listing = _split(arguments.get("dataset", ""), "||")  # of --dataset
    names = listing or list(tasks)
    sets = {name.removesuffix(TASK_DATA): text for name, text in arguments.items() if name.endswith(TASK_DATA)}
    for name, text in sets.items():
        if name not in names:
            raise ValueError(f"--{name}{TASK_DATA}: {unknown('task', name, names)}")
        task = tasks.get(name, {"task": name, "rate": 1.0, "sets": ()})
        entries = {entry["source"]: entry for entry in task["sets"]}
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


def markdown() -> str:
    """The table of flags."""
    lines = ["| flag | recipe field | default | what |", "| --- | --- | --- | --- |"]
    for flag in FLAGS:
        spelling = ", ".join(f"`{name}`" for name in flag.spellings)
        lines.append(f"| {spelling} | `{flag.field}` | {_default(flag)} | {flag.help} |")
    for name, text in MIXTURE.items():
        escaped = text.replace("|", "\\|")
        lines.append(f"| `--{name}` | `data.mixture` | | {escaped} |")
    lines += [f"| `--{name}` | `eval.suites` | | {swap.help} |" for name, swap in SWAPS.items()]
    lines += [f"| `--{name}` | | | accepted, changes nothing: {why} |" for name, why in WITHOUT_MEANING.items() if why]
    return "\n".join(lines)


def page() -> str:
    """docs/flags.md: the flags of train_ds.py."""
    return f"""# Flags of train_ds.py

The command lines of the releases work as they stand, with dashes or underscores in the names of flags. Each flag sets
a field of the recipe ([configuration.md](configuration.md)). `--config recipe.yaml` gives the values below the flags,
`--set section.field=value` sets any field on top of them. Without `--config`, what a release's command line means
([configs/released/](../configs/released)) lies below: the recipe of `--system`, or of the system that has the given
flags and tasks. This page is printed by `python -m utils.flags`.

{markdown()}
"""


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


def _field_type(dotted: str) -> Any:
    kind: Any = Recipe
    for key in dotted.split("."):
        kind = typing.get_type_hints(kind)[key]
    kind = without_none(kind)
    return str if typing.get_origin(kind) is Literal else kind  # from_dict checks the choices


def _default(flag: Flag) -> str:
    if flag.value is not None:
        return ""
    value: Any = Recipe()
    for key in flag.field.split("."):
        if not dataclasses.is_dataclass(value):
            return "the system's"
        value = getattr(value, key)
    if value is None:
        return "`null`"
    text = flag.separator.join(value) if isinstance(value, tuple) else str(value)
    return f"`{text}`".replace("|", "\\|") if text else ""


if __name__ == "__main__":
    print(page(), end="")
