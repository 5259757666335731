"""`python tools/bench …`: how good a LoRA is, how fast it is made and in how much memory. Without a command it lists them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
