"""Real processes that exchange values, and what the others are told when one of them ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_lora_train.distributed import LaunchEnvironment, ProcessLost, process_group
from lib_lora_train.errors import HostError
from lib_lora_train.run.saver import Checkpointer, Saver
from lib_lora_train.settings import SaveSettings
from tests.distributed.processes import Processes, free_port, running

# Joins at each of the ports that follow the timeout, runs the code after it, and prints what it says; an error of ours is
# printed as its class and text.
CHILD = """
import json, os, signal, sys, torch
from lib_lora_train.errors import Interrupted, LoraTrainError, TrainingError
from lib_lora_train.distributed import LaunchEnvironment, process_group

def say(*values):
    print(json.dumps(values), flush=True)

for port, what in zip(sys.argv[2::2], sys.argv[3::2]):
    os.environ["MASTER_PORT"] = port
    try:
        with process_group(LaunchEnvironment.read(os.environ), timeout=float(sys.argv[1])) as group:
            say("joined", group.rank, group.world_size)
            exec(what)
    except LoraTrainError as error:
        say(type(error).__name__, str(error))
"""
EXCHANGES = """
tensor = torch.arange(6.).view(2, 3) * (group.rank + 1)
group.all_reduce_(tensor)
say(tensor.tolist())
say(group.any(group.rank == 1), group.any(False))
say(group.all_gather("naïve ü" * group.rank))
if group.rank == 1:
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
group.any(False)
"""
# Process 1 does as it is told once the others wait for it; the file says that they have come this far.
ONE_GOES = """
group.any(False)
if group.rank == 1:
    {how}
