"""Checks a dataset folder against a recipe; the program is `python -m tools.doctor`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.doctor.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
