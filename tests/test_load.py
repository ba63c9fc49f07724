"""Every layout that weights come in, and every way in which they can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from data.tokens import TokenSpec, load_tokenizer
from model.checkpoints.architecture import Architecture
from model.checkpoints.config_file import read_config
from model.checkpoints.files import read_tensors, write_tensors
from model.checkpoints.layouts import published_table
from model.checkpoints.load import assemble, build_model, dtype_of, fetch, load_folder, resolve_attention, views_for
from model.checkpoints.save import save_folder, save_original
from model.checkpoints.weight_source import untie
from model.heads import HEADS
from model.vlm.base import Vision
from model.vlm.llava_checkpoint import language_sizes
from systems.assistant import build as create
from systems.assistant import load
from tests.tiny_base import GOLDEN, PIECES, base_tensors, write_base, write_sam
from tests.tiny_model import LANGUAGE, TOWER, llava_of, sam_of
from utils.config import ModelConfig, Recipe, TowerConfig

TOY = Path(__file__).parents[1] / "assets" / "toy"
SPEC = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
OTHER = TokenSpec(added=("<ins>", "<no_ins>"), mask=("<ins>",), refuse="<no_ins>")
CONFIG = ModelConfig(vision_tower=None, precision="fp32", head_options={"decoder_heads": 4})


@pytest.fixture(scope="module")
def published():
    return {name: tensor.float() for name, tensor in read_tensors(GOLDEN).items()}


@pytest.fixture(scope="module")
def golden():
    return load_folder(GOLDEN, SPEC, load_tokenizer(GOLDEN, SPEC), config=CONFIG)


@pytest.fixture
def sam(published, tmp_path) -> Path:
    """`sam_vit_*.pth`: upstream's names, a pickle of tensors."""
    return write_sam(tmp_path / "sam.pth", published)


def build(folder: Path, sam: Path | None = None, spec=SPEC, **changes):
    config = replace(CONFIG, version=str(folder), vision_pretrained=str(sam) if sam else None, **changes)
    return build_model(config, spec, load_tokenizer(folder, spec))


def assert_same(model, golden, *, skip: tuple[str, ...] = ("project.", "vlm.tower.")):
    expected = golden.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        if not name.startswith(skip):
            same = min(len(tensor), PIECES) if "embed_tokens" in name or "lm_head" in name else len(tensor)
            assert torch.equal(tensor[:same], expected[name][:same]), name


def test_original_llava_with_a_linear_projector(published, golden, sam, tmp_path):
    model = build(write_base(tmp_path / "llava", base_tensors(published)), sam)
    assert_same(model, golden)
    assert len(model.vlm.projector) == 1
    tower = read_tensors(GOLDEN / "clip")["vision_model.post_layernorm.bias"]
    assert torch.equal(model.vlm.tower.post_layernorm.bias, tower), "the tower's own folder gives its weights"
    language = model.vlm.language.config
    assert (language.bos_token_id, language.eos_token_id, language.pad_token_id) == (1, 2, 0)
    assert model.report.fresh == ["project.0.weight", "project.0.bias", "project.2.weight", "project.2.bias"]


def test_original_llava_with_an_mlp_projector(published, golden, sam, tmp_path):
    tensors = base_tensors(published)
    linear = {name: tensors.pop(f"model.mm_projector.{name}") for name in ("weight", "bias")}
    tensors |= {f"model.mm_projector.0.{name}": value for name, value in linear.items()}
    tensors |= {
        f"model.mm_projector.2.{name}": torch.ones(48, 48)[: 48 if name == "weight" else 1].squeeze() for name in linear
    }
    model = build(write_base(tmp_path / "llava", tensors), sam)
    assert [type(part).__name__ for part in model.vlm.projector] == ["Linear", "GELU", "Linear"]
    assert torch.equal(model.vlm.projector[2].weight, torch.ones(48, 48))


def test_tower_inside_counts_over_the_one_beside(published, sam, tmp_path):
    model = build(write_base(tmp_path / "llava", base_tensors(published, tower=True)), sam)
    inside = published["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"]
    assert torch.equal(model.vlm.tower.post_layernorm.bias, inside)


