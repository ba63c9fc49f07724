"""The stream of batches: workers stay ahead of the training step, and views are cast where they arrive."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
from torch.utils.data import Dataset

from data.collate import Sample
from data.encode import Encoded
from data.mixture import Stream
from data.types import Geometry


class Counted(Dataset):
    """Counts in shared memory how many samples were made, and by whom."""

    def __init__(self):
        self.made, self.makers = multiprocessing.Value("i", 0), multiprocessing.Array("i", 64)

    def __getitem__(self, index: int) -> Sample:
        with self.made.get_lock():
            self.made.value += 1
            self.makers[index] = multiprocessing.current_process().pid
        row = Encoded(ids=[1, index + 3], labels=[-100, index + 3], mask_positions=[], holes=[])
        return Sample(str(index), torch.zeros(3, 2, 2), None, Geometry((2, 2), (2, 2)), 1, [row], torch.zeros(0, 2, 2))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_workers_live_on_and_stay_ahead_of_the_step(prefetch):
    samples = Counted()
    stream = Stream(samples, 2, workers=2, prefetch=prefetch)
    for number in range(1, 5):
        batch = next(stream)
        assert batch.ids[:, 1].tolist() == [2 * number + 1, 2 * number + 2]
        ahead = 2 * (number + 2 * prefetch)  # samples of the batches given and of those kept ready
        until = time.monotonic() + 60
        while samples.made.value < ahead and time.monotonic() < until:
            time.sleep(0.01)
        assert samples.made.value == ahead, "no step waits, and memory is bounded"
    assert len({maker for maker in samples.makers[:] if maker}) == 2


def test_views_are_cast_where_they_arrive():
    samples = Counted()
    batch = next(Stream(samples, 2)).to("meta", torch.bfloat16)
    assert batch.pixels.dtype == torch.bfloat16
    assert batch.pixels.device.type == "meta"
    assert batch.masks[0].dtype == torch.float32
