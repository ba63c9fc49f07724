"""The sizes that a `config.json` gives, bounded by its folder's weights before anything of these sizes is made.

A file from a stranger may ask for a model of any size, and laying out the modules of a million layers takes all memory
even without values. The weights are there and have the size that they have: no honest width is larger than the largest
side of them all, and no honest model has more modules than weights.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from model.checkpoints.architecture import Architecture
from model.checkpoints.size_keys import SizeKeys
from model.heads import HEADS
from model.vlm import VLMS
from utils.limits import VIEW
from utils.registry import unknown


def check_sizes(architecture: Architecture, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises a ValueError that names `where` if a width is larger than every side of the weights, or a count of modules
    than the number of weights. What fits within these bounds is cheap to lay out, and its shapes are compared one by
    one later."""
    vlm, head = VLMS[architecture.vlm], HEADS[architecture.head]
    widest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    for section, values in vlm.size_sections(architecture.vlm_config).items():
        _check_section(section, values, vlm.SIZE_KEYS, widest, len(tensors), where)
    if any(name.startswith("head.") for name in tensors):  # else it is a new one, of the recipe's sizes
        check_head(architecture.head_config, head.SIZE_KEYS, tensors, where)
    vlm.check_config(architecture.vlm_config, where)


def check_head(config: dict[str, Any], keys: SizeKeys, tensors: Mapping[str, Tensor], where: str) -> None:
    """The same for a mask head's configuration alone."""
    widest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    for section, values in _head_sections(config, keys, where).items():
        _check_section(section, values, keys, widest, len(tensors), where)


def _check_section(section: str, values: dict[str, Any], keys: SizeKeys, widest: int, weights: int, where: str) -> None:
    for key, value in values.items():
        if key in keys.widths:
            most = widest
        elif key in keys.counts:
            most = weights
        else:
            continue
        numbers = value if isinstance(value, list) else [value]
        if not all(_is_whole(number) and 1 <= number <= most for number in numbers) or len(numbers) > weights:
            raise ValueError(
                f"{where}: {section}.{key} is {_shortened(value)}; the weights there have sizes of 1 to {most}"
            )
    if "image_size" in values:
        side = values["image_size"]
        if not _is_whole(side) or side < 1:
            raise ValueError(f"{where}: {section}.image_size is {_shortened(side)}, not a whole number above 0")
        VIEW.check(side, f"{where}: {section}.image_size")


@contextmanager
def naming_size_errors(where: str) -> Generator[None]:
    """Turns what a library raises while it builds a model of impossible sizes into a ValueError that names the file."""
    try:
        yield
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # the configuration classes of transformers raise kinds of their own
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: no model can be made of these sizes ({reason})") from None


def _head_sections(config: dict[str, Any], keys: SizeKeys, where: str) -> dict[str, dict[str, Any]]:
    """The parts of a head's configuration by name. A key that its class does not know is refused: libraries give some
    keys a meaning beyond sizes, e.g. code to fetch."""
    flat = {key: value for key, value in config.items() if key not in keys.parts}
    sections = {"head_config": flat}
    sections |= {f"head_config.{key}": config[key] for key in keys.parts if key in config}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {section} must be a mapping of sizes, got {_shortened(values)}")
        if strange := [key for key in values if key not in keys.all]:
            raise ValueError(f"{where}: {unknown(f'size in {section}', str(strange[0]), keys.all)}")
    return sections


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
