"""Our SAM (transformers' parts, upstream's names) against `segment_anything.modeling`, at toy size."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from data.types import Geometry
from model.checkpoints.name_table import NameTable
from model.heads.base import QUERIES_AT_ONCE, to_original
from model.heads.sam import SamHead
from model.heads.sam_weights import SAM_NAMES, rename_sam, sam_sizes
from tests.tiny_model import tiny_batch

SIDE, WIDTH, HEADS = 48, 16, 4


@pytest.fixture(scope="module")
def upstream():
    """`segment_anything.modeling` without the package's `__init__`, which needs torchvision."""
    place = importlib.util.find_spec("segment_anything")
    if place is None:
        pytest.skip("segment-anything is not installed (requirements-dev.txt)")
    package = types.ModuleType("segment_anything")
    package.__path__ = list(place.submodule_search_locations or ())
    imported = sys.modules.get("segment_anything")
    sys.modules["segment_anything"] = package
    yield importlib.import_module("segment_anything.modeling")
    sys.modules.pop("segment_anything")
    if imported is not None:
        sys.modules["segment_anything"] = imported


def build_upstream(modeling, side=SIDE, width=24, depth=3, heads=2, window=4, global_blocks=(1,), out=WIDTH, dim=WIDTH):
    encoder = modeling.ImageEncoderViT(
        img_size=side,
        patch_size=8,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2,
        out_chans=out,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=global_blocks,
    )
    grid = side // 8
    prompts = modeling.PromptEncoder(
        embed_dim=dim, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=8
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=32, num_heads=HEADS)
    decoder = modeling.MaskDecoder(transformer_dim=dim, transformer=transformer, iou_head_hidden_dim=dim)
    return modeling.Sam(encoder, prompts, decoder)


@pytest.fixture(scope="module")
def pair(upstream):
    """The same random weights in both."""
    generator = torch.Generator().manual_seed(0)
    theirs = build_upstream(upstream).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("pixel_")}
    renamed = rename_sam(state)
    ours = SamHead.build(sam_sizes(renamed, HEADS), "sdpa").eval()
    ours.load_state_dict(renamed)
    return theirs, ours


@pytest.fixture
def pictures():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def seg_batch(pixels):
    batch = tiny_batch()
    batch.seg_pixels = pixels
    return batch


def test_picture_encoder(pair, pictures):
    theirs, ours = pair
    with torch.no_grad():
        expected = torch.cat([theirs.image_encoder(picture[None]) for picture in pictures])
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.features(seg_batch(pictures), None)[0], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [64, 2])
def test_one_decoder_call_over_all_pictures_equals_theirs_one_by_one(pair, pictures, monkeypatch, at_once):
    theirs, ours = pair
    monkeypatch.setitem(QUERIES_AT_ONCE, "cpu", at_once)
    queries = torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    query_image = torch.tensor([0, 0, 0, 1, 1])
    geometry = [Geometry((30, 40), (36, 48)), Geometry((50, 20), (48, 19))]
    with torch.no_grad():
        features = ours.features(seg_batch(pictures), None)
        masks = ours.decode(features, queries, query_image, geometry).masks
        for index, place in enumerate(geometry):
            mine = queries[query_image == index]
            dense = theirs.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(len(mine), -1, 6, 6)
            logits, _ = theirs.mask_decoder(
                image_embeddings=features[0][index : index + 1],
                image_pe=theirs.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=mine,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            expected = theirs.postprocess_masks(logits, place.resized, place.original)[:, 0]
            assert masks[index].shape == (len(mine), *place.original)
            torch.testing.assert_close(masks[index], expected, atol=5e-5, rtol=1e-5)


def test_post_processing_stays_float32(pair):
    theirs, _ = pair
    logits = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(3)).bfloat16()
    drawn = to_original(logits, Geometry((31, 17), (48, 26)), SIDE)
    assert drawn.dtype == torch.float32
    expected = theirs.postprocess_masks(logits[:, None].float(), (48, 26), (31, 17))[:, 0]
    torch.testing.assert_close(drawn, expected)


