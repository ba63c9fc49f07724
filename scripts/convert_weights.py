"""Converts checkpoints between layouts; the program is `python -m tools.convert_weights`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.convert_weights import main

if __name__ == "__main__":
    sys.exit(main())
