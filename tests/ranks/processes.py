"""Processes that train together, started the plain way: by environment variables, each on this machine's processor."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment() -> dict[str, str]:
    """The environment without what a launcher may have left in it."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{name: value for name, value in os.environ.items() if name not in launchers}, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


class Processes:
    """`commands[rank]` is what each of them runs (without the interpreter). Their output is read line by line."""

    def __init__(self, commands: Sequence[Sequence[object]], *, port: int, world: int, folder: Path) -> None:
        self._errors = [folder / f"stderr-{port}-{rank}.txt" for rank in range(len(commands))]
        self.processes = []
        for rank, command in enumerate(commands):
            environment = {**clean_environment(), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with self._errors[rank].open("w") as errors:
                self.processes.append(subprocess.Popen(
                    [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors,
                    text=True))

    def until(self, word: str, rank: int = 0) -> list[str]:
        """Lines of a process, up to the first that holds `word`; all of them where none does."""
        seen = []
        for line in self.processes[rank].stdout:
            seen.append(line)
            if word in line:
                break
        return seen

    def end(self) -> list[int]:
        """Wait for all of them; their exit codes."""
        return [process.wait(120) for process in self.processes]

    def errors(self, rank: int = 0) -> str:
        """What a process said on stderr."""
        return self._errors[rank].read_text(errors="replace")


@contextlib.contextmanager
def running(commands: Sequence[Sequence[object]], folder: Path, *, port: int | None = None, world: int | None = None
            ) -> Iterator[Processes]:
    """Start them; whoever is left at the end is killed."""
    started = Processes(commands, port=port or free_port(), world=world or len(commands), folder=folder)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()
            process.stdout.close()
