"""Writes a small LLaVA and SAM with random weights; the program is `python -m toy.base.blank`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.base.blank import main

if __name__ == "__main__":
    sys.exit(main())
