"""Run by the WebUI before it starts: adds what is missing, changes nothing that is there.

Usually that is nothing at all: everything the extension uses comes with the WebUI. Only Python 3.10 has no TOML reader
of its own, and there is one in its pip; where that is gone too, `tomli` is installed. If that fails the WebUI starts
all the same, and the Train LoRA tab says what is missing when it needs it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

TOML_READERS = ("tomllib", "tomli", "pip._vendor.tomli")        # in the order in which settings/toml.py tries them


def importable(name: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:                                         # its parent package is missing
        return False


def install(package: str) -> None:
    """Install a package as the WebUI does (its index, its --skip-install), or with pip where there is no WebUI."""
    try:
        from launch import run_pip
    except ImportError:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
    else:
        run_pip(f"install --quiet {package}", f"{package} for Train LoRA")


def main() -> None:
    """Install what is missing; say so in one line if that fails."""
    if any(importable(name) for name in TOML_READERS):
        return
    try:
        install("tomli")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"Train LoRA: tomli could not be installed ({str(error).splitlines()[0]}); install it with pip.")


if __name__ == "__main__":
    main()
