"""`python tools/bench …`: how good a LoRA is, how fast it is made and in how much memory. `--help` lists the commands."""

from __future__ import annotations

import sys
from pathlib import Path

# In place of this folder, whose modules would hide others of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.bench.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
