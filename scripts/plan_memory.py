"""Plans a recipe's GPU memory; the program is `python -m tools.memory`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.memory.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
