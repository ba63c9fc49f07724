"""Training the rows of the added tokens alone: gradients, merging, checkpoints, a whole run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import merge_lora_weights_and_save_hf_model as program
import train_ds
from model.finetune.trainable import load_trainable, merge_lora, prepare_training, trainable_names, trainable_state
from model.losses import objective
from systems.assistant import build, load
from tests.tiny_model import SEG, tiny_batch, tiny_model
from tests.tiny_run import write_reason_seg, write_recipe
from utils.config import LoraConfig, LossConfig, ModelConfig, load_recipe

ADDED = [5, SEG, 38]  # the first is read, the second read and written, the last neither
FULL = ModelConfig(lora=LoraConfig(r=2, alpha=4, dropout=0.0), gradient_checkpointing=False)
CONFIG = replace(FULL, train_vocabulary="new_tokens")


def prepared(config: ModelConfig = CONFIG):
    model = tiny_model()
    model.added_ids = list(ADDED)
    return prepare_training(model, config)


def backward(model):
    batch = tiny_batch()
    losses = objective(model(batch), batch, LossConfig())
    losses.total.backward()
    return losses.total


def train(model, steps: int = 2):
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return model


def vocabulary(model):
    language = model.vlm.language
    return language.get_input_embeddings(), language.lm_head


def test_rows_have_the_gradients_that_they_have_in_full():
    few, full = prepared(), prepared(FULL)
    torch.testing.assert_close(backward(few), backward(full))
    for one, all_rows in zip(vocabulary(few), vocabulary(full), strict=True):
        assert one.weight.grad is None
        assert all_rows.weight.grad[ADDED].abs().max() > 0
        torch.testing.assert_close(one.new_rows.grad, all_rows.weight.grad[ADDED])
    others = {name for name in trainable_names(full) if "embed_tokens" not in name and "lm_head" not in name}
    assert others | {"vlm.language.model.embed_tokens.new_rows", "vlm.language.lm_head.new_rows"} == set(
        trainable_names(few)
    )
    gradients = [{name: weight.grad for name, weight in model.named_parameters()} for model in (few, full)]
    for name in others:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


def test_only_rows_of_added_tokens_change_and_merge():
    model, before = train(prepared()), tiny_model()
    model.eval()
    drawn = model(tiny_batch())
    merge_lora(model)
    assert set(model.state_dict()) == set(before.state_dict())
    others = torch.ones(40, dtype=torch.bool).index_fill(0, torch.tensor(ADDED), False)
    for now, then in zip(vocabulary(model), vocabulary(before), strict=True):
        assert type(now) is type(then)
        assert torch.equal(now.weight[others], then.weight[others])
        assert not torch.equal(now.weight[SEG], then.weight[SEG])
    after = model(tiny_batch())
    torch.testing.assert_close(after.token_logits, drawn.token_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.masks, drawn.masks, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_rows_goes_on_as_if_never_stopped():
    through, first = train(prepared(), 3), train(prepared(), 1)
    state = {name: tensor.clone() for name, tensor in trainable_state(first).items()}
    assert [len(state[name]) for name in state if name.endswith("new_rows")] == [3, 3]
    again = prepared()
    load_trainable(again, state)
    train(again, 2)
    for name, tensor in trainable_state(through).items():
        assert torch.equal(tensor, trainable_state(again)[name]), name
    with pytest.raises(ValueError, match=r"missing: vlm\.language\.lm_head\.new_rows.*unexpected: vlm\.language\.lm"):
        load_trainable(prepared(), trainable_state(prepared(FULL)))


def test_training_in_full_takes_no_rows_apart():
    with pytest.raises(ValueError, match="without LoRA the language model trains in full"):
        prepared(replace(CONFIG, lora=LoraConfig(r=0)))


def test_a_run_of_rows_is_saved_resumed_and_merged(tmp_path):
    write_reason_seg(tmp_path / "data", train=2, val=1)
    train = {"grad_accumulation_steps": 1, "warmup_steps": 0, "lr": 1e-2, "steps_per_epoch": 2}
    recipe = write_recipe(tmp_path, train=train, model={"train_vocabulary": "new_tokens"})
    for epochs in (1, 2):
        train_ds.main(["--config", str(recipe), "--no_eval", f"--epochs={epochs}"])
    run = tmp_path / "runs" / "tiny"
    saved = load_file(run / "checkpoints" / "step_4" / "trainable.safetensors")
    assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in saved)
    base, trained = build(load_recipe(recipe), "cpu", trainable=False).model, load(run, checkpoint="last").model
    program.main(["--run", str(run), "--save_path", str(tmp_path / "merged")])
    merged, added = load(tmp_path / "merged").model, base.added_ids
    others = [index for index in range(len(base.vlm.language.lm_head.weight)) if index not in added]
    for ours, then, now in zip(vocabulary(trained), vocabulary(base), vocabulary(merged), strict=True):
        assert torch.equal(ours.weight[others], then.weight[others])
        assert not torch.equal(ours.weight[added], then.weight[added])
        assert torch.equal(ours.weight, now.weight)
