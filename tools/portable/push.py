"""Uploading a merged folder to the hub, after a look at what would leave this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from model.checkpoints.save import WRITTEN
from systems.weights_recipe import RECIPE
from utils.plain import leaves, read_yaml

MIB = 2**20


def check_name(name: str, *, yes: bool) -> None:
    """Raises ValueError where a later `push` could not work, before anything is computed. yes: without asking."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub: {error}") from None
    if name.count("/") != 1:
        raise ValueError(f"--push_to_hub: a repository is OWNER/NAME, not {name!r}")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    if not yes and not sys.stdin.isatty():
        raise ValueError("--push_to_hub asks before it uploads, and there is no terminal: --yes uploads without asking")


def push(folder: Path, name: str, *, public: bool, yes: bool) -> bool:
    """Uploads the files that were written to `folder`, and no other, to the repository `name`.

    public: of a repository that is not there yet; one that is there stays as it is. Prints what would be uploaded, and
    asks unless `yes`. Returns whether it was uploaded. Raises OSError where the hub refuses.
    """
    files = [WRITTEN, *json.loads((folder / WRITTEN).read_text(encoding="utf-8"))]
    print("\n".join(_plan(folder, files, name, public)))
    if not yes and input("Upload? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was uploaded")
        return False
    try:
        api = HfApi()
        api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Upload a segmentation assistant",
        )
    except Exception as error:  # the hub's client raises many kinds
        raise OSError(f"the hub did not take {name}: {error} (log in with `hf auth login`)") from error
    print(f"uploaded to {constants.ENDPOINT}/{name}")
    return True


def _plan(folder: Path, files: list[str], name: str, public: bool) -> Iterator[str]:
    """What would be uploaded, line by line."""
    sizes = {file: (folder / file).stat().st_size for file in files}
    code = [file for file in files if file.endswith(".py")]
    kind = "public" if public else "private"
    yield f"To {constants.ENDPOINT}/{name} ({kind} if it is new), from {folder}:"
    for file in sorted(sizes.keys() - set(code)):
        yield f"  {sizes[file] / MIB:10.2f} MiB  {file}"
    yield f"  {sum(sizes[file] for file in code) / MIB:10.2f} MiB  {len(code)} Python files"
    yield f"  {sum(sizes.values()) / MIB:10.2f} MiB  in all"
    if (folder / RECIPE).is_file() and (named := sorted(_places(read_yaml(folder / RECIPE)))):
        yield f"{RECIPE} names places of this machine: {', '.join(named)}"


def _places(value: Any, where: str = "") -> Iterator[str]:
    """`section.field=path` of the values that are paths of this machine."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _places(inner, where)
    elif leaves(value):
        yield f"{where}={value}"
