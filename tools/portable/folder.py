"""What a merged folder has beyond weights: code that loads it where this project is not installed, and a model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from evaluation.auto_assistant import WORDING, SegmentationAssistant
from evaluation.results import EvaluationResults
from model.checkpoints.files import write_json
from systems.assistant import Assistant
from systems.base import SYSTEMS
from systems.wording import wording_file
from tools.portable.card import CODE_LICENCE, model_card
from tools.portable.copies import ROOT, copies, flat, source_of
from utils.plain import read_mapping

ENTRY = "modeling_segmentation_assistant"  # the file that transformers opens first
CLASS = SegmentationAssistant.__name__


def complete(
    folder: Path,
    assistant: Assistant,
    name: str,
    results: Mapping[str, EvaluationResults] = MappingProxyType({}),
    licence: str = "other",
) -> None:
    """Adds code and card to a folder that `save_folder` writes. name, results, licence: see `model_card`."""
    add_code(folder, assistant)
    (folder / "README.md").write_text(model_card(assistant, name, results, licence), encoding="utf-8")


def add_code(folder: Path, assistant: Assistant) -> None:
    """Adds to a folder of weights what `AutoModel.from_pretrained(folder, trust_remote_code=True)` needs.

    The configuration stays that of the backbone's stock class: without `trust_remote_code` the stock classes load.
    """
    texts = copies({SegmentationAssistant.__module__, *own_modules(assistant)})
    for name, text in {**texts, f"{ENTRY}.py": _entry(texts)}.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", folder / CODE_LICENCE)
    recipe = assistant.recipe
    shutil.copyfile(wording_file(recipe.options.get("wording", recipe.system)), folder / WORDING)
    config = read_mapping(folder / "config.json")
    write_json(folder / "config.json", config | {"auto_map": {"AutoModel": f"{ENTRY}.{CLASS}"}})


def own_modules(assistant: Assistant) -> set[str]:
    """The modules of the project that an assistant's parts are from: backbone, mask head, system."""
    parts = {type(part).__module__ for part in assistant.model.modules()}
    return {name for name in (*parts, SYSTEMS[assistant.recipe.system].__module__) if source_of(name)}


def _entry(texts: dict[str, str]) -> str:
    """The first file. transformers copies the files that it imports, so it names all of them."""
    names = sorted(name.removesuffix(".py") for name in texts)
    first = f"from .{flat(SegmentationAssistant.__module__)} import {CLASS}"
    lines = [
        f'"""What config.json names in auto_map. {len(texts)} files here are copies of modules of the project."""',
        "",
        first,
        *(f"from .{name} import __name__ as _" for name in names),
        "",
        f'__all__ = ["{CLASS}"]',
    ]
    return "\n".join(lines) + "\n"
