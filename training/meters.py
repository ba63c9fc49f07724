"""What is measured while training: mean loss parts, pictures a second, waiting, memory; and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from data.types import Batch
from utils import dist

SPEED, WAIT, MEMORY = "images_per_second", "data_wait", "gpu_memory_gib"  # beside the loss parts
LEFT_OUT, CUT_ROWS, CUT_TOKENS = "left_out", "cut_rows", "cut_tokens"  # beside them, where there were any
NOT_LOSSES = (SPEED, WAIT, MEMORY, LEFT_OUT, CUT_ROWS, CUT_TOKENS)


class Meters:
    """Weighted means since the last `read`, over all processes. Adding does not wait for the device."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (parts + 1,): weighted sums, then the weight
        self.waited, self.since = 0.0, time.perf_counter()
        self.counts = dict.fromkeys((LEFT_OUT, CUT_ROWS, CUT_TOKENS), 0)

    def add(self, parts: dict[str, Tensor], weight: int) -> None:
        self.names = list(parts)
        values = torch.stack([value.detach().float() for value in parts.values()])
        row = torch.cat([values, values.new_ones(1)]) * weight
        self.sums = row if self.sums is None else self.sums + row

    def timed(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The same stream; the time spent waiting for it counts, and so does what its batches lack."""
        while True:
            start = time.perf_counter()
            try:
                item = next(stream)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            for name, number in zip(self.counts, (len(item.skipped), item.cut_rows, item.cut_tokens), strict=True):
                self.counts[name] += number
            yield item

    def read(self) -> dict[str, float]:
        """Means of the parts, images/s, how many records or rows were left out, how many rows cut and by how many ids,
        and of this process the share of time spent waiting for data and the peak memory of its GPU, if it has one;
        starts anew. All processes call it.
        """
        if self.sums is None:
            return {}
        *sums, weight = dist.total(self.sums.double()).tolist()
        counts = dist.total(torch.tensor(list(self.counts.values()))).tolist()
        seconds = max(time.perf_counter() - self.since, 1e-9)
        values = {name: value / weight for name, value in zip(self.names, sums, strict=True)}
        values |= {SPEED: weight / seconds, WAIT: self.waited / seconds, **peak_memory(dist.device())}
        values |= {name: count for name, count in zip(self.counts, counts, strict=True) if count}
        self._start()
        return values


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB that tensors took up on a GPU since the last call; {} on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {MEMORY: peak / 2**30}


class Progress:
    """A bar on the main process: steps, time left, loss parts, images/s."""

    def __init__(self, steps: int, start: int = 0):
        self.bar = tqdm(
            total=steps, initial=start, desc="train", unit="step", disable=not dist.is_main(), mininterval=1
        )

    def step(self) -> None:
        self.bar.update()

    def show(self, means: dict[str, float]) -> None:
        words = {name: f"{value:.3f}" for name, value in means.items() if name not in NOT_LOSSES}
        self.bar.set_postfix({**words, "img/s": f"{means.get(SPEED, 0):.1f}"}, refresh=False)

    def close(self) -> None:
        self.bar.close()