def test_tower_by_argument(published, sam, tmp_path):
    folder = write_base(tmp_path / "llava", base_tensors(published), clip=False)
    model = build(folder, sam, vision_tower=str(GOLDEN / "clip"))
    assert model.vlm.view.most_tokens == 256
    config = json.loads((folder / "config.json").read_text())
    config.pop("mm_vision_tower"), config.pop("vision_tower")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names none: set model\.vision_tower"):
        build(folder, sam)


def test_pickled_and_sharded_bases(published, golden, sam, tmp_path, monkeypatch):
    monkeypatch.setattr("model.checkpoints.files.SHARD_SIZE", "60KB")
    for safe, index in ((True, "model.safetensors.index.json"), (False, "pytorch_model.bin.index.json")):
        folder = write_base(tmp_path / f"llava{safe}", base_tensors(published), safe=safe)
        assert (folder / index).is_file()
        assert_same(build(folder, sam), golden)
    shard = next(folder.glob("pytorch_model-00002*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        build(folder, sam)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_newer_file_of_a_folder_counts_as_in_transformers(sharded, tmp_path, monkeypatch):
    """`save_pretrained` leaves earlier pickles, and the index of earlier shards, where they are."""
    monkeypatch.setattr("model.checkpoints.files.SHARD_SIZE", "1KB" if sharded else "1GB")
    old = {f"weight{index}": torch.zeros(200) for index in range(3)}
    for safe in (False, True):
        folder = tmp_path / f"Größe {safe}"
        write_tensors(old, folder, safe=safe)
        assert len(list(folder.glob("*.index.json"))) == sharded
        save_file({name: torch.ones(200) for name in old}, folder / "model.safetensors")
        assert all(tensor.min() == 1 for tensor in read_tensors(folder).values())


def test_files_of_other_programs_say_how_they_become_weights(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13476839316\n")
        with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS.*git lfs pull"):
            read_tensors(tmp_path / name)
    torch.save({"model": {"a": torch.ones(2), "epoch": 3, "_extra_state": None}}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"more\.pth: expected .*; no tensors are epoch, _extra_state"):
        read_tensors(tmp_path / "more.pth")
    for name, says in (
        ("adapter_config.json", "merge_and_unload"),
        ("zero_to_fp32.py", "zero_to_fp32.py there writes"),
    ):
        (folder := tmp_path / name.partition(".")[0]).mkdir()
        (folder / name).write_text("{}")
        for read in (read_tensors, read_config):
            with pytest.raises(FileNotFoundError, match=rf"{name}: .*{says}"):
                read(folder)
    save_file({"a": torch.ones(2)}, (both := tmp_path / "adapter_config") / "model.safetensors")
    save_file({"a": torch.ones(2)}, both / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors next to model\.safetensors changes those"):
        read_tensors(both)


def test_the_hub_is_asked_for_the_pickles_of_folders_without_safetensors(tmp_path, monkeypatch):
    """A released assistant keeps a vision tower that the hub does not have in a subfolder, as safetensors."""
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "vision_tower/model.safetensors"]
    files += ["vision_tower/pytorch_model.bin", "extra/model.safetensors.index.json", "extra/pytorch_model.bin"]
    asked = {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("model.checkpoints.hub.list_repo_files", lambda name: files)
    monkeypatch.setattr(
        "model.checkpoints.hub.snapshot_download", lambda name, **words: asked.update(words) or tmp_path
    )
    assert fetch("someone/assistant") == tmp_path
    fetched = filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(files) - set(fetched) == {"vision_tower/pytorch_model.bin", "extra/pytorch_model.bin"}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A folder that transformers wrote, with the model it came from: 4 patches, MLP projector, 600 rows and <image>."""
    folder = tmp_path_factory.mktemp("hf") / "llava"
    sizes: dict[str, Any] = {**LANGUAGE, "vocab_size": 608, "num_key_value_heads": 1, "rope_theta": 5000.0}
    tower: dict[str, Any] = {**TOWER}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes), vision_config=CLIPVisionConfig(**tower), image_token_index=607
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = LlavaForConditionalGeneration(config).eval()
    theirs.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / name, folder / name)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 16}, "image_mean": [0, 0, 0]})
    )
    return folder, theirs


def new_layout(tensors):
    """The names of transformers 4.52 and later in memory, which some folders hold."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("language_model.lm_head", "lm_head").replace(
            "language_model.model.", "model.language_model."
        )
        renamed[f"model.{name}" if name.startswith(("vision_tower", "multi_modal")) else name] = tensor
    return renamed


@pytest.mark.parametrize("layout", ["as written", "newer"])
def test_hugging_face_llava(hugging_face, sam, tmp_path, layout):
    folder, theirs = hugging_face
    if layout == "newer":
        shutil.copytree(folder, tmp_path / "new")
        folder = tmp_path / "new"
        renamed = new_layout(load_file(folder / "model.safetensors"))
        assert "model.language_model.norm.weight" in renamed
        save_file(renamed, folder / "model.safetensors")
    model = build(folder, sam)
    assert model.vlm.view.size == 16
    assert model.vlm.view.mean == (0, 0, 0)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    ids = torch.tensor([[1, 5, 607, 607, 607, 607, 9, 10], [1, 6, 607, 607, 607, 607, 11, 12]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
        vision = model.vlm.encode_images(pixels)
        ours = ids.masked_fill(ids == 607, -200)
        hidden = model.vlm(ours, torch.ones_like(ids, dtype=torch.bool), vision, torch.arange(2)).final
    rows = len(load_tokenizer(folder, SPEC))
    assert model.vlm.logits(hidden).shape[-1] == rows
    torch.testing.assert_close(model.vlm.logits(hidden)[..., :PIECES], expected[..., :PIECES], atol=1e-5, rtol=1e-4)


def test_a_projector_with_another_activation_is_refused(hugging_face, sam, tmp_path):
    """No weight shows it, and the answers would be others than in transformers."""
    folder = shutil.copytree(hugging_face[0], tmp_path / "llava")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"projector_hidden_act": "quick_gelu"}))
    with pytest.raises(ValueError, match=r"config\.json: no projector_hidden_act 'quick_gelu'.*have: gelu"):
        build(folder, sam)
    build(folder, sam, tower=TowerConfig(new_projector=True))


def test_our_folder_opens_in_transformers(hugging_face, sam, tmp_path):
    folder, theirs = hugging_face
    model, tokenizer = build(folder, sam), load_tokenizer(folder, SPEC)
    save_folder(model, tmp_path / "ours", tokenizer)
    opened = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([[1, 5, 9, 10]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[..., :PIECES]
        torch.testing.assert_close(opened(input_ids=ids).logits[..., :PIECES], expected, atol=1e-5, rtol=1e-4)
    assert opened.config.to_dict()["vision_config"]["image_size"] == 16


@pytest.mark.parametrize("write", [save_folder, save_original])
def test_folders_come_back_equal(golden, tmp_path, write):
    tokenizer = load_tokenizer(GOLDEN, SPEC)
    write(golden, tmp_path / "out", tokenizer)
    again = load_tokenizer(tmp_path / "out", SPEC)
    assert again.get_added_vocab() == tokenizer.get_added_vocab()
    text = "It is [SEG]. Yes</s>USER: <im_start> <im_end>\n a"
    assert again(text).input_ids == tokenizer(text).input_ids
    shutil.move(tmp_path / "out", tmp_path / "moved")
    model = load_folder(tmp_path / "moved", SPEC, again, config=replace(CONFIG, head_options={"decoder_heads": 4}))
    assert_same(model, golden, skip=())
    assert model.vlm.view == golden.vlm.view
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_weights_have_the_permissions_of_any_new_file(tmp_path, mask):
    """safetensors makes files for their owner alone."""
    before = os.umask(mask)
    try:
        for safe in (True, False):
            write_tensors({"a": torch.ones(2)}, tmp_path / str(safe), safe=safe)
    finally:
        os.umask(before)
    modes = {oct(stat.S_IMODE(file.stat().st_mode)) for file in tmp_path.glob("*/*")}
    assert modes == {oct(0o666 & ~mask)}


def test_our_folder_stands_by_itself(golden, tmp_path):
    """No argument repeats what the folder knows, e.g. the decoder's heads."""
    save_folder(golden, tmp_path, load_tokenizer(GOLDEN, SPEC))
    model = load_folder(tmp_path, SPEC, load_tokenizer(tmp_path, SPEC), config=ModelConfig(precision="fp32"))
    assert sam_of(model).decoder.transformer.final_attn_token_to_image.num_attention_heads == 4


def test_published_names_are_written_back(golden, published, tmp_path):
    save_original(golden, tmp_path, load_tokenizer(GOLDEN, SPEC), "SomeForCausalLM")
    written = read_tensors(tmp_path)
    released = {n for n in published if "vision_tower" not in n and "inv_freq" not in n}
    assert written.keys() == released
    assert all(torch.equal(written[name], published[name]) for name in released)
    config, original = (json.loads((place / "config.json").read_text()) for place in (tmp_path, GOLDEN))
    assert config["architectures"] == ["SomeForCausalLM"]
    told = {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "vocab_size",
    }
    told |= {"max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "mm_vision_select_layer"}
    told |= {"mm_hidden_size", "train_mask_decoder", "model_type", "tie_word_embeddings", "mm_use_im_start_end"}
    assert {key: config[key] for key in told} == {key: original[key] for key in told}
    files = ("added_tokens.json", "special_tokens_map.json")
    assert all(json.loads((tmp_path / f).read_text()) == json.loads((GOLDEN / f).read_text()) for f in files)


@pytest.mark.parametrize("trains", [False, True])
def test_a_trained_tower_is_written_next_to_a_released_checkpoint(published, sam, tmp_path, trains):
    """The hub has the tower from before the training: only the name of that one says all."""
    folder = write_base(tmp_path / "llava", base_tensors(published, tower=True))
    values = json.loads((folder / "config.json").read_text())
    name = "openai/clip-vit-large-patch14"
    (folder / "config.json").write_text(json.dumps(values | {"mm_vision_tower": name, "vision_tower": name}))
    model = build(folder, sam, vision_tower=str(GOLDEN / "clip"), tower=TowerConfig(train=trains))
    save_original(model, tmp_path / "out", load_tokenizer(folder, SPEC))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["mm_vision_tower"] == ("vision_tower" if trains else name)
    assert (tmp_path / "out" / "vision_tower" / "model.safetensors").is_file() == trains
    save_folder(model, tmp_path / "ours", load_tokenizer(folder, SPEC))
    again = load_folder(tmp_path / "ours", SPEC, load_tokenizer(folder, SPEC), config=CONFIG)
    assert again.architecture.vlm_config["tower_name"] == (None if trains else name)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_rotations_are_written_back_whole(published, sam, tmp_path, kind):
    scaling = {"factor": 4.0, "original_max_position_embeddings": 128}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    scaling = {"type": kind, **({"factor": 4.0} if kind == "linear" else scaling)}
    folder = write_base(tmp_path / "llava", base_tensors(published))
    values = json.loads((folder / "config.json").read_text()) | {"rope_scaling": scaling, "rope_theta": 5000.0}
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder, SPEC)
    save_original(build(folder, sam), tmp_path / "out", tokenizer)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["rope_scaling"], written["rope_theta"]) == (scaling, 5000.0)
    assert language_sizes(written, tokenizer, "") == language_sizes(values, tokenizer, "")


def test_published_7b_names_and_shapes():
    """The whole of LISA-7B's state dict (lisa.md 7.2), without its memory: 923 names, 32 of them rotary tables."""
    language = {"vocab_size": 32004, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120}
    sam = {"vision_config": vision | {"global_attn_indexes": [7, 15, 23, 31]}}
    vlm_config = {
        "language": language | {"num_attention_heads": 32},
        "tower": tower | {"image_size": 224, "patch_size": 14},
        "projector_depth": 1,
    }
    plan = Architecture("llava", vlm_config, "sam", sam)
    with torch.device("meta"):
        model = assemble(plan)
    table = published_table(model.vlm.published_names(vlm_config), HEADS["sam"].WEIGHT_NAMES)
    shapes = {str(table.to_layout(name)): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: shape for name, shape in shapes.items() if "vision_tower" not in name}
    assert len(shapes) == 923 - 32
    sizes = {
        part: [n for n in shapes if n.startswith(f"model.visual_model.{part}.")]
        for part in ("image_encoder", "prompt_encoder", "mask_decoder")
    }
    assert [len(names) for names in sizes.values()] == [457, 17, 120]
    for name, shape in {
        "model.embed_tokens.weight": (32004, 4096),
        "model.mm_projector.weight": (4096, 1024),
        "model.text_hidden_fcs.0.2.weight": (256, 4096),
        "model.visual_model.image_encoder.blocks.31.attn.rel_pos_h": (127, 80),
        "model.visual_model.image_encoder.blocks.0.attn.qkv.weight": (3840, 1280),
        "model.visual_model.image_encoder.neck.2.weight": (256, 256, 3, 3),
        "model.visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "model.visual_model.prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "model.visual_model.mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight": (128, 256),
        "model.visual_model.mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "model.visual_model.mask_decoder.iou_prediction_head.layers.2.weight": (4, 256),
        "model.visual_model.mask_decoder.output_upscaling.3.weight": (64, 32, 2, 2),
    }.items():
        assert shapes[name] == shape, name
    assert model.vlm.view.most_tokens == 256


def test_toy_base():
    folder = TOY / "llava"
    model = build_model(
        replace(CONFIG, version=str(folder), vision_pretrained=str(TOY / "sam_vit_toy.safetensors")),
        SPEC,
        load_tokenizer(folder, SPEC),
    )
    vlm, views = llava_of(model), views_for(model)
    assert vlm.view.most_tokens == (vlm.view.size // vlm.patch) ** 2
    assert views.language.size == vlm.side
    assert views.seg == sam_of(model).view


def test_new_rows_and_text_mlp_are_drawn_by_seed(published, sam, tmp_path):
    folder = write_base(tmp_path / "llava", base_tensors(published))
    tokenizer = load_tokenizer(folder, SPEC)
    config = replace(CONFIG, version=str(folder), vision_pretrained=str(sam))
    one, same, other = (build_model(config, SPEC, tokenizer, seed=seed).state_dict() for seed in (1, 1, 2))
    rows = one["vlm.language.model.embed_tokens.weight"]
    assert len(rows) == len(tokenizer) == PIECES + 3
    assert 0.01 < rows[PIECES:].std() < 0.03
    for name in ("vlm.language.model.embed_tokens.weight", "vlm.language.lm_head.weight", "project.2.weight"):
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])


def test_new_rows_are_drawn_also_where_a_base_is_padded(published, sam, tmp_path):
    """A llava-hf folder has 64 rows more than tokens: rows of padding that were never trained as inputs."""
    tensors = base_tensors(published)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((8, tensors[name].shape[1]), 7.0)])
    state = build(write_base(tmp_path / "llava", tensors), sam).state_dict()
    for name in ("vlm.language.model.embed_tokens.weight", "vlm.language.lm_head.weight"):
        rows = state[name]
        assert len(rows) == PIECES + 3 and 0.01 < rows[PIECES:].std() < 0.03


