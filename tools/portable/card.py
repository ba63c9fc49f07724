"""The model card of a merged folder, `README.md`: what it is, how to use it, figures with their protocol, licences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import nn

from evaluation.report.markdown import as_markdown
from evaluation.results import EvaluationResults
from model.heads import HEADS
from model.vlm import VLMS
from systems.assistant import Assistant, find_checkpoint
from systems.base import SYSTEMS
from tools.portable.copies import source_of
from tools.tree import first_sentence
from utils.run_log import read_log

CODE_LICENCE = "LICENSE_code.txt"  # the file with the licence of the code; the weights have their own
USE = """\
from PIL import Image
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)  # device_map="cuda" on a GPU
answer = model.predict("street.jpg", "What could I sit on?")
print(answer.text)
for number, segment in enumerate(answer.segments):
    if segment.present:  # segment.mask: (H, W) bool at the image's size
        Image.fromarray(segment.mask).save(f"mask_{{number}}.png")

for segment in model.classes("street.jpg", ["road", "car", "unicorn"]):
    print(segment.phrase, segment.score if segment.present else "is not there")
conversation = model.chat("street.jpg")
print(conversation.ask("What is in the shade?").text)
"""


def model_card(
    assistant: Assistant, name: str, results: Mapping[str, EvaluationResults], licence: str = "other"
) -> str:
    """name: of the folder or repository, as the snippet loads it. results: where they are from -> results. licence: the
    hub's identifier."""
    recipe, model = assistant.recipe, assistant.model
    packages = "torch transformers pillow" + (" sentencepiece protobuf" if assistant.tokenizer.pieces.file else "")
    parts = {
        "system": f"`{recipe.system}`: {_about(SYSTEMS[recipe.system].__module__)}",
        "backbone": f"`{model.architecture.vlm}`: {_about(VLMS[model.architecture.vlm].__module__)}",
        "mask head": f"`{model.architecture.head}`: {_about(HEADS[model.architecture.head].__module__)}",
        "started from": _public(recipe.model.version),
        "weights": f"{_millions(model.vlm)} backbone, {_millions(model.head)} mask head, {_millions(model.project)} "
        f"projection; {str(model.dtype).removeprefix('torch.')}",
        "mask tokens": " ".join(f"`{token}`" for token in assistant.system.tokens.added),
    }
    pages = [
        _front_matter(assistant, licence),
        f"# {name.rpartition('/')[2]}",
        "A segmentation assistant: an image and a question in, text and masks out.",
        f"## Use\n\nThis folder is all it takes, and Python 3.11 or newer with `pip install {packages}`. It was "
        f"written with {_version(torch)} and {_version(transformers)}.",
        f"```python\n{USE.format(name=name)}```",
        "`trust_remote_code` runs the Python files next to the weights, copies of the modules of the project that "
        "trained them; look at them first. `segment(image, phrases)` looks for phrases, and `model.predictor` has "
        "the rest. An image is a path, a PIL image or an (H, W, 3) uint8 RGB array. With OpenCV installed, it reads "
        "files as in training; else Pillow does, whose values of a JPEG may differ by rounding. `dtype` is float32, "
        "bfloat16 or float16 (left open: as trained on a GPU, float32 on a CPU); `device_map` is one device or "
        "`auto`. The backbone's stock class reads the folder without any of its code, as a model without masks.",
        "## What it is\n\n| part | |\n| --- | --- |\n"
        + "\n".join(f"| {key} | {text} |" for key, text in parts.items()),
        "## Data\n\n" + _data(assistant),
        "## Figures\n\n" + _figures(results),
        "## Licences\n\nUsual licences of the families of its parts. The weights that training started from, and the "
        "data, decide.\n\n" + "\n".join(f"- {line}" for line in _licences(assistant)),
    ]
    return "\n\n".join(pages) + "\n"


def read_results(folder: Path) -> EvaluationResults:
    """The results in a folder of test_sem.py. Raises OSError or ValueError where there are none."""
    file = folder / "results.json"
    try:
        return EvaluationResults.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no results of test_sem.py: {error!r}") from None


def results_of_run(run: Path, tag: str) -> dict[str, EvaluationResults]:
    """Those of the last validation of a run, where it was of the checkpoint `tag`."""
    folder, log = run / "validation", run / "log.jsonl"
    if not (folder / "results.json").is_file() or not log.is_file():
        return {}
    steps = [row["step"] for row in read_log(log) if row["kind"] == "val"]
    step = find_checkpoint(run, tag).name
    return {f"Validation in training, {step}": read_results(folder)} if steps and f"step_{steps[-1]}" == step else {}


def _front_matter(assistant: Assistant, licence: str) -> str:
    base = _public(assistant.recipe.model.version)
    lines = ["library_name: transformers", "pipeline_tag: image-segmentation", f"license: {json.dumps(licence)}"]
    lines += [f"base_model: {json.dumps(base)}"] if "/" in base else []
    tags = ("referring-segmentation", "reasoning-segmentation", assistant.recipe.system)
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _about(module: str) -> str:
    """What a module of the project says of itself, in its first sentence."""
    file = source_of(module)
    return first_sentence(file) if file else ""


def _public(place: str) -> str:
    """A hub name as it is; of a path on this machine, the last part."""
    path = Path(place)
    return place if len(path.parts) == 2 and not path.is_absolute() and not path.exists() else path.name


def _version(package: ModuleType) -> str:
    return f"{package.__name__} {package.__version__.partition('+')[0]}"


def _millions(part: nn.Module) -> str:
    return f"{sum(weight.numel() for weight in part.parameters()) / 1e6:,.1f} M"


def _data(assistant: Assistant) -> str:
    lines = [
        f"- {task.task}, rate {task.rate:g}: {', '.join(f'{part.source} ({part.rate:g})' for part in task.sets)}"
        for task in assistant.recipe.data.mixture
    ]
    return (
        "Sampled from this mixture (rates inside a task in brackets):\n\n" + "\n".join(lines) if lines else "Not said."
    )


def _figures(results: Mapping[str, EvaluationResults]) -> str:
    if not results:
        return "None were given when this folder was written. `test_sem.py --version FOLDER` of the project makes them."
    pages = [
        f"{where}:\n\n" + as_markdown(found).removeprefix("# Results\n\n").replace("## ", "### ").strip()
        for where, found in results.items()
    ]
    return "\n\n".join(pages)


def _licences(assistant: Assistant) -> list[str]:
    head = assistant.model.head
    return [*assistant.model.vlm.licences(), head.LICENCE, f"the Python files here: Apache-2.0 ({CODE_LICENCE})"]
