"""LISA (arXiv 2308.00692): one question, one answer, one `[SEG]`, one mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Mask, Query, Record
from systems.base import SYSTEMS, System, about_picture, label_set, load_wording, make_options, read_claims
from systems.single import PHRASE_PROMPT, SLOTS, SingleTarget

TOKENS = TokenSpec(added=("[SEG]",), mask=("[SEG]",))


@dataclass(frozen=True)
class Options:
    num_classes_per_sample: int = 3  # dialogues a picture at most: classes, expressions or sentences
    explanatory: float = 0.1  # share of explained pictures answered in text only; below 0: no explanations
    wording: str = "lisa"  # training templates: a name in systems/wording or a YAML path


@SYSTEMS.register("lisa")
def lisa(**values: Any) -> System:
    options = make_options(Options, values)
    wording = load_wording(options.wording, SLOTS)
    task = LisaTask(SingleTarget(wording, options.num_classes_per_sample, options.explanatory))
    return System("lisa", TOKENS, task, "sam", read, published=("LISAForCausalLM",))


@dataclass(frozen=True)
class LisaTask:
    """Every record in single-target dialogues: a class is asked like a phrase."""

    single: SingleTarget

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        return self.single.converse(record, rng)

    def queries(self, record: Record) -> list[Query]:
        if record.kind == "classes":
            names, present = label_set(record)
            return [_class_query(name, present.get(name)) for name in names]
        return self.single.queries(record)


def read(text: str) -> list[Claim]:
    """The k-th `[SEG]` is the k-th mask; the words around it name nothing."""
    return [Claim("", claim.mask) for claim in read_claims(text, TOKENS)]


def _class_query(name: str, target: int | None) -> Query:
    """No protocol for semantic sets was released: each class of the vocabulary is asked by the phrase prompt.

    The forced answer to an absent class, too, is a mask: its hole points at no target (-1), the truth is empty.
    """
    question = about_picture(PHRASE_PROMPT.format(name))
    if target is None:
        return Query(question, (Mask(-1), "."), (), (name,))
    return Query(question, (Mask(target), "."), (target,), (name,))
