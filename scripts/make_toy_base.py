"""Trains the toy base; the program is `python -m toy.base`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.base.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
