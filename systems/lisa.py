"""LISA (arXiv 2308.00692): one question, one answer, one `[SEG]`, one mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.tokens import TokenSpec
from data.types import Claim, Dialogue, Query, Record
from systems.base import SYSTEMS, Released, System, make_options
from systems.reading import read_claims
from systems.single import FIELDS, SingleTarget, class_queries
from systems.wording import load_wording

TOKENS = TokenSpec(added=("[SEG]",), mask=("[SEG]",))


@dataclass(frozen=True)
class Options:
    num_classes_per_sample: int = 3  # dialogues per image at most: classes, expressions or sentences
    explanatory: float = 0.1  # share of explained images answered in text only; below 0: no explanations
    wording: str = "lisa"  # training templates: a name in systems/wording or a YAML path


@SYSTEMS.register("lisa")
def lisa(**values: Any) -> System:
    options = make_options(Options, values)
    wording = load_wording(options.wording, FIELDS)
    task = LisaTask(SingleTarget(wording, options.num_classes_per_sample, options.explanatory))
    return System("lisa", TOKENS, task, "sam", read, Released(architectures=("LISAForCausalLM",)))


@dataclass(frozen=True)
class LisaTask:
    """Every record becomes single-target dialogues: a class is asked for like a phrase."""

    single: SingleTarget

    def converse(self, record: Record, rng: np.random.Generator) -> list[Dialogue]:
        return self.single.converse(record, rng)

    def queries(self, record: Record) -> list[Query]:
        if record.kind == "classes":
            return class_queries(record)
        return self.single.queries(record)


def read(answer: str) -> list[Claim]:
    """The k-th `[SEG]` is the k-th mask; the words around it name nothing."""
    return [Claim("", claim.mask) for claim in read_claims(answer, TOKENS)]