def test_picture_without_query_gets_an_empty_mask_stack(pair, pictures):
    _, ours = pair
    features = ours.features(seg_batch(pictures), None)
    geometry = [Geometry((30, 40), (36, 48)), Geometry((50, 20), (48, 19))]
    masks = ours.decode(features, torch.randn(1, 1, WIDTH), torch.tensor([1]), geometry).masks
    assert [tuple(m.shape) for m in masks] == [(0, 30, 40), (1, 50, 20)]


def test_encoder_never_trains_and_decoder_does(pair, pictures):
    _, ours = pair
    ours.requires_grad_(False)
    ours.decoder.requires_grad_(True)
    features = ours.features(seg_batch(pictures), None)
    assert not features[0].requires_grad
    decoded = ours.decode(features, torch.randn(2, 1, WIDTH), torch.tensor([0, 1]), [Geometry((9, 9), (48, 48))] * 2)
    sum(mask.sum() for mask in decoded.masks).backward()
    assert all(weight.grad is None for weight in ours.encoder.parameters())
    assert ours.decoder.mask_tokens.weight.grad.norm() > 0


def test_names_go_both_ways(pair):
    theirs, _ = pair
    table = NameTable(SAM_NAMES)
    names = [name for name in theirs.state_dict() if not name.startswith("pixel_")]
    assert [table.to_layout(str(table.to_model(name))) for name in names] == names


@pytest.mark.parametrize(
    ("width", "depth", "heads", "blocks"),
    [(768, 12, 12, (2, 5, 8, 11)), (1024, 24, 16, (5, 11, 17, 23)), (1280, 32, 16, (7, 15, 23, 31))],
    ids=["vit_b", "vit_l", "vit_h"],
)
def test_published_sizes_are_read_from_shapes(upstream, width, depth, heads, blocks):
    with torch.device("meta"):
        theirs = upstream.ImageEncoderViT(
            1024, 16, 3, width, depth, heads, 4, 256, True, use_rel_pos=True, window_size=14, global_attn_indexes=blocks
        )
        prompts = upstream.PromptEncoder(
            embed_dim=256, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_chans=16
        )
        transformer = upstream.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        decoder = upstream.MaskDecoder(transformer_dim=256, transformer=transformer)
        parts = {"image_encoder": theirs, "prompt_encoder": prompts, "mask_decoder": decoder}
        state = {f"{p}.{n}": value for p, part in parts.items() for n, value in part.state_dict().items()}
        renamed = rename_sam(state)
        ours = SamHead.build(sizes := sam_sizes(renamed, 8), "sdpa")
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in renamed.items()}
    vision = sizes["vision_config"]
    assert (vision["num_attention_heads"], vision["window_size"], vision["image_size"]) == (heads, 14, 1024)
    assert vision["global_attn_indexes"] == list(blocks)
    assert len(state) == {12: 314, 24: 482, 32: 594}[depth]


def test_hugging_face_folder(pair, tmp_path: Path):
    """The same weights in a Hugging Face SAM folder, whose config tells the decoder's heads."""
    _, ours = pair
    there = {"encoder": "vision_encoder", "prompts": "prompt_encoder", "decoder": "mask_decoder"}
    state = {f"{there[n.split('.')[0]]}.{n.split('.', 1)[1]}": t.clone() for n, t in ours.state_dict().items()}
    tied = state.pop("prompt_encoder.shared_embedding.positional_embedding")
    save_file({**state, "shared_image_embedding.positional_embedding": tied}, tmp_path / "model.safetensors")
    config = {"model_type": "sam", "mask_decoder_config": {"num_attention_heads": HEADS}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors, options = SamHead.read_weights(str(tmp_path), {"decoder_heads": 8})
    assert options["decoder_heads"] == HEADS
    assert tensors.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in ours.state_dict().items())


def test_wrong_weights_are_named(pair):
    _, ours = pair
    with pytest.raises(ValueError, match=r"not SAM weights.*backbone\.conv1"):
        rename_sam({"backbone.conv1": torch.zeros(1)})
    partial_state = {name: value for name, value in ours.state_dict().items() if "mask_tokens" not in name}
    with pytest.raises(ValueError, match=r"incomplete.*decoder\.mask_tokens\.weight"):
        sam_sizes(partial_state, HEADS)
    with pytest.raises(ValueError, match="decoder_heads=3 does not divide"):
        sam_sizes(ours.state_dict(), 3)
