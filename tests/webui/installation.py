"""The WebUI that WEBUI_ROOT names, as far as its files tell what it is: its switches, and the models that it takes."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import torch

from tools import tiny_checkpoint
from tools.bench.true_size import true_size_checkpoint

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
        "other".

        Where models are known by their size they take 2.1 GB each; WEBUI_MODELS may name a folder that keeps them.
        """
        if not self.knows_models_by_size:
            tiny_checkpoint.write(folder, name=name, seed=("tiny", "other").index(name))
            return
        kept = Path(os.environ.get("WEBUI_MODELS", folder.parent / "kept"))
        for needed in (folder, kept):
            needed.mkdir(parents=True, exist_ok=True)
        source = true_size_checkpoint("sd1", kept, dtype=torch.float16)
        if name == "other":
            other = kept / "other.safetensors"
            if not other.is_file():
                _write_negated(source, other, "model.diffusion_model.out.2.weight")
            source = other
        (folder / f"{name}.safetensors").symlink_to(source)


def installed() -> Installation:
    """What WEBUI_ROOT and WEBUI_PYTHON name."""
    root = Path(os.environ["WEBUI_ROOT"]).resolve()
    files = [file for part in _DECLARED_IN for file in (root / part).glob("*.py")]
    switches = {switch for file in files
                for switch in re.findall(r'add_argument\(\s*"(--[a-z0-9-]+)"', file.read_text(encoding="utf-8"))}
    return Installation(root, os.environ.get("WEBUI_PYTHON", sys.executable), frozenset(switches))


def _write_negated(source: Path, copy: Path, name: str) -> None:
    """A copy of a file of fp16 tensors in which one has the opposite sign."""
    part = copy.with_suffix(".part")
    shutil.copyfile(source, part)
    with part.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        length, = struct.unpack("<Q", content[:8])
        begin, end = json.loads(content[8:8 + length])[name]["data_offsets"]
        values = torch.frombuffer(bytearray(content[8 + length + begin:8 + length + end]), dtype=torch.float16)
        content[8 + length + begin:8 + length + end] = (-values).numpy().tobytes()
    part.replace(copy)
