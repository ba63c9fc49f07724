"""Whether a recipe may resume from the checkpoints of a run: what gives weights their meaning must be the same.

Everything in the recipe that decides what the weights are, or what the tokens and words stand for, is compared and a
difference is refused. A field of `model` that a later version adds counts as such unless it is listed in COMPUTED.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systems.base import build_system
from utils.config import Recipe, new_name, to_dict

COMPUTED = (  # fields of `model` that say how it is computed, not what
    *("precision", "attn_implementation", "pack_rows", "pack_length", "gradient_checkpointing"),
    *("decoder_checkpointing", "compile", "liger", "load_in_8bit", "allow_missing", "embedding_cache"),
    *("lora.dropout", "model_max_length"),
)
PLACES = (
    "version",
    "vision_tower",
    "checkpoint_file",
    "vision_pretrained",
    "tower.preprocessor",
)  # files: their content counts
SEED = "train.seed"  # the new tokens' rows and a mask head that starts from no file are made from it
OF_A_START = ("train.auto_resume", "train.resume", "eval.eval_only")  # not settings of a run
BEST_BY = ("eval.suites", "eval.best_by", "eval.protocol", "eval.limit", "eval.custom")  # what best scores compare
SAMPLE, SAMPLES = 1 << 16, 8  # of a weight file, in bytes: reading 14 GB at each start would take a minute
CONTENT = (".safetensors", ".bin", ".pth", ".pt", ".json", ".model")


@dataclass(frozen=True)
class Change:
    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before} in the run, {self.now} asked for"


def differences(before: Recipe, now: Recipe, content: Mapping[str, str | None]) -> tuple[list[Change], list[Change]]:
    """Fields in which the recipes differ: those that change what the weights mean, and the others.

    content: what `contents` said of the run's recipe when it was last started; {} where that is not known.
    """
    content = {new_name(field): digest for field, digest in content.items()}
    meaning, others = [], []
    for change in changes(before, now):
        section, _, name = change.field.partition(".")
        if section == "run" or change.field in OF_A_START:
            continue
        if section == "model" and name in PLACES:
            here, there = _content(change.now), content.get(change.field) or _content(change.before)
            same = here is not None and here == there
        elif section == "options":
            same = _is_an_amount(change, before, now)
        else:
            same = change.field not in ("system", SEED) and (section != "model" or _is_computed(name))
        (others if same else meaning).append(change)
    for field, digest in contents(now).items():
        recorded = content.get(field)
        if recorded and digest and recorded != digest and all(change.field != field for change in meaning):
            meaning.append(Change(f"what {field} holds", recorded, digest))
    return meaning, others


def changes(before: Recipe, now: Recipe) -> list[Change]:
    """Every field that differs, lists of mappings entry by entry; a field that is not there is None."""
    old, new = _leaves(to_dict(before)), _leaves(to_dict(now))
    return [
        Change(field, old.get(field), new.get(field)) for field in {**old, **new} if old.get(field) != new.get(field)
    ]


def contents(recipe: Recipe) -> dict[str, str | None]:
    """Field -> digest of the weights and settings at the place that it names; None where nothing is there."""
    fields = _leaves(to_dict(recipe.model), "model.")
    return {f"model.{name}": _content(fields.get(f"model.{name}")) for name in PLACES}


def _content(place: Any) -> str | None:
    """A digest of a file, or of a folder's weights, sizes and tokenizer: all of small files, samples of large ones."""
    path = Path(str(place)).expanduser()
    if not place or not path.exists():
        return None  # a name on the hub says itself what it is
    files = sorted(file for file in path.iterdir() if file.suffix in CONTENT) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]


def _is_computed(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in COMPUTED)


def _is_an_amount(change: Change, before: Recipe, now: Recipe) -> bool:
    """A number among a system's options that leaves tokens and mask head as they are says how much, not what: how many
    dialogues a picture, which share of them is explained. An option that says the default is no difference either."""
    old, new = build_system(before.system, before.options), build_system(now.system, now.options)
    if any(getattr(old, name) != getattr(new, name) for name in ("name", "tokens", "head", "prompt_template")):
        return False
    values = [value for value in (change.before, change.now) if value is not None]
    return old.task == new.task or all(type(value) in (int, float) for value in values)


def _leaves(value: Any, field: str = "") -> dict[str, Any]:
    """Dotted field -> value; of lists of mappings, by index beside their length."""
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in _leaves(item, f"{field}{name}.").items()}
    name = field.removesuffix(".")
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        found = {f"{name} (entries)": len(value)}
        for index, item in enumerate(value):
            found |= _leaves(item, f"{field}{index}.")
        return found
    return {name: value}