def test_tied_embeddings_become_two(published, sam, tmp_path):
    tensors = base_tensors(published)
    tensors.pop("lm_head.weight")
    folder = write_base(tmp_path / "llava", tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight missing"):
        build(folder, sam)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    language = build(folder, sam).vlm.language
    assert torch.equal(language.lm_head.weight[:PIECES], language.model.embed_tokens.weight[:PIECES])
    assert language.lm_head.weight.data_ptr() != language.model.embed_tokens.weight.data_ptr()


def test_one_storage_under_both_names_becomes_two(published, tmp_path):
    """As `torch.save` writes the state of a tied model."""
    tensors = base_tensors(published)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, tmp_path / "tied.bin")
    read = read_tensors(tmp_path / "tied.bin")
    assert read["lm_head.weight"].data_ptr() == read["model.embed_tokens.weight"].data_ptr(), "they share it"
    untie(read, {}, "model.embed_tokens.weight", "lm_head.weight")
    assert read["lm_head.weight"].data_ptr() != read["model.embed_tokens.weight"].data_ptr()
    assert torch.equal(read["lm_head.weight"], read["model.embed_tokens.weight"])


def test_finished_weights_are_never_initialised_again(golden, sam):
    """Training continues from a finished assistant; a SAM file in addition changes nothing."""
    model = build(GOLDEN, sam)
    assert_same(model, golden, skip=())
    assert model.report.fresh == []


