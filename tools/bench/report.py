"""What every command of `bench` prints and writes: tables, the machine, and a Markdown and a JSON file."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lib_lora_train.errors import translated
from lib_lora_train.storage.atomic import write_atomic


def write_report(folder: Path, name: str, text: str, figures: Mapping[str, object]) -> str:
    """Write `text` to FOLDER/NAME.md and `figures` to FOLDER/NAME.json; returns `text`. Raises OutputError."""
    with translated("writing the results"):
        write_atomic(folder / f"{name}.md", text.encode("utf-8"))
        write_atomic(folder / f"{name}.json", (json.dumps(figures, indent=1, default=str) + "\n").encode("utf-8"))
    return text


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal; the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) if column else cell.ljust(width)
                          for column, (cell, width) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join([first, *others])} |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    return "\n".join([row(head), rule, *map(row, lines)])


def share(value: float) -> str:
    """0.125 as "12.5 %"."""
    return f"{100 * value:.1f} %"


def gigabytes(count: float) -> str:
    """Bytes as GB (2^30 bytes, as the memory of GPUs is counted) with two digits."""
    return f"{count / 2**30:.2f}"


def machine_text(device: torch.device) -> str:
    """GPU, CPU, threads, system, versions and the day: nothing that names a person, a computer or a folder."""
    parts = [f"{cpu_text()}, {torch.get_num_threads()} threads", platform.system(), f"Python {platform.python_version()}",
             f"torch {torch.__version__}", datetime.datetime.now(datetime.timezone.utc).date().isoformat()]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        parts.insert(0, f"{gpu.name} ({gpu.total_memory / 2**30:.1f} GB, CUDA {torch.version.cuda})")
    return "; ".join(parts)


def cpu_text() -> str:
    """The CPU's name as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
