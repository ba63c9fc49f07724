"""Losses that are not finite, on one process (tests/test_deepspeed.py has two)."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from data.types import Batch
from model.losses import Losses
from training.checkpoint import TrainState
from training.loss_guard import IN_A_ROW, LossGuard


def losses(value: float) -> Losses:
    total = torch.tensor(value)
    return Losses(total, {"loss": total, "ce": torch.tensor(1.5)})


BATCH = cast(Batch, SimpleNamespace(names=["a.jpg", "b.jpg"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_run_stops_and_names_the_pictures(value):
    guard = LossGuard("stop")
    assert guard.accepts(losses(1.0), BATCH, TrainState())
    with pytest.raises(FloatingPointError, match=r"step 8: the loss is (nan|-?inf) .*ce 1\.5.*a\.jpg.*b\.jpg.*skip"):
        guard.accepts(losses(value), BATCH, TrainState(step=7))


def test_or_goes_on_and_counts(caplog):
    guard, state = LossGuard("skip"), TrainState(step=7)
    assert [guard.accepts(losses(value), BATCH, state) for value in (float("nan"), 1.0, float("inf"))] == [0, 1, 0]
    assert state.skipped == 2
    assert "left out: step 8: the loss is nan" in caplog.text and "a.jpg" in caplog.text


def test_updates_that_were_dropped_stop_the_run_or_are_counted(caplog):
    guard, state = LossGuard("stop"), TrainState(step=7)
    guard.note_update(True, state, expected=False)
    guard.note_update(False, state, expected=True)
    assert state.lost_updates == 1, "fp16 finds its loss scale that way"
    with pytest.raises(FloatingPointError, match=r"step 8: the loss is finite and its gradient is not.*skip continues"):
        guard.note_update(False, state, expected=False)
    guard = LossGuard("skip")
    for done in (*[False] * (IN_A_ROW - 1), True, *[False] * (IN_A_ROW - 1)):
        guard.note_update(done, state, expected=False)
    assert state.lost_updates == 2 * IN_A_ROW and "nothing was updated" in caplog.text
    with pytest.raises(FloatingPointError, match=r"the 10th in a row"):
        guard.note_update(False, state, expected=False)


def test_but_not_for_ever():
    guard, state = LossGuard("skip"), TrainState()
    for _ in range(2):  # a good one between starts the count again
        for _ in range(IN_A_ROW - 1):
            assert not guard.accepts(losses(float("nan")), BATCH, state)
        assert guard.accepts(losses(1.0), BATCH, state)
    for _ in range(IN_A_ROW - 1):
        guard.accepts(losses(float("nan")), BATCH, state)
    with pytest.raises(FloatingPointError, match=r"the 10th in a row: the weights have probably diverged"):
        guard.accepts(losses(float("nan")), BATCH, state)
