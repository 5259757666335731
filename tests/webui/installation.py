"""The WebUI that WEBUI_ROOT names, as far as its files tell what it is: its switches, and the models that it takes."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

import torch

from tools import tiny_checkpoint

_DECLARED_IN = ("modules", "modules_forge", "backend", "ldm_patched/modules")
# Each as far as the WebUI declares it.
_SWITCHES = (
    "--skip-prepare-environment", "--skip-python-version-check", "--skip-version-check", "--skip-torch-cuda-test",
    "--skip-install", "--no-download-sd-model", "--api", "--disable-console-progressbars")
_ON_THE_CPU = (("--always-cpu",), ("--cpu",), ("--use-cpu", "all", "--no-half"))


@dataclasses.dataclass(frozen=True)
class Installation:
    """A WebUI's folder, the Python that it runs in, and the switches that its files declare."""

    root: Path
    python: str
    switches: frozenset[str]

    @property
    def knows_models_by_size(self) -> bool:
        """Whether it loads models of the published sizes only, as the Forges do, whatever a .yaml beside them says."""
        return any((self.root / part).is_dir() for part in ("backend", "ldm_patched"))

    def flags(self, data: Path) -> list[str]:
        """To run on the CPU with `data` as its folder, installing and downloading nothing."""
        on_the_cpu = next(flags for flags in _ON_THE_CPU if flags[0] in self.switches)
        # Forge serves its own scripts from its data folder only.
        allowed = ["--gradio-allowed-path", str(self.root)] if self.knows_models_by_size else []
        return [*(flag for flag in _SWITCHES if flag in self.switches), *on_the_cpu, "--data-dir", str(data), *allowed]

    def write_checkpoint(self, folder: Path, name: str) -> None:
        """NAME.safetensors in `folder`, one of two that this WebUI loads: Stable Diffusion 1 with random weights, "tiny" or
        "other"."""
        size = tiny_checkpoint.RECOGNISED if self.knows_models_by_size else tiny_checkpoint.RANDOM
        tiny_checkpoint.write(folder, name=name, seed=("tiny", "other").index(name), size=size,
                              dtype=torch.float16 if self.knows_models_by_size else torch.float32)


def installed() -> Installation:
    """What WEBUI_ROOT and WEBUI_PYTHON name."""
    root = Path(os.environ["WEBUI_ROOT"]).resolve()
    files = [file for part in _DECLARED_IN for file in (root / part).glob("*.py")]
    switches = {switch for file in files
                for switch in re.findall(r'add_argument\(\s*"(--[a-z0-9-]+)"', file.read_text(encoding="utf-8"))}
    return Installation(root, os.environ.get("WEBUI_PYTHON", sys.executable), frozenset(switches))
