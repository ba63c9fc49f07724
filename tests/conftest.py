"""One thread for every test and every program a test starts: sums then come out bit for bit the same."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
