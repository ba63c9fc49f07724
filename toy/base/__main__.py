"""Train the small pretrained base of the toy world from nothing: a LLaVA folder and a SAM file.

    python scripts/make_toy_base.py                       # about 50 minutes on two CPU cores
    python scripts/make_toy_base.py --resume              # go on after an interruption
    python scripts/make_toy_base.py --minutes 2 --out runs/look --scratch runs/look   # a quick look

SAM trains on one core; on the other the vision tower learns to recognise, then the whole LLaVA learns to talk about
scenes, and takes both cores once SAM is done. Each stage is a process of its own, checkpoints every few minutes and
publishes what it has, so that an interrupted run leaves a usable base. No scene is seen twice, and none belongs to the
train or val split of the toy datasets.
"""

import argparse
import subprocess
import sys
from pathlib import Path

SHARES = {"tower": 0.168, "llava": 0.832, "sam": 0.7}  # of --minutes; tower and llava run one after the other
SAM_DONE = "sam.done"
RATES = {"tower": 1e-3, "llava": 1e-3, "sam": 1e-3}


def main() -> None:
    args = parse_args()
    if args.only:
        run_stage(args)
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    (args.scratch / SAM_DONE).unlink(missing_ok=True)
    beside = start_stage("sam", args)
    for stage in ("tower", "llava"):
        wait_for(start_stage(stage, args), stage)
    wait_for(beside, "sam")
    wait_for(start_stage("report", args), "report")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/toy"), help="folder of the base (%(default)s)")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/toy_base"), help="checkpoints and logs (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=50, help="training time on two cores (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and words (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --scratch")
    parser.add_argument("--only", choices=("tower", "sam", "llava", "report"), help="run one stage and stop")
    return parser.parse_args()


def start_stage(stage: str, args: argparse.Namespace) -> subprocess.Popen:
    """A process that runs one stage of this script."""
    command = [sys.executable, "-m", "toy.base", "--only", stage, "--out", args.out, "--scratch", args.scratch]
    command += ["--minutes", str(args.minutes), "--seed", str(args.seed), *(["--resume"] if args.resume else [])]
    return subprocess.Popen([str(part) for part in command])


def wait_for(process: subprocess.Popen, stage: str) -> None:
    if code := process.wait():
        raise SystemExit(
            f"stage {stage} of make_toy_base.py ended with code {code}; --resume goes on from its checkpoint"
        )


def run_stage(args: argparse.Namespace) -> None:
    """Run the stage `args.only` in this process, on one thread."""
    import torch

    from toy.base.trainer import StagePlan

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    stage = args.only
    seconds, rate = 60 * args.minutes * SHARES.get(stage, 0), RATES.get(stage, 0)
    beside = args.scratch / SAM_DONE if stage == "llava" else None
    plan = StagePlan(stage, seconds, rate, args.scratch, args.resume, beside)
    if stage == "tower":
        from toy.base.tower import train_tower

        train_tower(plan, args.seed)
    elif stage == "sam":
        from toy.base.publish import save_sam
        from toy.base.sam import train_sam

        train_sam(plan, args.seed, publish=lambda trained: save_sam(trained.sam, args.out))
        (args.scratch / SAM_DONE).touch()
    elif stage == "llava":
        from toy.base.llava import train_llava
        from toy.base.publish import save_llava
        from toy.base.tower import load_tower
        from toy.base.vocabulary import train_vocabulary

        folder = args.out / "llava"
        if not (args.resume and (folder / "tokenizer.model").exists()):
            train_vocabulary(folder, args.seed)
        tower = load_tower(args.scratch / "tower.pt")
        train_llava(plan, args.seed, folder, tower, publish=lambda trained: save_llava(trained.llava, args.out))
    else:
        from toy.base.report import write_report

        print(f"wrote {write_report(args.scratch, args.out)}")


if __name__ == "__main__":
    main()
