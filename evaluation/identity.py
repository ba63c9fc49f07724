"""What predictions depend on, so that none is ever taken for that of other weights, data or questions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.readers.digest import annotation_digest
from data.sources import Source
from evaluation.catalog import Suite
from model.heads.embedding_cache import fingerprint
from systems.assistant import Assistant
from systems.base import SegTask

NAMED = 3  # of the broken weights
VIEW = ("use_mm_start_end", "image_size", "load_in_8bit", "load_in_4bit", "head_options", "mask_head")


class NotNumbers(ArithmeticError):
    """Weights or masks hold NaN: every comparison with them is false, so their figures would look like low ones."""


def of_assistant(assistant: Assistant) -> dict[str, Any]:
    """What answers depend on: weights, how pictures are shown to them, system, wording, precision."""
    recipe = assistant.recipe
    seen = {name: getattr(recipe.model, name) for name in VIEW}
    return {
        "weights": fingerprint(assistant.model),
        "system": recipe.system,
        "system_options": json.dumps(dict(recipe.options), sort_keys=True),
        "questions": _wording(assistant.system.task),
        "model": json.dumps(seen | {"tower": vars(recipe.model.tower)}, sort_keys=True, default=str),
        "conv_type": recipe.model.conv_type,
        "tokenization": [recipe.model.tokenization, recipe.model.tokenizer_legacy],
        "model_max_length": recipe.model.model_max_length,
        "precision": str(assistant.model.dtype),
        "kept_embeddings": recipe.model.embedding_cache is not None,  # these are rounded
    }


def of_data(suite: Suite, source: Source, root: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What questions and truth depend on: the suite, its options, and the content of its annotations."""
    return {
        **suite.identity,
        "data": str(root.resolve()),
        "options": options,
        "annotations": annotation_digest(source, root),
    }


def _wording(task: SegTask) -> str:
    """Of all templates and options that its questions are made of, which a task's text form shows; "" where it shows
    an address in memory instead."""
    shown = repr(task)
    return "" if " at 0x" in shown else hashlib.sha256(shown.encode()).hexdigest()[:16]


def check_finite(model: nn.Module) -> None:
    """Raises NotNumbers where weights are NaN or infinite, and names some of them."""
    floats = {name: one.detach() for name, one in model.named_parameters() if one.is_floating_point() and one.numel()}
    suspects = {name: one for name, one in floats.items() if not one.sum(dtype=torch.float32).isfinite()}
    broken = [name for name, one in suspects.items() if not one.isfinite().all()]  # a sum may overflow by itself
    if broken:
        named = ", ".join(broken[:NAMED]) + (", ..." if len(broken) > NAMED else "")
        raise NotNumbers(
            f"{len(broken)} of {len(floats)} weights hold NaN or infinity ({named}); nothing that they answer can be "
            "scored. Take an earlier checkpoint (--checkpoint), or the weights as they were before the loss exploded"
        )
