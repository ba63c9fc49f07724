"""Where weights are: a folder or file here, or a repository on the hub."""

from __future__ import annotations

from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, list_repo_files, snapshot_download

from model.checkpoints.files import WEIGHT_FILES

# Weights, tokenizer and settings. No code is ever fetched.
HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "recipe.yaml", "wording.yaml"]


def fetch(name: str | Path, **where: Any) -> Path:
    """The folder or file `name`, or its copy from the hub when it reads like `owner/repository`.

    where: what `snapshot_download` takes about a repository, e.g. revision, cache_dir, token.
    """
    if not str(name):
        raise ValueError("model.version is empty: give the folder or hub name of a base or of a finished assistant")
    path = Path(name).expanduser()
    if path.exists():
        return path
    if len(path.parts) != 2 or path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise FileNotFoundError(f"no file or folder {name}")
    try:
        return _download(str(name), where)
    except Exception as error:  # the hub's client raises many kinds
        raise FileNotFoundError(f"no folder {name} here, and the hub did not give it: {error}") from error


def fetch_folder(name: str | Path) -> Path:
    """The same of a model, which is a folder: a file raises a NotADirectoryError."""
    folder = fetch(name)
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{name} is a file; a model is a folder with config.json, tokenizer and weights (a training program's file "
            "of weights goes over such a folder: --weight)"
        )
    return folder


def _download(name: str, where: dict[str, Any]) -> Path:
    """A folder of a repository often holds its weights twice: its pickles are fetched only where it has no safetensors.
    Offline the cache's copy is taken as it is, because the list of files cannot be asked for."""
    offline = constants.HF_HUB_OFFLINE or where.get("local_files_only")
    asked = {key: value for key, value in where.items() if key in ("revision", "token")}
    files = [] if offline else [PurePosixPath(file) for file in list_repo_files(name, **asked)]
    # folder by folder: a released assistant in pickles may have its vision tower in a subfolder as safetensors
    safe = {file.parent for file in files if ".safetensors" in file.suffixes and file.name in WEIGHT_FILES}
    twice = [escape(str(file)) for file in files if file.suffix == ".bin" and file.parent in safe]
    return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=twice, **where))
