"""A backbone is one class: registered under a model_type of its own, it is saved and loaded like any other."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from data.tokens import TokenSpec, load_tokenizer
from model.checkpoints.architecture import Architecture
from model.checkpoints.files import read_tensors
from model.checkpoints.load import assemble, load_folder
from model.checkpoints.name_table import under
from model.checkpoints.save import save_folder
from model.runtime import RuntimeOptions
from model.vlm import VLMS
from model.vlm.llava import Llava
from model.vlm.prefix_packing import can_pack
from tests.tiny_base import GOLDEN
from tests.tiny_model import EOS, LLAVA, SAM, SEG, tiny_batch, tiny_model
from utils.config import ModelConfig

SPEC = TokenSpec(added=("[SEG]",), mask=("[SEG]",))
CONFIG = ModelConfig(vision_tower=None, precision="fp32", head_options={"decoder_heads": 4})


class Owl(Llava):
    """LLaVA with other names in its files."""

    NAME = "owl"
    FOLDER_NAMES = under(Llava.FOLDER_NAMES, "owl.", "")
    WEIGHT_NAMES = FOLDER_NAMES


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    VLMS.register("owl")(Owl)
    yield
    del VLMS._factories["owl"]


def test_a_new_backbone_needs_no_change_elsewhere(tmp_path):
    tokenizer = load_tokenizer(GOLDEN, SPEC)
    llava = load_folder(GOLDEN, SPEC, tokenizer, config=CONFIG)
    plan = llava.architecture
    owl = assemble(Architecture("owl", plan.vlm_config, plan.head, plan.head_config), view=llava.vlm.view)
    owl.load_state_dict(llava.state_dict())
    save_folder(owl, tmp_path / "owl", tokenizer)
    assert json.loads((tmp_path / "owl" / "config.json").read_text())["model_type"] == "owl"
    parts = {name.split(".")[0] for name in read_tensors(tmp_path / "owl")}
    assert parts == {"owl", "head", "project"}
    again = load_folder(tmp_path / "owl", SPEC, load_tokenizer(tmp_path / "owl", SPEC), config=CONFIG)
    assert isinstance(again.vlm, Owl) and again.architecture.vlm == "owl"
    expected = llava.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_an_unknown_model_type_names_the_file_and_the_choices(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "owlet"}))
    with pytest.raises(ValueError, match=r"config\.json: no vision-language model 'owlet'.*did you mean 'owl'.*llava"):
        load_folder(tmp_path, SPEC, load_tokenizer(GOLDEN, SPEC), config=CONFIG)


class Linear(Llava):
    """LLaVA as if its layers had no attention that a mask could cut."""

    NAME = "linear"
    packs = False


def test_a_backbone_that_cannot_pack_says_so(monkeypatch, caplog):
    VLMS.register("linear")(Linear)
    try:
        model = assemble(Architecture("linear", LLAVA, "sam", SAM)).eval()
    finally:
        del VLMS._factories["linear"]
    model.load_state_dict(tiny_model().state_dict())
    monkeypatch.setattr(logging.getLogger("assistant"), "propagate", True)
    assert not can_pack(True, "sdpa", model.vlm.packs) and "model.pack_rows" in caplog.text
    model.configure(RuntimeOptions(pack_rows=True))
    refuse = Mock(side_effect=AssertionError)
    monkeypatch.setattr("model.vlm.decoder.pack", refuse)
    monkeypatch.setattr("model.vlm.decoder.split_prefix", refuse)
    batch, prompts = tiny_batch(), tiny_batch(masks=False)
    assert torch.equal(model(batch).token_logits, tiny_model()(batch).token_logits)
    prompts = replace(prompts, ids=prompts.ids[:, :7], attention=prompts.attention[:, :7])
    assert len(model.generate(prompts, max_new_tokens=2, mask_ids=[SEG], eos=EOS)) == 3
