"""The sizes that a `config.json` gives, bounded by the weights beside it before anything of these sizes is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from model.checkpoints.architecture import Architecture
from utils.limits import VIEW
from utils.registry import unknown

WIDTHS = {"hidden_size", "intermediate_size", "mlp_dim", "output_channels", "num_pos_feats", "mask_input_channels"}
WIDTHS |= {"iou_head_hidden_dim", "width", "tower_width", "language_width", "projector_width", "num_channels"}
WIDTHS |= {"num_attention_heads", "num_key_value_heads", "heads", "head_dim", "patch_size", "window_size"}
WIDTHS |= {"attention_downsample_rate"}
COUNTS = {"num_hidden_layers", "num_multimask_outputs", "num_point_embeddings", "tokens"}  # of modules
OTHERS = {"image_size", "global_attn_indexes", "levels", "layer_norm_eps", "trained_fusion"}
PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")  # of a SAM


def check_sizes(plan: Architecture, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises a ValueError where a width is larger than every side of the weights, or there are more layers than
    weights. What fits within these bounds costs next to nothing to lay out, and is then compared shape by shape."""
    widest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    sections = {"text_config": plan.language, "vision_config": plan.tower}
    if any(name.startswith("head.") for name in tensors):  # else it is a new one, of the recipe's sizes
        sections |= _head_sections(plan.head_config, where)
    for section, values in sections.items():
        for key, value in values.items():
            most = widest if key in WIDTHS else len(tensors) if key in COUNTS else None
            if most is not None and not (_is_whole(value) and 1 <= value <= most):
                raise ValueError(
                    f"{where}: {section}.{key} is {_shortened(value)}; the weights there have sizes of 1 to {most}"
                )
        if "image_size" in values:
            side = values["image_size"]
            if not _is_whole(side) or side < 1:
                raise ValueError(f"{where}: {section}.image_size is {_shortened(side)}, not a whole number above 0")
            VIEW.check(side, f"{where}: {section}.image_size")
    layers = plan.tower["num_hidden_layers"]
    if not -layers - 1 <= plan.feature_layer <= layers:
        raise ValueError(f"{where}: the vision feature layer is {plan.feature_layer}, the tower has {layers} layers")


@contextmanager
def laying_out(where: str) -> Iterator[None]:
    """What a library raises while it makes a model of impossible sizes becomes a ValueError that names the file."""
    try:
        yield
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # the configuration classes of transformers have kinds of their own
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: no model can be made of these sizes ({reason})") from None


def _head_sections(config: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The parts of a head's sizes by name, without a key that is no size."""
    known = {*WIDTHS, *COUNTS, *OTHERS, *PARTS}
    flat = {key: value for key, value in config.items() if key not in PARTS}
    sections = {"head_config": flat} | {f"head_config.{key}": config[key] for key in PARTS if key in config}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {section} must be a mapping of sizes, got {_shortened(values)}")
        if strange := [key for key in values if key not in known]:
            raise ValueError(f"{where}: {unknown(f'size in {section}', str(strange[0]), known)}")
    return sections


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shortened(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:60]} ..."
