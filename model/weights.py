"""Reading and writing weight files: safetensors first, pickles only as plain tensors, everything memory-mapped."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.files import free

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("state_dict", "module", "model")  # keys under which training programs put the tensors
SHARD_SIZE = "5GB"


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a weight file, or of a model folder (sharded or not), on the CPU.

    Errors name the file: missing shards, damaged files, pickles that hold more than tensors.
    """
    path = Path(path)
    files = weight_files(path) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_read_file(file))
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    for index in INDEXES:
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            if gone := [name for name in names if not (folder / name).is_file()]:
                raise FileNotFoundError(f"{folder}: {index} names {', '.join(gone)}, which are not there")
            return [folder / name for name in names]
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    have = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
    raise FileNotFoundError(f"{folder} has no weights: expected {', '.join((*WHOLE, *INDEXES))}; there is {have}")


def write_tensors(tensors: dict[str, Tensor], folder: Path, *, safe: bool = True) -> None:
    """Weights of a model folder, sharded with an index when they are large: safetensors, or the pickles of old."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")]:
        stale.unlink()
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    pattern = "model{suffix}.safetensors" if safe else "pytorch_model{suffix}.bin"
    plan = split_torch_state_dict_into_shards(plain, filename_pattern=pattern, max_shard_size=SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: plain[name] for name in names}
        try:
            save_file(shard, folder / file, {"format": "pt"}) if safe else torch.save(shard, folder / file)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise OSError(f"{folder / file} cannot be written: {reason} ({free(folder)})") from None
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEXES[0 if safe else 1]).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"no weight file {file}")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
    tensors = _unpickle(file)
    while isinstance(tensors, dict) and (inner := next((key for key in WRAPPERS if key in tensors), None)):
        tensors = tensors[inner]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file}: expected a mapping of names to tensors")
    return tensors


def _unpickle(file: Path):
    """`torch.load` of tensors alone. Files older than torch 1.6 cannot be memory-mapped."""
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: refused, this pickle is damaged or would run code when read ({reason})") from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged: {(str(error) or 'it ends too early').splitlines()[0]}") from None
