"""Trains and compares the systems on the toy world; the program is `python -m toy.study`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.study.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
