"""Plots the curves of training runs; the program is `python -m tools.plot_run`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