def test_missing_and_unexpected_weights_are_listed(published, golden, tmp_path):
    tensors = dict(published)
    gone = [tensors.pop(f"model.text_hidden_fcs.0.2.{name}") for name in ("weight", "bias")]
    tensors["model.box_head.weight"] = gone[0]
    folder = write_base(tmp_path / "odd", tensors)
    shutil.copy(GOLDEN / "added_tokens.json", folder)
    message = r"missing: project\.2\.weight, project\.2\.bias; unexpected: model\.box_head\.weight.*allow_missing"
    with pytest.raises(ValueError, match=message):
        build(folder)
    model = build(folder, allow_missing=True)
    assert_same(model, golden, skip=("project.2.",))
    assert model.report.missing == ["project.2.weight", "project.2.bias"]
    assert model.report.unexpected == ["model.box_head.weight"]


def test_a_weight_under_two_names_is_not_chosen_by_chance(published, golden, sam, tmp_path):
    tensors = base_tensors(published)
    twice = {"language_model.lm_head.weight": tensors["lm_head.weight"].clone()}
    assert_same(build(write_base(tmp_path / "equal", tensors | twice), sam), golden)
    twice["language_model.lm_head.weight"] += 1
    with pytest.raises(ValueError, match=r"other: the weights do not fit.*unexpected: .*lm_head\.weight"):
        build(write_base(tmp_path / "other", tensors | twice), sam)