group.any(False)
"""
ENDINGS = {"fails": ONE_GOES.format(how="raise TrainingError('It burst', why='heat')"),
           "is stopped": ONE_GOES.format(how="raise Interrupted('Enough')"), "is killed": EXCHANGES}


def told(started: Processes, rank: int) -> list[list]:
    """What a process printed."""
    return [json.loads(line) for line in started.until("there is no such line", rank)]


@contextlib.contextmanager
def together(*what: str, folder: Path, timeout: float = 600.0, count: int = 2, child: str = CHILD) -> Iterator[Processes]:
    """`count` processes that meet for each of `what`, one after the other."""
    with contextlib.ExitStack() as stack:
        meetings = [(stack.enter_context(free_port()), one) for one in what]
        words = ["-c", child, timeout, *(part for meeting in meetings for part in meeting)]
        yield stack.enter_context(running([words] * count, folder, port=meetings[0][0]))


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[list]]]:
    """{what became of process 1: what each of the three processes printed}."""
    with together(*ENDINGS.values(), folder=tmp_path_factory.mktemp("three"), count=3) as started:
        printed = [told(started, rank) for rank in range(3)]
        started.end()
    found: dict[str, list[list[list]]] = {}
    for lines in printed:
        begins = [place for place, line in enumerate(lines) if line[0] == "joined"]
        for how, begin, end in zip(ENDINGS, begins, [*begins[1:], None], strict=True):
            found.setdefault(how, []).append(lines[begin:end])
    return found


def test_all_hear_the_same_until_one_is_killed_and_the_others_end_by_themselves(heard):
    for rank in (0, 2):
        *before, (was, said) = heard["is killed"][rank]
        assert before == [
            ["joined", rank, 3], [[[0, 6, 12], [18, 24, 30]]], [True, False], [["", "naïve ü", "naïve ü" * 2]]]
        assert was == "ProcessLost" and said.startswith("Another of the 3 processes ended unexpectedly: it was killed")


@pytest.mark.parametrize("how, own, kind, text", [
    ("fails", "TrainingError", "ProcessLost", "Process 1 of 3 ended: It burst: heat."),
    ("is stopped", "Interrupted", "Interrupted", "Process 1 of 3 was stopped: Enough.")])
def test_one_that_fails_or_is_stopped_tells_the_others_why(heard, how, own, kind, text):
    first, other, last = heard[how]
    assert first[1:] == last[1:] == [[kind, text]] and other[-1][0] == own


# As if there were GPUs, with gloo in NCCL's place.
GPUS = """
import torch, torch.distributed as dist
torch.cuda.is_available = dist.is_nccl_available = lambda: True
new_group = dist.new_group
dist.new_group = lambda backend, timeout: new_group(backend="gloo", timeout=timeout)
destroyed = []
destroy = dist.destroy_process_group
dist.destroy_process_group = lambda group=None: (destroyed.append(group is None), destroy(group))
"""


def test_with_nccl_only_gloo_is_closed_and_the_weights_are_not_trusted(tmp_path):
    child = GPUS + CHILD.replace("say(type(error)", "say(len(destroyed), destroyed[0], error.intact if hasattr(error, "
                                  "'intact') else None, type(error)")
    goes = ONE_GOES.format(how="raise TrainingError('It burst')")
    with together(goes, folder=tmp_path, child=child) as started:
        assert told(started, 0)[-1] == [1, False, False, "ProcessLost", "Process 1 of 2 ended: It burst."]
        assert told(started, 1)[-1] == [1, False, None, "TrainingError", "It burst."]
        assert started.end() == [0, 0]


def test_when_the_first_one_is_killed_the_others_end_by_themselves(tmp_path):
    with together("group.any(False)\nif group.rank == 0: os._exit(9)\ngroup.any(False)", folder=tmp_path) as started:
        _, (was, said) = told(started, 1)
        assert was == "ProcessLost" and said.endswith("start all processes again with --resume.")
        assert started.end() == [9, 0]


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be halted there")
def test_a_process_that_no_longer_answers_is_lost_after_the_timeout(tmp_path):
    halts = ONE_GOES.format(how="os.kill(os.getpid(), signal.SIGSTOP)")
    with together(halts, folder=tmp_path, timeout=3) as started:
        _, (was, said) = told(started, 0)
        assert was == "ProcessLost" and said.startswith("Another of the 2 processes does not answer any more")
        assert started.processes[0].wait(120) == 0
        started.processes[1].send_signal(signal.SIGCONT)


def test_a_port_that_is_taken_is_told_in_one_line(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        launch = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in launch.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(HostError) as caught, process_group(LaunchEnvironment.read(os.environ)):
            pass
    said = str(caught.value)
    assert "\n" not in said and f"127.0.0.1:{port}" in said and "choose a port" in said


def test_all_processes_are_told_which_of_them_has_no_gpu(tmp_path):
    has = 'torch.cuda.is_available = torch.distributed.is_nccl_available = lambda: os.environ["RANK"] == "0"\n'
    with together("", folder=tmp_path, child="import os, torch, torch.distributed\n" + has + CHILD) as started:
        for rank in (0, 1):
            (was, said), = told(started, rank)
            assert was == "HostError" and "in process 1," in said
        assert started.end() == [0, 0]


@pytest.mark.parametrize("intact", [True, False])
def test_what_was_learnt_is_kept_only_where_the_last_sum_is_known_to_be_whole(tmp_path, intact):
    def weights(progress):
        asked.append("weights")
        return contextlib.nullcontext({"a.lora_up.weight": torch.ones(2, 2)})

    asked, settings = [], SaveSettings(save_state=False)
    plan = SimpleNamespace(
        target=tmp_path / "zzk.safetensors", settings=SimpleNamespace(save=settings), epoch_of=lambda step: 1,
        schedule=SimpleNamespace(steps=9, steps_per_epoch=3))
    saver = Saver(plan, SimpleNamespace(metadata=lambda name, step, epoch: {"ss_steps": str(step)}),
                  Checkpointer(None, settings, {}, lambda event: None), report=lambda event: None, spare=None, weights=weights)
    saver.after_step(SimpleNamespace(step=3, epoch=1, snapshot=lambda: None))
    with pytest.raises(ProcessLost) as caught, saver.rescue():
        raise ProcessLost("It is gone", intact=intact)
    assert ("zzk-step00000003" in caught.value.remedy) == intact and asked == (["weights"] if intact else [])
