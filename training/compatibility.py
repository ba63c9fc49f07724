"""Whether a recipe may resume from the checkpoints of a run: what gives weights their meaning must be the same.

Fields that decide what the weights are, or what the tokens and words stand for, must be equal. A difference in any
other field (learning rate, mixture, precision) is only noted. A field of `model` that a later version adds is of the
first kind unless COMPUTED lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.tokens import FAMILIES
from model.checkpoints.fingerprint import PATHS, digest_of, replaced
from systems.base import build_system
from utils.config import Recipe, to_dict
from utils.renamed import new_name

COMPUTED = (  # fields of `model` that change how it is computed, not what
    *("precision", "attn_implementation", "pack_rows", "pack_length", "draft_tokens"),
    *(
        "gradient_checkpointing",
        "decoder_checkpointing",
        "compile",
        "liger",
        "load_in_8bit",
        "allow_missing",
        "embedding_cache",
    ),
    *("lora.dropout", "model_max_length"),
)
# A run's template fits its tokenizer, so the default of any family is in a run what no template at all means there.
DEFAULT_TEMPLATES = tuple(family.template for family in FAMILIES)
SEED = "train.seed"  # initialises the new tokens' rows, and a mask head that starts from no file
OF_A_START = ("train.auto_resume", "train.resume", "eval.eval_only")  # actions of one start, not settings of a run
BEST_BY = ("eval.suites", "eval.best_by", "eval.protocol", "eval.limit", "eval.custom")  # what a best score depends on


@dataclass(frozen=True)
class Change:
    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before} in the run, {self.now} asked for"


def differences(before: Recipe, now: Recipe, content: Mapping[str, str | None]) -> tuple[list[Change], list[Change]]:
    """Fields in which the recipes differ: those that change what the weights mean, and the others.

    content: the result of `contents` at the run's last start; {} where that is not known. For example, a moved base
    folder has another path and the same content: no change of meaning. A base folder whose weights were replaced has
    the same path and another content: a change of meaning, although the recipes are equal.
    """
    content = {new_name(field): digest for field, digest in content.items()}
    meaning: list[Change] = []
    others: list[Change] = []
    for change in changes(before, now):
        section, _, name = change.field.partition(".")
        if section == "run" or change.field in OF_A_START:
            continue
        if section == "model" and name in PATHS:  # compared by content
            digest_now = digest_of(change.now)
            digest_before = content.get(change.field) or digest_of(change.before)
            harmless = digest_now is not None and digest_now == digest_before
        elif change.field == "model.conv_type":
            harmless = None in (change.before, change.now) and {change.before, change.now} <= {None, *DEFAULT_TEMPLATES}
        elif section == "model":
            harmless = _is_computed(name)
        elif section == "options":
            harmless = _is_an_amount(change, before, now)
        else:
            harmless = change.field not in ("system", SEED)
        (others if harmless else meaning).append(change)
    for field, recorded, digest in replaced(now.model, content):
        if all(change.field != field for change in meaning):
            meaning.append(Change(f"what {field} holds", recorded, digest))
    return meaning, others


def changes(before: Recipe, now: Recipe) -> list[Change]:
    """Every field that differs, lists of mappings entry by entry; a field that one of them lacks is None there."""
    old = _leaves(to_dict(before))
    new = _leaves(to_dict(now))
    return [
        Change(field, old.get(field), new.get(field)) for field in {**old, **new} if old.get(field) != new.get(field)
    ]


def _is_computed(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in COMPUTED)


def _is_an_amount(change: Change, before: Recipe, now: Recipe) -> bool:
    """Whether an option of the system changes how much is trained, not what the words and tokens mean.

    A number that leaves tokens and mask head as they are is an amount: dialogues per image, the share of explained
    ones. An option that states the default makes no difference either.
    """
    old = build_system(before.system, before.options)
    new = build_system(now.system, now.options)
    if (old.name, old.tokens, old.head) != (new.name, new.tokens, new.head):
        return False
    if old.released.prompt_template != new.released.prompt_template:
        return False
    values = [value for value in (change.before, change.now) if value is not None]
    return old.task == new.task or all(type(value) in (int, float) for value in values)


def _leaves(value: Any, field: str = "") -> dict[str, Any]:
    """Dotted field -> value; the entries of a list of mappings by index, after its length."""
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in _leaves(item, f"{field}{name}.").items()}
    name = field.removesuffix(".")
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        leaves = {f"{name} (entries)": len(value)}
        for index, item in enumerate(value):
            leaves |= _leaves(item, f"{field}{index}.")
        return leaves
    return {name: value}
