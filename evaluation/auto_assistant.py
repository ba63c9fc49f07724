"""An assistant as transformers' AutoModel gives it from a merged folder, also where this project is not installed.

The folder holds copies of this file and of what it imports (tools/portable/copies.py). No program of the project loads
a folder in this way: they read weights and settings, and run their own code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import nn

from evaluation.predictor import ChatAnswer, Conversation, ImageLike, Predictor, Segment
from model.checkpoints.hub import fetch
from model.checkpoints.load import DTYPES
from utils.images import open_image
from utils.log import log

WORDING = "wording.yaml"  # in the folder: the templates that its system was trained with
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")  # where a hub name is looked up
# What transformers adds to the caller's words, or what asks for nothing that is not done anyway.
WITHOUT_MEANING = ("trust_remote_code", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors")
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


class SegmentationAssistant(nn.Module):
    """Answers questions about images with text and masks. Frozen; `to` moves it, `predictor` has all that it can do.

    An image is a path, a PIL image or an (H, W, 3) uint8 RGB array. Files are read by OpenCV where it is installed,
    else by Pillow, whose values of a JPEG may differ by rounding. The errors are those of `Predictor`.
    """

    def __init__(self, predictor: Predictor, config: Any = None):
        super().__init__()
        self.config = config  # the stock configuration of the backbone
        self.predictor = predictor
        self.network = predictor.assistant.model
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        max_new_tokens: int = 512,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        **others: Any,
    ) -> SegmentationAssistant:
        """Loads a merged folder or its hub name.

        dtype (once torch_dtype): float32, bfloat16 or float16; None or "auto": as trained on a GPU, float32 on a CPU.
        device_map: a device, or "auto" for the GPU where there is one; None: the CPU. All of it is on one device.
        attn_implementation, the choices about the hub, load_in_4bit and load_in_8bit mean what they usually do; any
        other option raises a TypeError.
        """
        attention = others.pop("attn_implementation", None) or getattr(config, "_attn_implementation", None)
        where = {key: others.pop(key) for key in HUB if key in others}
        unknown = [key for key, value in others.items() if key not in WITHOUT_MEANING and key[0] != "_" and value]
        if unknown:
            raise TypeError(
                f"an assistant is not loaded with {', '.join(unknown)}; there are dtype, device_map, "
                f"attn_implementation, load_in_4bit, load_in_8bit, max_new_tokens, {', '.join(HUB)}"
            )
        folder = fetch(name, **where)
        model: dict[str, Any] = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
        if precision := _precision(dtype or torch_dtype):
            model["precision"] = precision
        if attention:
            model["attn_implementation"] = attention
        # a caller who lets the folder's code run trusts its templates, too
        options = {"wording": str(folder / WORDING)} if (folder / WORDING).is_file() else {}
        load_options = {"model": model, "options": options, "device": _device(device_map)}
        return cls(Predictor.from_pretrained(folder, max_new_tokens=max_new_tokens, **load_options), config)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def predict(self, image: ImageLike, question: str) -> ChatAnswer:
        """The answer to a question in free words: its text, and a segment for all that it marks or refuses."""
        return self.predictor.ask(_readable(image), question)

    def segment(self, image: ImageLike, phrases: Sequence[str]) -> list[Segment]:
        """One segment per phrase, in their order."""
        return self.predictor(_readable(image), phrases)

    def classes(self, image: ImageLike, names: Sequence[str]) -> list[Segment]:
        """One segment per class of a list, in their order."""
        return self.predictor.classes(_readable(image), names)

    def chat(self, image: ImageLike) -> Conversation:
        """A conversation about an image: `ask` it, again and again."""
        return self.predictor.chat(_readable(image))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Called by transformers; `config.json` says it already."""

    @classmethod
    def _from_config(cls, *args: Any, **options: Any) -> NoReturn:
        raise NotImplementedError("a configuration has no weights: load the folder with from_pretrained")

    def save_pretrained(self, *args: Any, **options: Any) -> NoReturn:
        """An assistant is its folder, which is copied as it is."""
        raise NotImplementedError("nothing here trains: copy the folder that it was loaded from")


def _readable(image: ImageLike) -> ImageLike:
    """The image; without OpenCV, that of a file as Pillow reads it."""
    if not isinstance(image, (str, Path)) or find_spec("cv2"):
        return image
    log.warning("OpenCV is not installed: Pillow reads %s, with JPEG values that may differ by rounding", image)
    with open_image(Path(image)) as file:
        return Image.Image.copy(file)


def _precision(dtype: torch.dtype | str | None) -> str | None:
    """The recipe's name of a dtype; None where the caller leaves it open."""
    if dtype is None or dtype == "auto":
        return None
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if known not in PRECISIONS:
        raise ValueError(f"dtype: {dtype!r} is not a choice; have: {', '.join(map(str, PRECISIONS))}, auto")
    return PRECISIONS[known]


def _device(device_map: Any) -> torch.device:
    """The one device of a `device_map`."""
    if device_map is None:
        return torch.get_default_device()
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, Mapping) and len(device_map) == 1 and "" in device_map:
        device_map = device_map[""]
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device_map: an assistant is on one device, not on {device_map!r}; give a device such as cuda:0, or auto"
        ) from None
