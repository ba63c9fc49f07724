"""4- and 8-bit language models, for inference and under LoRA, through the optional bitsandbytes package."""

from __future__ import annotations

from torch import nn

from model.seg_model import SegModel


def quantize(model: SegModel, bits: int) -> None:
    """Replaces the linears of the language model's layers; they shrink when the model moves to its device.

    Everything else keeps its precision: `lm_head`, projector, text MLP, vision tower and mask head lose quality for
    little memory (as released, all but the mask head were quantised). 4 bit is NF4 with double quantisation.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ImportError(
            "load_in_4bit and load_in_8bit need the bitsandbytes package: pip install -r requirements-gpu.txt"
        ) from None
    language = model.vlm.decoder
    for name, linear in list(language.named_modules()):
        if isinstance(linear, nn.Linear):
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            if bits == 4:
                small = bnb.nn.Linear4bit(*sizes, compute_dtype=model.dtype, quant_type="nf4")
            else:
                small = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            small.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(language.get_submodule(parent), child, small.requires_grad_(False))