def test_names_that_no_layout_has_are_shown_with_their_file(published, sam, tmp_path):
    """As a model in DistributedDataParallel saves itself."""
    tensors = {f"module.{name}": tensor for name, tensor in base_tensors(published).items()}
    with pytest.raises(ValueError, match=r"wrapped has no language model: .* missing; strange names there: module\."):
        build(write_base(tmp_path / "wrapped", tensors), sam)
    torch.save({f"module.{name}": tensor for name, tensor in read_tensors(sam).items()}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"^model\.vision_pretrained=.*odd\.pth: not SAM weights: .* module\."):
        build(write_base(tmp_path / "llava", base_tensors(published)), tmp_path / "odd.pth")


def test_checkpoint_of_another_system():
    with pytest.raises(ValueError, match=r"another system.*603 rows has no <ins>, <no_ins>"):
        load_folder(GOLDEN, OTHER, load_tokenizer(GOLDEN, OTHER), config=CONFIG)


def test_wrong_vocabulary_size(published, tmp_path):
    folder = write_base(tmp_path / "odd", dict(published))
    (folder / "added_tokens.json").write_text(json.dumps({"[SEG]": 600, "<im_start>": 601}))
    spec = replace(SPEC, wrap_image=False)
    with pytest.raises(ValueError, match="wrong vocabulary size, 603 embedding rows for a tokenizer of 602 tokens"):
        build(folder, spec=spec)


