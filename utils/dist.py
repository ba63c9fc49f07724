"""Processes and devices: who am I, how many are we. The device is decided here, and only here."""

from __future__ import annotations

import datetime
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def start(timeout_minutes: float = 60.0) -> torch.device:
    """Joins the processes that the launcher describes and returns this one's device.

    Works under `deepspeed`, `torchrun` and SLURM-like launchers that set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT. Started plainly (`python train_ds.py`), this process is the only one.
    """
    if not dist.is_initialized():
        describe_lone_process()
        where = device()
        if where.type == "cuda":
            torch.cuda.set_device(where)
        elif int(os.environ["WORLD_SIZE"]) > 1 and "OMP_NUM_THREADS" not in os.environ:
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
        backend = "nccl" if where.type == "cuda" else "gloo"
        # a process that is alone meets nobody: no port, which another program may have taken meanwhile
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if os.environ["WORLD_SIZE"] == "1" else {}
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes), **alone)
    return device()


def set_timeout(minutes: float) -> None:
    """How long the processes wait for one another, in every group: those that libraries made have torch's own times."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=minutes), group)


def describe_lone_process() -> None:
    """Fills in the launcher's variables for a process that nobody launched; else DeepSpeed goes looking for MPI."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})


def stop() -> None:
    """Leaves the processes. DeepSpeed, where it was used, lets go of its own groups too, or the next run in this
    process would be handed dead ones."""
    if not dist.is_initialized():
        return
    engine = sys.modules.get("deepspeed.comm.comm")
    used = engine is not None and engine.cdb is not None
    (engine if used else dist).destroy_process_group()


def device() -> torch.device:
    """The GPU of this process where there is one, else the CPU (hide the GPUs with CUDA_VISIBLE_DEVICES="")."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_gather(value: Any) -> list[Any]:
    """Every process's (picklable) value, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The main process's (picklable) value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], Any]) -> Any:
    """What `action` returns in the main process, on every process; what it raises there, all raise.

    Else the others would wait for a process that has stopped, until the time-out.
    """
    result, error = None, None
    if is_main():
        try:
            result = action()
        except Exception as caught:
            error = caught
    plain = isinstance(error, (OSError, ValueError, FloatingPointError, type(None)))
    result, failure = broadcast((result, error if plain else RuntimeError(f"{type(error).__name__}: {error}")))
    if failure is not None:
        raise error or failure
    return result


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        values = values.to(device(), copy=True)
        dist.all_reduce(values)
    return values


def any_process(flag: bool) -> bool:
    """Whether the flag is set on some process; all of them get the same answer."""
    return flag if world_size() == 1 else bool(all_reduce_sum(torch.tensor(float(flag))).item() > 0)
