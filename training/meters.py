"""What is measured while training: mean loss parts, pictures a second, waiting, memory; and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from utils import dist

Item = TypeVar("Item")
SPEED, WAIT, MEMORY = "images_per_second", "data_wait", "gpu_memory_gib"  # beside the loss parts


class Meters:
    """Weighted means since the last `read`, over all processes. Adding does not wait for the device."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (parts + 1,) double: weighted sums, then the weight
        self.earlier = 0.0  # of the weight, what an earlier start of the run added
        self.waited, self.since = 0.0, time.perf_counter()

    def add(self, parts: dict[str, Tensor], weight: int) -> None:
        self.names = list(parts)
        values = torch.stack([value.detach().double() for value in parts.values()])
        row = torch.cat([values, values.new_ones(1)]) * weight
        self.sums = row if self.sums is None else self.sums + row

    def timed(self, stream: Iterator[Item]) -> Item:
        """The next of the stream; the time spent waiting for it counts."""
        start = time.perf_counter()
        item = next(stream)
        self.waited += time.perf_counter() - start
        return item

    def state(self) -> dict[str, Any]:
        """What this process has added since the last `read`, for a checkpoint."""
        return {} if self.sums is None else {"names": self.names, "sums": self.sums.tolist()}

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Goes on with the `state` of each process; another number of processes leaves the sum to the main one."""
        if len(states) != dist.world_size():
            given = [state for state in states if state]
            sums = [sum(column) for column in zip(*(state["sums"] for state in given), strict=True)]
            whole = {"names": given[0]["names"], "sums": sums} if given else {}
            states = [whole, *[{}] * (dist.world_size() - 1)]
        if mine := states[dist.rank()]:
            self.names, self.earlier = mine["names"], mine["sums"][-1]
            self.sums = torch.tensor(mine["sums"], dtype=torch.double, device=dist.device())

    def read(self) -> dict[str, float]:
        """Means of the parts, images/s, and of this process the share of time spent waiting for data and the peak
        memory of its GPU, if it has one; starts anew. All processes call it.
        """
        if self.sums is None:
            return {}
        *sums, weight, earlier = dist.total(torch.cat([self.sums, self.sums.new_full((1,), self.earlier)])).tolist()
        seconds = max(time.perf_counter() - self.since, 1e-9)
        values = {name: value / weight for name, value in zip(self.names, sums, strict=True)}
        values |= {SPEED: (weight - earlier) / seconds, WAIT: self.waited / seconds, **peak_memory(dist.device())}
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
        words = {name: f"{value:.3f}" for name, value in means.items() if name not in (SPEED, WAIT, MEMORY)}
        self.bar.set_postfix({**words, "img/s": f"{means.get(SPEED, 0):.1f}"}, refresh=False)

    def close(self) -> None:
        self.bar.close()
