"""Several runs of the training program in one start of the processes, for tests: torchrun tests/several_runs.py FILE.

FILE holds a JSON list of runs: `argv`; optionally `poison` [rank, n], whose n-th loss becomes no number; `terminate`,
the rank that gets SIGTERM as soon as a step is in the `log`. An error that stops a run goes to FILE.<run>.<rank>.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import train_ds
from model.losses import Losses, objective
from training import loop
from utils import dist


def poisoned(rank: int, number: int):
    """The objective, but the loss of one micro-batch of one process is no number."""
    seen = 0

    def spoiled(*words) -> Losses:
        nonlocal seen
        losses = objective(*words)
        bad = (dist.rank(), seen) == (rank, number)
        seen += 1
        return Losses(losses.total * float("nan"), losses.parts) if bad else losses

    return spoiled


def terminate_after(log: Path) -> None:
    """As a scheduler would: a real signal to a real process, at some moment after the first step."""
    while not log.exists() or '"train"' not in log.read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def main(file: Path) -> None:
    for number, run in enumerate(json.loads(file.read_text())):
        loop.objective = poisoned(*run["poison"]) if "poison" in run else objective
        if run.get("terminate") == int(os.environ["RANK"]):
            threading.Thread(target=terminate_after, args=[Path(run["log"])], daemon=True).start()
        try:
            train_ds.main(run["argv"])
        except FloatingPointError as error:
            file.with_name(f"{file.name}.{number}.{dist.rank()}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))  # DeepSpeed's launcher puts --local_rank first
    dist.stop()
