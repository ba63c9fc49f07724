"""A Qwen-VL folder as the base of a system: its padded and tied vocabulary, and the folder that is written of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from data.tokens import load_tokenizer
from model.checkpoints.files import read_tensors
from model.checkpoints.load import build_model, load_folder
from model.checkpoints.save import save_folder
from systems.base import build_system
from tests.tiny_base import GOLDEN, write_sam
from tests.tiny_qwen import FAMILIES, RECIPE, stock_model
from tests.tiny_words import tiny_qwen_tokenizer

SYSTEM = build_system("lasagna")
PADDING = 12  # rows beyond the base's tokenizer
CONFIG = replace(RECIPE, vision_tower=None, head_options={"decoder_heads": 4})


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> tuple[Path, int, torch.Tensor]:
    """The folder, the number of its tokenizer's ids, and the matrix that embedding and output share."""
    folder = tmp_path_factory.mktemp(request.param)
    size = tiny_qwen_tokenizer(folder, version=2 if "2" in request.param else 3)
    stock = stock_model(request.param, vocab_size=size + PADDING, tie_word_embeddings=True)
    stock.config.tie_word_embeddings = True
    stock.tie_weights()
    stock.save_pretrained(folder)
    return folder, size, stock.get_input_embeddings().weight.detach()


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Path:
    return write_sam(
        tmp_path_factory.mktemp("sam") / "sam.pth", {k: v.float() for k, v in read_tensors(GOLDEN).items()}
    )


def test_a_tied_and_padded_base_becomes_a_folder_with_two_matrices(base, sam, tmp_path):
    folder, size, shared = base
    assert not any("lm_head" in name for name in read_tensors(folder)), "the base is tied"
    tokenizer = load_tokenizer(folder, SYSTEM.tokens)
    config = replace(CONFIG, version=str(folder), vision_pretrained=str(sam))
    model = build_model(config, SYSTEM.tokens, tokenizer)
    language = model.vlm.language
    tables = language.get_input_embeddings().weight, language.lm_head.weight
    new = len(SYSTEM.tokens.added)
    for table in tables:
        assert len(table) == size + PADDING == len(shared), "no row too many, none too few"
        kept = [index for index in range(len(table)) if not size <= index < size + new]
        assert torch.equal(table[kept], shared[kept])
        assert not torch.equal(table[size : size + new], shared[size : size + new])
    assert tables[0].data_ptr() != tables[1].data_ptr() and list(model.added_ids) == [*range(size, size + new)]

    save_folder(model, tmp_path / "out", tokenizer)
    values = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert values["tie_word_embeddings"] is False and values["text_config"]["vocab_size"] == size + PADDING
    assert not values["text_config"].get("tie_word_embeddings")
    again = load_tokenizer(tmp_path / "out", SYSTEM.tokens)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == again.get_vocab() == tokenizer.get_vocab()
    loaded = load_folder(tmp_path / "out", SYSTEM.tokens, again, config=CONFIG).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())

    other = build_system("lisa").tokens
    with pytest.raises(ValueError, match=r"checkpoint of another system.*has no \[SEG\]"):
        load_folder(tmp_path / "out", other, load_tokenizer(tmp_path / "out", other), config=CONFIG)


def test_a_training_file_of_a_tied_base_gives_the_output_layer_too(base, sam, tmp_path):
    """safetensors keeps the shared matrix once; the base's, from before the training, is not what it predicts with."""
    folder = shutil.copytree(base[0], tmp_path / "base")
    tokenizer = load_tokenizer(folder, SYSTEM.tokens)
    config = replace(CONFIG, version=str(folder), vision_pretrained=str(sam))
    trained = build_model(config, SYSTEM.tokens, tokenizer).state_dict()
    tokenizer.save_pretrained(folder)
    lm_head, embedding = "vlm.language.lm_head.weight", "vlm.language.model.embed_tokens.weight"
    trained[embedding] = trained[embedding] + 1
    save_file({name: trained[name] for name in trained if name != lm_head}, tmp_path / "trained.safetensors")
    changes = {"vision_pretrained": None, "checkpoint_file": str(tmp_path / "trained.safetensors")}
    model = build_model(replace(config, **changes), SYSTEM.tokens, load_tokenizer(folder, SYSTEM.tokens))
    state = model.state_dict()
    assert torch.equal(state[embedding], trained[embedding]) and torch.equal(state[lm_head], trained[embedding])
