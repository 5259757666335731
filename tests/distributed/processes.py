"""Processes that train together, started the plain way: by environment variables, each on this machine's CPU."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody is given while the block runs, and that who asks for it by its number may listen on.

    A port that is only looked up and let go may be another program's by the time a new process has imported torch.
    """
    with socket.socket() as held:
        if sys.platform != "win32":
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # torch's store says so too: both may have it
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform == "win32":  # there the store wants it for itself
            held.close()
        yield port


def clean_environment() -> dict[str, str]:
    """The environment without what a launcher may have left in it."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{name: value for name, value in os.environ.items() if name not in launchers}, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def close(process: subprocess.Popen[str]) -> None:
    """End it if it still runs. A launcher, unlike one that is killed, takes along what it started."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


class Processes:
    """`commands[rank]` is what each of them runs (without the interpreter). Their output is read line by line."""

    def __init__(self, commands: Sequence[Sequence[object]], *, port: int, folder: Path) -> None:
        self._errors = [folder / f"stderr-{port}-{rank}.txt" for rank in range(len(commands))]
        self.processes = []
        for rank, command in enumerate(commands):
            environment = {**clean_environment(), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands)),
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
def running(commands: Sequence[Sequence[object]], folder: Path, *, port: int | None = None) -> Iterator[Processes]:
    """Start them; whoever is left at the end is ended."""
    with contextlib.ExitStack() as stack:
        chosen = port or stack.enter_context(free_port())
        started = Processes(commands, port=chosen, folder=folder)
        for process in started.processes:
            stack.callback(close, process)
        yield started
