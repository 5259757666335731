"""Processes of which one has no card: found out together, before anybody waits for what never comes."""

from __future__ import annotations

from tests.distributed.processes import running

# As if process 0 had a card and process 1 none.
CHILD = """
import os, torch, torch.distributed as dist
from lib_lora_train.errors import HostError
from lib_lora_train.distributed.process_group import joined
from lib_lora_train.distributed.environment import place_of

torch.cuda.is_available = dist.is_nccl_available = lambda: os.environ["RANK"] == "0"
try:
    with joined(place_of(os.environ)):
        print("joined", flush=True)
except HostError as error:
    print(error, flush=True)
"""


def test_all_are_told_which_of_them_has_no_card(tmp_path):
    with running([["-c", CHILD]] * 2, tmp_path) as started:
        for rank in (0, 1):
            said, = started.until("there is no such line", rank)
            assert said.startswith("The 2 processes cannot train together: torch finds no card, or no NCCL, in process 1,")
        assert started.end() == [0, 0]
