"""Scores the demo before and after training; the program is `python -m toy.demo_report`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.demo_report import main

if __name__ == "__main__":
    sys.exit(main())
