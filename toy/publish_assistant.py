"""Writes what a toy run trained as the small assistant of assets/toy: fp16 weights on the toy base, and the recipe.

    python -m toy.publish_assistant --run runs/demo/train --out assets/toy/assistant

The folder is that of a run with one checkpoint and without optimizer states, so every program loads it by `--version`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from model.checkpoints.files import read_tensors
from systems.assistant import WEIGHTS, find_checkpoint
from systems.weights_recipe import CHECKPOINTS, RECIPE
from utils.config import Recipe, load_recipe, to_dict
from utils.files import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toy.publish_assistant", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    publish(args.run, args.out)
    return 0


def publish(run: Path, out: Path) -> None:
    """Writes the best checkpoint of `run`. Of its recipe only the system and the model are kept: the rest says where
    its data and its log were."""
    found = find_checkpoint(run)
    place = out / CHECKPOINTS / found.name
    place.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in read_tensors(found / WEIGHTS).items()}
    save_file(tensors, place / WEIGHTS)
    (place / WEIGHTS).chmod(0o644)  # safetensors writes for its user alone
    write_atomically(out / CHECKPOINTS / "last", f"{found.name}\n")
    recipe, default = load_recipe(run), to_dict(Recipe())
    kept = {key: value for key, value in to_dict(recipe)["model"].items() if value != default["model"][key]}
    content = {"system": recipe.system, "options": dict(recipe.options), "model": kept}
    write_atomically(out / RECIPE, yaml.safe_dump(content, sort_keys=False))


if __name__ == "__main__":
    raise SystemExit(main())
