"""Processes and devices: rank, world size, collective operations. The device is chosen here and nowhere else."""

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
        describe_single_process()
        processes = int(os.environ["WORLD_SIZE"])
        on_gpu = device().type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device())
        elif processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Each process would use all cores: share those of this machine among its processes.
            local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or processes)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
        backend = "nccl" if on_gpu else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if processes == 1:
            # A store in memory: a single process meets no other, and its port may have been taken since it was chosen.
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=timeout)
    return device()


def set_timeout(minutes: float) -> None:
    """Sets how long the processes wait for one another, in every group: libraries create some with torch's default."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=minutes), group)


def describe_single_process() -> None:
    """Fills in the launcher's variables for a process without a launcher; without them DeepSpeed looks for MPI."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})


def stop() -> None:
    """Destroys the process group. Where DeepSpeed was used, it must do so itself: it remembers its groups, and the next
    run in this process would get destroyed ones."""
    if not dist.is_initialized():
        return
    deepspeed_comm = sys.modules.get("deepspeed.comm.comm")
    if deepspeed_comm is not None and deepspeed_comm.cdb is not None:
        deepspeed_comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def device() -> torch.device:
    """The GPU of this process where there is one, else the CPU (hide the GPUs with CUDA_VISIBLE_DEVICES="")."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def precision(name: str) -> str:
    """What `model.precision` means on this process's device: `auto` is bf16 where that is fast, else fp32."""
    return name if name != "auto" else "bf16" if computes_bf16() else "fp32"


def computes_bf16() -> bool:
    """Whether this process's device has instructions for products in bf16: GPUs since Ampere, CPUs with AVX512-BF16.
    Others emulate them; a CPU is then some 50 times slower than in fp32."""
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


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
    values: list[Any] = [None] * world_size()
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
    """Runs `action` in the main process and returns its (picklable) result on every process.

    If it raises, all processes raise: the others would otherwise wait for the main one until the time-out. They raise
    the same error if it is one that pickles well, else a RuntimeError with its name and message.
    """
    result: Any = None
    error: Exception | None = None  # of the main process, with its traceback
    if is_main():
        try:
            result = action()
        except Exception as raised:
            error = raised
    portable = error
    if error is not None and not isinstance(error, (OSError, ValueError, FloatingPointError)):
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    result, failure = broadcast((result, portable))
    if failure is not None:
        raise error or failure
    return result


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on every process; the argument stays as it is."""
    if world_size() > 1:
        values = values.to(device(), copy=True)
        dist.all_reduce(values)
    return values


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process. All processes call it and get the same answer."""
    return flag if world_size() == 1 else bool(all_reduce_sum(torch.tensor(float(flag))).item() > 0)
