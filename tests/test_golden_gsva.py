"""GSVA's own: the second evaluation pass of its golden record, and its released form, a bare file beside a base."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.collate import look
from data.types import Mask, Query, Refuse
from evaluation.protocols import FORCED, PROTOCOLS, TWO_PASS, decided
from model.weights import read_tensors
from systems.assistant import load
from tests.test_golden import dialogue

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden")) / "gsva"
MODEL = {"precision": "fp32", "decoder_heads": 4, "vision_tower": str(FOLDER / "clip")}
PIECES, RANK, ALPHA = 600, 4, 16  # of the tokenizer without added tokens; of the adapters made here


@pytest.fixture(scope="module")
def assistant():
    return load(FOLDER, model=MODEL, device="cpu")


@pytest.fixture(scope="module")
def record():
    return np.load(FOLDER / "golden.npz")


def asked(assistant) -> tuple[list, list[list[Query]]]:
    """Both pictures of the record with their conversation as a query."""
    samples, queries = [], []
    for index, (text,) in enumerate(json.loads((FOLDER / "golden.json").read_text())["conversations"]):
        ((turn,),) = [dialogue(text, assistant.system.tokens)]
        samples.append(look(FOLDER / f"image{index}.png", assistant.views))
        slots = [part for part in turn.answer if not isinstance(part, str)]
        queries.append([Query(turn.question, turn.answer, tuple(range(len(slots))), tuple("abc"[: len(slots)]))])
    return samples, queries


@pytest.mark.parametrize(("protocol", "passes"), [(FORCED, 0), (TWO_PASS, 1)])
def test_masks_of_both_passes(assistant, record, protocol, passes):
    replies = PROTOCOLS[protocol](assistant, *asked(assistant))
    for index, (reply,) in enumerate(replies):
        expected = record[f"pred{index}_reeval{passes}"]
        assert reply.masks.shape == expected.shape
        np.testing.assert_allclose(reply.masks.numpy(), expected, atol=1e-4)


def test_decisions_of_the_published_rule(assistant, record):
    """`output_ids` are the given ids with every slot as the rule decided it (gsva.md 6.2)."""
    samples, queries = asked(assistant)
    seg, rej = (assistant.tokenizer.get_vocab()[token] for token in ("[SEG]", "[REJ]"))
    for index, ((reply,), (query,)) in enumerate(
        zip(PROTOCOLS[TWO_PASS](assistant, samples, queries), queries, strict=True)
    ):
        output = record[f"output_ids{index}_reeval1"][0]
        expected = [token == seg for token in output if token in (seg, rej)]
        given = [isinstance(part, Mask) for part in query.forced if isinstance(part, (Mask, Refuse))]
        assert [claim.mask is not None for claim in reply.released] == expected
        assert [claim.phrase for claim in reply.claims] == [["red car", "blue dog", "tall tree"], ["person"]][index]
        assert expected != given  # random weights like neither token, so that the rule says the opposite of the truth


def test_a_withheld_mask_is_that_of_its_slot(assistant):
    (reply,) = PROTOCOLS[TWO_PASS](assistant, *asked(assistant))[0]
    claims = decided([claim for claim in reply.claims if claim.mask is not None], [False] * 3)
    assert all(claim.mask is None and claim.withheld is not None for claim in claims)


def write_release(folder: Path, *, factors: bool = True) -> tuple[Path, Path]:
    """A base LLaVA without added tokens, and everything in one bare file under peft's names, LoRA apart."""
    published = {name: tensor.float() for name, tensor in read_tensors(FOLDER).items()}
    base = folder / "base"
    base.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(FOLDER / name, base / name)
    config = json.loads((FOLDER / "config.json").read_text())
    config |= {"architectures": ["LlavaLlamaForCausalLM"], "vocab_size": PIECES}
    (base / "config.json").write_text(json.dumps(config))
    language = {n: t for n, t in published.items() if not n.startswith(("model.visual_model.", "model.text_hidden"))}
    language = {n: torch.rand_like(t[:PIECES] if len(t) == PIECES + 4 else t) for n, t in language.items()}
    torch.save(language, base / "pytorch_model.bin")  # other weights: those of the bare file count
    generator = torch.Generator().manual_seed(0)
    wrapped = {}
    for name, tensor in published.items():
        if factors and name.endswith(("q_proj.weight", "v_proj.weight")) and name.startswith("model.layers."):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            down = torch.randn(RANK, tensor.shape[1], generator=generator)
            up = torch.randn(tensor.shape[0], RANK, generator=generator)
            wrapped[f"{layer}.lora_A.default.weight"], wrapped[f"{layer}.lora_B.default.weight"] = down, up
            tensor = tensor - ALPHA / RANK * (up @ down)
        wrapped[f"base_model.model.{name}"] = tensor
    torch.save(wrapped, folder / "gsva.bin")
    return base, folder / "gsva.bin"


@pytest.mark.parametrize("factors", [True, False])
def test_a_bare_file_beside_a_base(assistant, tmp_path, factors):
    base, file = write_release(tmp_path, factors=factors)
    found = load(base, system="gsva", model={**MODEL, "weight": str(file)}, device="cpu")
    state = assistant.model.state_dict()
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(
            tensor, state[name], atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert found.tokenizer.get_added_vocab() == assistant.tokenizer.get_added_vocab()


def test_a_bare_file_that_lost_a_factor_is_refused(tmp_path):
    base, file = write_release(tmp_path)
    tensors = torch.load(file, weights_only=True)
    lost = next(name for name in tensors if ".lora_B." in name)
    torch.save({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with pytest.raises(ValueError, match=r"gsva\.bin: .*lora_A.*expected .*lora_B\.default beside it"):
        load(base, system="gsva", model={**MODEL, "weight": str(file)}, device="cpu")
