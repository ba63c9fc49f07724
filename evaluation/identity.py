"""The settings that predictions depend on, so that none is ever taken for that of other weights, data or questions."""

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
from model.embedding_cache import fingerprint
from systems.assistant import Assistant
from systems.base import SegTask

EXAMPLES = 3  # names of broken weights in a message
MODEL_FIELDS = ("use_mm_start_end", "image_size", "load_in_8bit", "load_in_4bit", "head_options", "mask_head")


class NotNumbers(ArithmeticError):
    """Weights or masks hold NaN. Every comparison with NaN is false, so the figures would only look low."""


def of_assistant(assistant: Assistant) -> dict[str, Any]:
    """What answers depend on: weights, the views of images, system, wording, precision."""
    recipe = assistant.recipe
    fields = {name: getattr(recipe.model, name) for name in MODEL_FIELDS}
    return {
        "weights": fingerprint(assistant.model),
        "system": recipe.system,
        "system_options": json.dumps(dict(recipe.options), sort_keys=True),
        "questions": _wording(assistant.system.task),
        "model": json.dumps(fields | {"tower": vars(recipe.model.tower)}, sort_keys=True, default=str),
        "conv_type": recipe.model.conv_type or assistant.tokenizer.family.template,
        "tokenization": [recipe.model.tokenization, recipe.model.tokenizer_legacy],
        "model_max_length": recipe.model.model_max_length,
        "precision": str(assistant.model.dtype),
        "kept_embeddings": recipe.model.embedding_cache is not None,  # image embeddings from a cache are rounded
    }


def of_data(suite: Suite, source: Source, root: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What questions and truth depend on: the suite, its options, and the content of its annotations.

    root: the dataset folder. options: those of the source that come from the recipe or the command line.
    """
    return {
        **suite.identity,
        "data": str(root.resolve()),
        "options": options,
        "annotations": annotation_digest(source, root),
    }


def _wording(task: SegTask) -> str:
    """A digest of all templates and options that a task's questions are made of.

    Tasks are dataclasses, whose `repr` shows them all; "" for a task whose `repr` shows an address in memory instead,
    which is another in each process.
    """
    text = repr(task)
    return "" if " at 0x" in text else hashlib.sha256(text.encode()).hexdigest()[:16]


def check_finite(model: nn.Module) -> None:
    """Raises NotNumbers where weights are NaN or infinite, and names some of them."""
    floats = {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.numel()
    }
    # A sum is one pass without a mask of the weights' size, so it comes first; but it may overflow by itself.
    suspects = {name: weight for name, weight in floats.items() if not weight.sum(dtype=torch.float32).isfinite()}
    broken = [name for name, weight in suspects.items() if not weight.isfinite().all()]
    if broken:
        named = ", ".join(broken[:EXAMPLES]) + (", ..." if len(broken) > EXAMPLES else "")
        raise NotNumbers(
            f"{len(broken)} of {len(floats)} weights hold NaN or infinity ({named}); nothing that they answer can be "
            "scored. Take an earlier checkpoint (--checkpoint), or the weights as they were before the loss exploded"
        )
