"""A process's rank, its rows, and what is said where processes differ: without any process."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from lib_lora_train.__main__ import failed_together
from lib_lora_train.distributed import SINGLE_PROCESS, LaunchEnvironment, ProcessLost, rows_of
from lib_lora_train.errors import SettingError
from lib_lora_train.run.consistency import ProcessesDiffer, require_equal

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}


def test_what_torchrun_sets_is_understood_and_without_it_there_is_one_process():
    assert LaunchEnvironment.read(TORCHRUN) == LaunchEnvironment(
        rank=1, world_size=2, local_rank=1, address="10.0.0.7", port=29500)
    assert LaunchEnvironment.read({}) is None and LaunchEnvironment.read({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize("name, value", [
    ("RANK", ""), ("MASTER_ADDR", ""), ("MASTER_PORT", ""), ("LOCAL_RANK", ""), ("RANK", "2"), ("WORLD_SIZE", "two"),
    ("RANK", "-1")])
def test_variables_that_are_missing_or_make_no_sense_are_named(name, value):
    with pytest.raises(SettingError, match=name):
        LaunchEnvironment.read({**TORCHRUN, name: value})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingError):
        LaunchEnvironment(rank=3, world_size=4, local_rank=1, address="a", port=1).device()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_parts_cover_all_rows_once_in_order_and_differ_by_one_at_most(world_size):
    for count in range(9):
        parts = [rows_of(count, SimpleNamespace(rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert [row for part in parts for row in range(count)[part]] == list(range(count))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1


def together(*others: tuple[dict, dict]) -> SimpleNamespace:
    """Process 0 of a group whose other processes have these values and fingerprints."""
    return SimpleNamespace(rank=0, world_size=1 + len(others), all_gather=lambda own: [own, *others])


def test_equal_values_are_accepted():
    require_equal(together(({"size": (64, 64)}, {"the model": "ab"})), {"size": (64, 64)}, fingerprints={"the model": "ab"})


def test_values_are_shown_with_their_process_fingerprints_by_name_and_many_are_counted():
    others = ({"rate": 0.1, "seed": 1}, {"the pictures": "ab"}), ({"rate": 0.2}, {"the pictures": "cd"})
    with pytest.raises(ProcessesDiffer) as caught:
        require_equal(together(*others), {"rate": 0.1, "seed": 1}, fingerprints={"the pictures": "ab"}, remedy="set rate")
    assert caught.value.why == ("rate is 0.1 in process 0 and 0.2 in process 2, seed is 1 in process 0 and None in process 2, "
                                "the pictures of process 0 and of process 2 differ")
    assert caught.value.remedy == "set rate"
    with pytest.raises(ProcessesDiffer) as caught:
        require_equal(together(({}, {})), dict.fromkeys("abcdef", 1))
    assert caught.value.why.endswith(", and 3 more")


def test_one_process_agrees_with_itself():
    tensor = torch.tensor([1.0, 2.0])
    SINGLE_PROCESS.all_reduce_(tensor)
    assert tensor.tolist() == [1, 2] and SINGLE_PROCESS.any(True) and not SINGLE_PROCESS.any(False)
    assert SINGLE_PROCESS.all_gather("a") == ["a"] and rows_of(5, SINGLE_PROCESS) == slice(0, 5)
    require_equal(SINGLE_PROCESS, {"a": 1})


@pytest.mark.parametrize("rank, failure, tells", [
    (0, ProcessLost("Gone", explained=True), True), (1, ProcessLost("Gone", explained=True), False),
    (1, ProcessLost("Gone"), True), (1, ProcessesDiffer("They differ"), False), (1, SettingError("No such file"), True)])
def test_no_process_is_lost_silently_and_what_all_know_is_told_once(monkeypatch, capsys, rank, failure, tells):
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        failed_together(LaunchEnvironment(rank, 2, rank, "a", 1), str(failure), failure)
    assert bool(capsys.readouterr().err) == tells
