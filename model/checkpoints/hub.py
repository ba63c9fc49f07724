"""Where weights are: a folder or file here, or a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, list_repo_files, snapshot_download

HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]


def fetch(name: str | Path) -> Path:
    """The folder or file `name`, or its copy from the hub when it reads like `owner/repository`."""
    if not str(name):
        raise ValueError("model.version is empty: give the folder or hub name of a base or of a finished assistant")
    path = Path(name).expanduser()
    if path.exists():
        return path
    if len(path.parts) != 2 or path.suffix in (".pth", ".bin", ".safetensors"):
        raise FileNotFoundError(f"no file or folder {name}")
    try:
        return _download(str(name))
    except Exception as error:  # the hub's client raises many kinds
        raise FileNotFoundError(f"no folder {name} here, and the hub did not give it: {error}") from error


def _download(name: str) -> Path:
    """A repository often holds its weights twice: pickles are fetched only where there are no safetensors. Offline the
    cache's copy is taken as it is, because the list of files cannot be asked for."""
    files = [] if constants.HF_HUB_OFFLINE else list_repo_files(name)
    duplicates = ["*.bin"] if any(file.endswith(".safetensors") for file in files) else None
    return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=duplicates))
