"""Every weight that the sheets list for a real checkpoint has a home of the right shape; nothing is allocated.

The names are written out here after the tables of the sheets, not taken from the code's own tables. SAM's own names are
held against upstream in test_sam.py, PixelLM's in test_pixel.py.
"""

from __future__ import annotations

import pytest
import torch

from model.checkpoints.architecture import Architecture
from model.checkpoints.layouts import Report, reading_table, to_model_names
from model.checkpoints.load import assemble
from model.checkpoints.lora_file import merge_factors
from model.heads import HEADS
from model.vlm import VLMS

SIZES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}  # hidden, inner, layers, heads
VIT_H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120}
# name: size, rows of the vocabulary, projector (width of each linear), pixels of the tower, LoRA's rank in the file
CHECKPOINTS = {
    "lisa_7b": ("7b", 32004, 1, 224, 0),
    "lisa_13b": ("13b", 32003, 1, 224, 0),
    "lasagna_7b": ("7b", 32008, 1, 224, 0),
    "gsva_7b": ("7b", 32005, 1, 224, 8),
    "gsva_13b": ("13b", 32004, 1, 224, 64),
    "sesame_7b": ("7b", 32003, 2, 336, 0),
}


def published(size: str, rows: int, projector: int, rank: int) -> dict[str, tuple[int, ...]]:
    """lisa.md 7.2, gsva.md 7, sesame.md 7: the language side with projector and text MLP."""
    wide, inner, layers, heads = SIZES[size]
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, wide), "lm_head.weight": (rows, wide)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        names |= {f"{layer}.self_attn.{part}_proj.weight": (wide, wide) for part in "qkvo"}
        names |= {f"{layer}.mlp.{part}_proj.weight": (inner, wide) for part in ("gate", "up")}
        names |= {f"{layer}.mlp.down_proj.weight": (wide, inner), f"{layer}.input_layernorm.weight": (wide,)}
        names |= {f"{layer}.post_attention_layernorm.weight": (wide,)}
        names |= {f"{layer}.self_attn.rotary_emb.inv_freq": (wide // heads // 2,)}
        for part in "qv" if rank else "":
            names[f"{layer}.self_attn.{part}_proj.lora_A.default.weight"] = (rank, wide)
            names[f"{layer}.self_attn.{part}_proj.lora_B.default.weight"] = (wide, rank)
    names["model.norm.weight"] = (wide,)
    linears = {"": 1024} if projector == 1 else {"0.": 1024, "2.": wide}
    for place, width in linears.items():
        names |= {f"model.mm_projector.{place}weight": (wide, width), f"model.mm_projector.{place}bias": (wide,)}
    for place, out in ((0, wide), (2, 256)):
        mlp = f"model.text_hidden_fcs.0.{place}"
        names |= {f"{mlp}.weight": (out, wide), f"{mlp}.bias": (out,)}
    return {f"base_model.model.{name}": shape for name, shape in names.items()} if rank else names


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_published_weight_has_a_home(name):
    size, rows, projector, pixels, rank = CHECKPOINTS[name]
    wide, inner, layers, heads = SIZES[size]
    language = {"vocab_size": rows, "hidden_size": wide, "intermediate_size": inner, "num_hidden_layers": layers}
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vlm_config = {
        "language": language | {"num_attention_heads": heads},
        "tower": tower | {"image_size": pixels, "patch_size": 14},
        "projector_depth": projector,
    }
    head_config = {"vision_config": VIT_H | {"global_attn_indexes": [7, 15, 23, 31]}}
    plan = Architecture("llava", vlm_config, "sam", head_config)
    report = Report()
    table = reading_table(VLMS["llava"].WEIGHT_NAMES, HEADS["sam"].WEIGHT_NAMES)
    with torch.device("meta"):
        model = assemble(plan)
        file = {key: torch.empty(shape) for key, shape in published(size, rows, projector, rank).items()}
        found = to_model_names(merge_factors(file, alpha=16), table, report)
    own = {key: value.shape for key, value in model.state_dict().items()}
    own = {key: shape for key, shape in own.items() if not key.startswith(("head.", "vlm.tower."))}
    assert {key: value.shape for key, value in found.items()} == own
    assert not report.unexpected and len(report.ignored) == layers  # the rotary tables
    assert model.vlm.view.most_tokens == (pixels // 14) ** 2


@pytest.mark.parametrize("kind", ["lora_A.weight", "lora_A.other.weight", "lora_magnitude_vector.default.weight"])
def test_adapters_that_cannot_be_merged_say_who_merges_them(kind):
    """peft's own file of adapters, another adapter's name, DoRA."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    file = {f"{layer}.weight": torch.ones(4, 4), f"{layer}.{kind}": torch.ones(4)}
    file |= {f"{layer}.lora_A.default.weight": torch.ones(2, 4), f"{layer}.lora_B.default.weight": torch.ones(4, 2)}
    with pytest.raises(
        ValueError, match=rf"^{layer}\.{kind}: expected plain LoRA, {layer}\.weight with .*merge_and_unload"
    ):
        merge_factors(file, alpha=16)