def test_base_without_a_mask_head_needs_one(published, tmp_path):
    folder = write_base(tmp_path / "llava", base_tensors(published))
    with pytest.raises(ValueError, match="vision_pretrained"):
        build(folder)
    with pytest.raises(ValueError, match="base model"):
        load_folder(folder, SPEC, load_tokenizer(folder, SPEC), config=CONFIG)


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


@pytest.mark.parametrize("place", ["model", "sam"])
def test_picklebombs_are_refused(published, sam, tmp_path, capsys, place):
    folder = write_base(tmp_path / "llava", base_tensors(published), safe=False)
    bad = folder / "pytorch_model.bin" if place == "model" else sam
    bad.write_bytes(pickle.dumps({"model.norm.weight": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=rf"{bad.name}: refused.*would run code"):
        build(folder, sam)
    torch.save({"model.norm.weight": Bomb()}, bad)
    with pytest.raises(ValueError, match=rf"{bad.name}: refused.*would run code"):
        build(folder, sam)
    assert "boom" not in capsys.readouterr().out


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12345678901234567890")
    (tmp_path / "b.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"b\.pth is damaged"):
        read_tensors(tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"c\.pth: expected a mapping"):
        read_tensors(tmp_path / "c.pth")
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model\.safetensors.*a\.safetensors"):
        read_tensors(tmp_path)
    torch.save({"state_dict": {"x": torch.ones(2)}}, tmp_path / "d.pth")
    assert read_tensors(tmp_path / "d.pth")["x"].sum() == 2
    itself: dict = {"x": torch.ones(2)}
    itself["model"] = itself
    torch.save(itself, tmp_path / "e.pth")
    with pytest.raises(ValueError, match=r"e\.pth: expected a mapping of names to tensors; no tensors are model"):
        read_tensors(tmp_path / "e.pth")


def test_wrong_sizes_and_choices_are_named(published, sam, tmp_path):
    folder = write_base(tmp_path / "llava", base_tensors(published))
    for changes, message in (
        ({"out_dim": 256}, "out_dim is 256, the mask decoder takes 32"),
        ({"image_size": 512}, "image_size is 512, the mask encoder takes 1024"),
        ({"head_options": {"decoder_heads": 5}}, "decoder_heads=5 does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            build(folder, sam, **changes)
    values = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("intermediate_size", 97, r"shapes differ.*gate_proj\.weight \(96, 48\) for \(97, 48\)"),
        ("mm_vision_select_feature", "cls_patch", "no vision feature selection 'cls_patch'"),
        ("model_type", "mistral", "no vision-language model 'mistral'.*llava"),
    ):
        (folder / "config.json").write_text(json.dumps(values | {key: value}))
        with pytest.raises(ValueError, match=message):
            build(folder, sam)


def test_places_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no folder nobody/nothing here, and the hub did not give it"):
        fetch("nobody/nothing")
    with pytest.raises(ValueError, match=r"model\.version is empty"):
        fetch("")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        fetch(tmp_path / "nothing" / "here")
    with pytest.raises(FileNotFoundError, match=r"^no file or folder weights/sam2\.1_hiera_tiny\.pt$"):
        fetch("weights/sam2.1_hiera_tiny.pt")
    for name in ("model.safetensors", "whole.bin"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(NotADirectoryError, match=rf"{name} is a file; a model is a folder.*--weight"):
            load(tmp_path / name)
        with pytest.raises(NotADirectoryError, match=rf"{name} is a file"):
            create(Recipe(system="lisa", model=replace(CONFIG, version=str(tmp_path / name))))
        (tmp_path / name).unlink()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no config\.json, only notes\.txt"):
        build_model(replace(CONFIG, version=str(tmp_path)), SPEC, load_tokenizer(GOLDEN, SPEC))


def test_precision_and_attention_are_choices(golden):
    half = load_folder(GOLDEN, SPEC, load_tokenizer(GOLDEN, SPEC), config=replace(CONFIG, precision="bf16"))
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert dtype_of("fp16") == torch.float16
    assert resolve_attention("auto", torch.float32) == "sdpa"
    with pytest.raises(ImportError, match="flash-attn"):
        resolve_attention("flash_attention_2", torch.bfloat16)
    eager = load_folder(GOLDEN, SPEC, load_tokenizer(GOLDEN, SPEC), config=replace(CONFIG, attn_implementation="eager"))
    assert eager.vlm.language.config._attn_implementation == "eager"
    ids, states = torch.tensor([[1, 5, 6, 7]]), Vision(torch.zeros(256, 48), [256])
    attention, row_image = torch.ones_like(ids, dtype=torch.bool), torch.tensor([0])
    with torch.no_grad():
        torch.testing.assert_close(
            eager.vlm(ids, attention, states, row_image).final,
            golden.vlm(ids, attention, states, row_image).final,
            atol=1e-4,
            rtol=1e-4,
        )


def test_quantised_loading_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"bitsandbytes.*requirements-gpu\.txt"):
        load_folder(GOLDEN, SPEC, load_tokenizer(GOLDEN, SPEC), config=replace(CONFIG, load_in_8bit=True))


def test_quantised_loading_shrinks_only_the_language_layers(golden):
    pytest.importorskip("bitsandbytes")
    model = load_folder(GOLDEN, SPEC, load_tokenizer(GOLDEN, SPEC), config=replace(CONFIG, load_in_8bit=True)).to("cpu")
    small = {name for name, weight in model.named_parameters() if weight.dtype == torch.int8}
    assert small
    assert all(name.startswith("vlm.language.model.layers.") for name in small)
    ids = torch.arange(5, 25)[None]
    inputs = (ids, torch.ones_like(ids, dtype=torch.bool), Vision(torch.zeros(256, 48), [256]), torch.tensor([0]))
    with torch.no_grad():
        likeness = torch.nn.functional.cosine_similarity(model.vlm(*inputs).final, golden.vlm(*inputs).final, dim=-1)
    assert likeness.min() > 0.95


def test_faults_of_a_weight_file_name_that_file(published, golden, sam, tmp_path):
    """`--weight` over a sound base: the base is not what is wrong."""
    folder, file = write_base(tmp_path / "llava", base_tensors(published)), tmp_path / "whole.bin"
    tensors = dict(published)
    shutil.copy(GOLDEN / "added_tokens.json", folder)
    tensors.pop("model.text_hidden_fcs.0.2.bias")
    torch.save(tensors, file)
    with pytest.raises(ValueError, match=rf"^{file} \(model\.checkpoint_file, over {folder}\): the weights do not fit"):
        build(folder, checkpoint_file=str(file))
    torch.save({**published, "lm_head.weight": published["lm_head.weight"][:-1]}, file)
    with pytest.raises(ValueError, match=rf"^{file} \(model\.checkpoint_file"):
        build(folder, checkpoint_file=str(file))
    with pytest.raises(ValueError, match=rf"^{file} \(model\.checkpoint_file.*another system"):
        torch.save(published, file)
        build(folder, checkpoint_file=str(file), spec=OTHER)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("lenient", [False, True])
def test_quantised_weights_are_refused(published, tmp_path, kind, lenient):
    """They would be read as numbers: int8 rows, packed nibbles, and fp8 without its scales."""
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = write_base(tmp_path / "small", {**published, name: published[name].mul(50).to(kind)})
    shutil.copy(GOLDEN / "added_tokens.json", folder)
    with pytest.raises(
        ValueError, match=rf"^{folder}: 1 weights are quantised \(vlm.*q_proj\.weight is .*load_in_4bit"
    ):
        build(folder, allow_missing=lenient)


def test_a_tower_of_another_machine_says_how_to_name_one(published, sam, tmp_path):
    folder = write_base(tmp_path / "llava", base_tensors(published), clip=False)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"mm_vision_tower": "/home/someone/clip"}))
    message = r"config\.json names the vision tower '/home/someone/clip', which lies outside the folder.*--vision_tower"
    with pytest.raises(ValueError, match=message):
        build(folder, sam, vision_tower=None)
    with pytest.raises(FileNotFoundError, match=r"model\.vision_tower names .*/elsewhere/clip.*--vision_tower"):
        build(folder, sam, vision_tower="/elsewhere/clip")
