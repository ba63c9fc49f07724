"""Reading and writing weight files: safetensors first, pickles only as plain tensors, everything memory-mapped."""

from __future__ import annotations

import json
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.files import free_space
from utils.plain import read_mapping
from utils.safe_pickle import DAMAGE

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# A folder may hold several, e.g. the old pickles next to what was saved later: the first counts, as in transformers.
WEIGHT_FILES = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1])
WRAPPERS = ("state_dict", "module", "model")  # keys under which training programs put the tensors
SHARD_SIZE = "5GB"
LFS = b"version https://git-lfs"  # the first bytes of the text that stands for a file that Git did not fetch
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # of peft
PARTS = {  # a file in the folders of other libraries -> how its weights become a model's
    "adapter_config.json": (
        ": adapters of peft without the weights that they change; merge them into these (merge_and_unload) and save "
        "the whole model"
    ),
    "zero_to_fp32.py": ": shards of DeepSpeed; the program zero_to_fp32.py there writes their weights as one file",
}


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
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        have = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no weights: expected {', '.join(WEIGHT_FILES)}; there is {have}{whole_model_hint(folder)}"
        )
    if adapters := next((name for name in ADAPTERS if (folder / name).is_file()), None):
        raise ValueError(
            f"{folder}: {adapters} next to {found} changes those weights, and is not read; merge it into them "
            "(merge_and_unload) or move it away"
        )
    if found not in INDEXES:
        return [folder / found]
    names = _shards(folder / found)
    if gone := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: {found} names {', '.join(gone)}, which are not there")
    return [folder / name for name in names]


def whole_model_hint(folder: Path) -> str:
    """What to do with a folder in which another library keeps a part of a model; nothing for others."""
    return next((hint for name, hint in PARTS.items() if (folder / name).exists()), "")


def _shards(index: Path) -> list[str]:
    """The names of the files that a weight index lists; they lie in its folder."""
    places = read_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: expected weight_map, a mapping of weights to file names")
    names = sorted(set(places.values()))
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: names {', '.join(elsewhere[:5])}; a model's files lie in the folder of their index")
    return names


def write_tensors(tensors: dict[str, Tensor], folder: Path, *, safe: bool = True) -> None:
    """Weights of a model folder, sharded with an index when they are large: safetensors, or pickles as
    in released checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    # a stale index would count before the single file that is written now
    for stale in [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")]:
        stale.unlink()
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    pattern = "model{suffix}.safetensors" if safe else "pytorch_model{suffix}.bin"
    plan = split_torch_state_dict_into_shards(plain, filename_pattern=pattern, max_shard_size=SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: plain[name] for name in names}
        try:
            save_safetensors(shard, folder / file) if safe else torch.save(shard, folder / file)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise OSError(f"{folder / file} cannot be written: {reason} ({free_space(folder)})") from None
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEXES[0 if safe else 1]).write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A file with the permissions of any new one: the library's own is its owner's alone, in a folder for many."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, {"format": "pt"})
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Indented JSON, in a folder that is made where it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"no weight file {file}")
    with file.open("rb") as stream:
        if stream.read(len(LFS)) == LFS:
            raise ValueError(f"{file} is a pointer of Git LFS, not the weights: `git lfs pull` there fetches them")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
    tensors = _unpickle(file)
    for _ in WRAPPERS:  # no more often: a dictionary in a pickle may hold itself
        inner = next((key for key in WRAPPERS if key in tensors), None) if isinstance(tensors, dict) else None
        tensors = tensors if inner is None else tensors[inner]
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: expected a mapping of names to tensors, got {type(tensors).__name__}")
    if others := [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{file}: expected a mapping of names to tensors; no tensors are {', '.join(others[:5])}")
    if strange := [str(name) for name, tensor in tensors.items() if not isinstance(name, str) or not _is_plain(tensor)]:
        raise ValueError(f"{file}: not weights as they are saved, complete and dense: {', '.join(strange[:5])}")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Dense, and with every number in the file: the strides in a pickle may also repeat one number over any size."""
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _unpickle(file: Path):
    """`torch.load` that reads tensors only. Files of torch before 1.6 cannot be memory-mapped."""
    _check_archive(file)
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, *DAMAGE) as error:
        reason = str(error)
        if code := re.search(r"GLOBAL ([\w.]+)", reason):
            raise ValueError(
                f"{file}: refused, the pickle asks for {code[1]} and would run code when read; weight files hold "
                "tensors only. Get the weights as safetensors, or from somebody you can ask"
            ) from None
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            # torch's own message would say how to read the file in spite of it
            raise ValueError(f"{file}: refused, this pickle is damaged or would run code when read") from None
        first_line = (reason or "it ends too early").splitlines()[0]
        raise ValueError(f"{file} is damaged, or no weight file: {first_line}") from None


def _check_archive(file: Path) -> None:
    """Refuses an archive that takes more memory to read than the file is large (a ZIP bomb). Weight files have been ZIP
    archives since torch 1.6, and their records are never compressed."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, *DAMAGE):
        return  # torch.load will say what is wrong with it
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > file.stat().st_size:
        raise ValueError(f"{file}: refused, its records are compressed or overlap, as no weight file's do")
