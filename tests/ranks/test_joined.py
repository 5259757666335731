"""Processes that meet, and what the others are told when one of them goes."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.ranks.processes import running

# Joins, does what `sys.argv[1]` says and prints it; an error of ours is printed as its class and text.
CHILD = """
import json, os, signal, sys, torch
from lib_lora_train.errors import Interrupted, LoraTrainError, TrainingError
from lib_lora_train.ranks.joined import joined
from lib_lora_train.ranks.place import place_of

def say(*values):
    print(json.dumps(values), flush=True)

try:
    with joined(place_of(os.environ), patience=float(sys.argv[2])) as ranks:
        say("joined", ranks.rank, ranks.world)
        exec(sys.argv[1])
except LoraTrainError as error:
    say(type(error).__name__, str(error))
"""
MEETINGS = """
tensor = torch.arange(6.).view(2, 3) * (ranks.rank + 1)
ranks.sum_(tensor)
say(tensor.tolist())
say(ranks.any(ranks.rank == 1), ranks.any(False))
say(ranks.gather("naïve ü" * ranks.rank))
sent = torch.full((3,), float(ranks.rank))
ranks.broadcast_(sent, source=1)
say(sent.tolist())
if ranks.rank == 1:
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
ranks.any(False)
"""
# Process 1 does as it is told once the others wait for it; the file says that they have come this far.
ONE_GOES = """
ranks.any(False)
if ranks.rank == 1:
    {how}
ranks.any(False)
"""


def told(started, rank: int) -> list[list]:
    """What a process printed."""
    return [json.loads(line) for line in started.until("there is no such line", rank)]


def pair(how: str, folder: Path, *, patience: float = 600.0, count: int = 2):
    return running([["-c", CHILD, how, patience]] * count, folder)


def test_all_hear_the_same_until_one_is_killed_and_the_others_end_by_themselves(tmp_path):
    with pair(MEETINGS, tmp_path, count=3) as started:
        for rank in (0, 2):
            *before, (was, said) = told(started, rank)
            assert before == [
                ["joined", rank, 3], [[[0, 6, 12], [18, 24, 30]]], [True, False], [["", "naïve ü", "naïve ü" * 2]],
                [[1, 1, 1]]]
            assert was == "Lost" and said.startswith("Another of the 3 processes ended unexpectedly: it was killed")
        started.end()


@pytest.mark.parametrize("how, kind, text", [
    ("raise TrainingError('It burst', why='heat')", "Lost", "Process 1 of 2 ended: It burst: heat."),
    ("raise Interrupted('Enough')", "Interrupted", "Process 1 of 2 was stopped: Enough.")])
def test_one_that_fails_or_is_stopped_tells_the_others_why(tmp_path, how, kind, text):
    with pair(ONE_GOES.format(how=how), tmp_path) as started:
        (_, *_), heard = told(started, 0)
        assert heard == [kind, text] and told(started, 1)[-1][0] == how[6:].split("(")[0]
        started.end()


def test_when_the_first_one_is_killed_the_others_end_by_themselves(tmp_path):
    with pair("ranks.any(False)\nif ranks.rank == 0: os._exit(9)\nranks.any(False)", tmp_path) as started:
        _, (was, said) = told(started, 1)
        assert was == "Lost" and said.endswith("start all processes again with --resume.")
        assert started.end() == [9, 0]


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be halted there")
def test_one_that_no_longer_answers_is_given_up_after_the_patience(tmp_path):
    halts = ONE_GOES.format(how="os.kill(os.getpid(), signal.SIGSTOP)")
    with pair(halts, tmp_path, patience=5) as started:
        _, (was, said) = told(started, 0)
        assert was == "Lost" and said.startswith("Another of the 2 processes does not answer any more")
        assert started.processes[0].wait(120) == 0
        started.processes[1].send_signal(signal.SIGCONT)


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with running([["-c", CHILD, "", 600]], tmp_path, port=port, world=2) as started:
            (was, said), = told(started, 0)
    assert was == "HostError"
    assert said == (f"Process 0 of 2 cannot join the others at 127.0.0.1:{port}: another program uses this port; choose "
                    "another MASTER_PORT.")
