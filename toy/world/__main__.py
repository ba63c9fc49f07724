"""Render the toy world and write it in the on-disk layouts of the real data sets.

    python -m toy.world runs/toy                          # every layout, 2000 training images
    python -m toy.world runs/toy --only ade20k refcoco    # two of them

The same seed gives the same files; training, validation and test images never coincide.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from toy.world.layouts import LAYOUTS, POOLS, World
from toy.world.layouts.world import FILES

MARK = "toy_world.json"  # marks a folder that this program wrote, the only kind that it deletes


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    prepare(args.out, args.force)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    world = World(args.out, args.seed, args.val_images, share_out(args.images, args.only))
    settings = {"seed": args.seed, "images": args.images, "val_images": args.val_images, "layouts": args.only}
    world.file(MARK).write_text(json.dumps(settings, indent=1))
    for name in args.only:
        print(f"{name:16}{LAYOUTS[name].write(world)}", flush=True)
    print(f"toy world of seed {args.seed} in {args.out}, rendered in {time.perf_counter() - started:.0f} s")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    epilog = f"layouts: {', '.join(LAYOUTS)}"
    parser = argparse.ArgumentParser(
        prog="python -m toy.world", description=__doc__, formatter_class=style, epilog=epilog
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to: the --dataset_dir of training")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the toy world (default 0)")
    parser.add_argument(
        "--images", type=int, default=2000, help="training images in total, shared among the layouts (default 2000)"
    )
    parser.add_argument(
        "--val_images",
        type=int,
        default=120,
        help="validation images of every layout, and as many test images where it has a test split (default 120)",
    )
    parser.add_argument(
        "--only", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, metavar="LAYOUT", help="layouts to write"
    )
    parser.add_argument("--force", action="store_true", help="replace a toy data set that is in OUT already")
    args = parser.parse_args(arguments)
    pools = {LAYOUTS[name].pool for name in args.only}
    if args.images < len(pools) or args.val_images < 1 or not 0 <= args.seed < 1 << 24:
        parser.error(f"needs --images >= {len(pools)} for these layouts, --val_images >= 1 and --seed in [0, 2^24)")
    return args


def prepare(out: Path, force: bool) -> None:
    """Make sure that OUT is an empty folder; only a folder that this program wrote is ever deleted."""
    if out.exists() and not out.is_dir():
        sys.exit(f"{out} is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / MARK).is_file():
        sys.exit(f"{out} is not empty and not a toy data set (no {MARK} in it); give another folder")
    if not force:
        sys.exit(f"{out} holds a toy data set already; add --force to replace it, or give another folder")
    if others := strangers(out):
        some = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        sys.exit(f"{out} also holds files that this program did not write ({some}); move them, or give another folder")
    shutil.rmtree(out)


def strangers(out: Path) -> list[str]:
    """Files that are neither the toy data set's nor of the indexes that reading it makes."""
    written = (out / FILES).read_text(encoding="utf-8").splitlines() if (out / FILES).is_file() else ()
    found = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    return sorted({name for name in found if not name.startswith(".index/")} - {FILES, *written})


def share_out(images: int, layouts: list[str]) -> dict[str, int]:
    """Number of training images of each pool, in proportion to its weight; at least one."""
    pools = [pool for pool in POOLS if pool in {LAYOUTS[name].pool for name in layouts}]
    total = sum(POOLS[pool] for pool in pools)
    return {pool: max(1, images * POOLS[pool] // total) for pool in pools}


if __name__ == "__main__":
    sys.exit(main())
