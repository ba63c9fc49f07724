"""`python -m tools.memory` plans the GPU memory of a recipe."""

from tools.memory.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
