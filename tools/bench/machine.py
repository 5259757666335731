"""The machine that figures were made on, as a line to be printed with them."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import torch


def machine_text(device: torch.device) -> str:
    """Processor or card, threads, system, versions and the day: nothing that names a person, a computer or a folder."""
    parts = [card_text(device)] if device.type == "cuda" else []
    parts += [f"{processor_text()}, {torch.get_num_threads()} threads", platform.system(),
              f"Python {platform.python_version()}", f"torch {torch.__version__}",
              datetime.datetime.now(datetime.timezone.utc).date().isoformat()]
    return "; ".join(parts)


def card_text(device: torch.device) -> str:
    """The card's name, memory and CUDA version."""
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name} ({facts.total_memory / 2**30:.1f} GB, CUDA {torch.version.cuda})"


def taken(device: torch.device) -> int:
    """Bytes of a card's memory that are taken, by all programs together."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def processor_text() -> str:
    """The processor's name as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
