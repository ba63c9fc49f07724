"""What is measured while training: mean loss parts, images per second, time spent waiting, memory; the progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.types import Batch
from utils import dist

SPEED, WAIT, MEMORY = "images_per_second", "data_wait", "gpu_memory_gib"  # logged next to the loss parts
LEFT_OUT, CUT_ROWS, CUT_TOKENS = "left_out", "cut_rows", "cut_tokens"  # as well, where there were any
NOT_LOSSES = (SPEED, WAIT, MEMORY, LEFT_OUT, CUT_ROWS, CUT_TOKENS)


class Meters:
    """Weighted means since the last `read`, over all processes.

    Sums stay on the device until they are read, so that adding does not make the CPU wait for the GPU.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (parts + 1,) double: weighted sums, then the weight
        self.earlier = 0.0  # the part of the weight from before a restart: its images are not of this start's time
        self.waited = 0.0  # seconds
        self.since = time.perf_counter()
        self.counts = dict.fromkeys((LEFT_OUT, CUT_ROWS, CUT_TOKENS), 0)

    def add(self, parts: dict[str, Tensor], weight: int) -> None:
        self.names = list(parts)
        values = torch.stack([value.detach().double() for value in parts.values()])
        row = torch.cat([values, values.new_ones(1)]) * weight
        self.sums = row if self.sums is None else self.sums + row

    def timed(self, stream: Iterator[Batch]) -> Batch:
        """The next batch of the stream. Adds up the time spent waiting and what the batch left out or cut."""
        start = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - start
        for name, number in zip(self.counts, (len(batch.skipped), batch.cut_rows, batch.cut_tokens), strict=True):
            self.counts[name] += number
        return batch

    def state(self) -> dict[str, Any]:
        """What this process has added since the last `read`, for a checkpoint."""
        return {} if self.sums is None else {"names": self.names, "sums": self.sums.tolist(), "counts": self.counts}

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Resumes from the `state` of every process; with another number of processes, the main one gets the total."""
        if len(states) != dist.world_size():
            filled = [state for state in states if state]
            sums = [sum(column) for column in zip(*(state["sums"] for state in filled), strict=True)]
            counts = {name: sum(state.get("counts", {}).get(name, 0) for state in filled) for name in self.counts}
            total = {"names": filled[0]["names"], "sums": sums, "counts": counts} if filled else {}
            states = [total, *[{}] * (dist.world_size() - 1)]
        if state := states[dist.rank()]:
            self.names = state["names"]
            self.earlier = state["sums"][-1]
            self.sums = torch.tensor(state["sums"], dtype=torch.double, device=dist.device())
            self.counts |= state.get("counts", {})

    def read(self) -> dict[str, float]:
        """The means since the last call; starts again from zero. All processes call it.

        Over all processes: means of the loss parts, images per second, the numbers of records or rows left out, of rows
        cut and of ids cut from them. Of this process alone: the share of time spent waiting for data, and the peak
        memory of its GPU, if it has one.
        """
        if self.sums is None:
            return {}
        row = torch.cat([self.sums, self.sums.new_full((1,), self.earlier)])
        *sums, weight, earlier = dist.all_reduce_sum(row).tolist()
        counts = dist.all_reduce_sum(torch.tensor(list(self.counts.values()))).tolist()
        seconds = max(time.perf_counter() - self.since, 1e-9)
        values = {name: value / weight for name, value in zip(self.names, sums, strict=True)}
        values |= {SPEED: (weight - earlier) / seconds, WAIT: self.waited / seconds, **peak_memory(dist.device())}
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
