"""Where a process stands, which rows are its own, and what is said where processes differ: all of it without any process."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_lora_train.__main__ import _failed_together
from lib_lora_train.distributed import SINGLE_PROCESS, Disagreement, Lost, agree, share
from lib_lora_train.distributed.environment import Place, place_of
from lib_lora_train.errors import SettingError
from lib_lora_train.run.resume import Point, compare_settings
from lib_lora_train.settings import flat, parse

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}


def test_what_torchrun_sets_is_understood_and_without_it_there_is_one_process():
    assert place_of(TORCHRUN) == Place(rank=1, world=2, local=1, address="10.0.0.7", port=29500)
    assert place_of({}) is None and place_of({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize("changed, word", [
    ({"RANK": ""}, "RANK is not set"), ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"), ({"MASTER_PORT": ""}, "MASTER_PORT"),
    ({"LOCAL_RANK": ""}, "LOCAL_RANK is not set"), ({"RANK": "2"}, "counted from 0"), ({"WORLD_SIZE": "two"}, "no number"),
    ({"RANK": "-1"}, "no number")])
def test_variables_that_are_missing_or_make_no_sense_are_named(changed, word):
    with pytest.raises(SettingError, match=word):
        place_of({**TORCHRUN, **changed})


def test_more_processes_than_cards_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingError, match="Process 3 would need card 1 of its machine, which has 1"):
        Place(rank=3, world=4, local=1, address="a", port=1).device()


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_shares_cover_all_rows_once_in_order_and_differ_by_one_at_most(count, world):
    shares = [share(count, SimpleNamespace(rank=rank, world=world)) for rank in range(world)]
    assert [row for part in shares for row in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in shares]
    assert max(sizes) - min(sizes) <= 1


def together(*told: str):
    """Ranks of which each says its text, as process 0 sees them."""
    return SimpleNamespace(rank=0, world=len(told), gather=lambda text: (text, *told[1:]))


def said(shown: str, digests: str = "{}") -> str:
    return f"[{shown}, {digests}]"


def test_equal_settings_are_agreed_on_however_they_are_spelled():
    agree(together("", said('{"size": [64, 64], "rate": 0.1}')), shown={"rate": 0.1, "size": (64, 64)}, digests={})


def test_each_difference_is_told_by_name_value_and_process():
    ranks = together("", said('{"rate": 0.1, "seed": 1}'), said('{"rate": 0.2}'))
    with pytest.raises(Disagreement, match=r"rate is 0\.1 in process 0 and 0\.2 in process 2, seed is 1 in process 0 and None "
                                           r"in process 2.*same command"):
        agree(ranks, shown={"rate": 0.1, "seed": 1}, digests={})


def test_what_is_too_long_to_tell_is_only_named():
    with pytest.raises(Disagreement, match=r": the pictures of process 0 and of process 1 differ; start all"):
        agree(together("", said("{}", '{"the pictures": "ab"}')), shown={}, digests={"the pictures": "cd"})


def test_where_the_same_command_is_no_remedy_another_one_is_told():
    with pytest.raises(Disagreement, match=r"form is 'int8' in process 0 and '' in process 1; set base_weights\.$"):
        agree(together("", said('{"form": ""}')), shown={"form": "int8"}, digests={}, remedy="set base_weights")


@pytest.mark.parametrize("rank, failure, tells", [
    (0, Lost("Gone", explained=True), True), (1, Lost("Gone", explained=True), False), (1, Lost("Gone"), True),
    (1, Disagreement("They differ"), False), (1, SettingError("No such file"), True)])
def test_nobody_is_lost_without_a_word_and_what_all_know_is_told_once(monkeypatch, capsys, rank, failure, tells):
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        _failed_together(Place(rank, 2, rank, "a", 1), str(failure), failure)
    assert bool(capsys.readouterr().err) == tells


def test_many_differences_are_counted():
    values = {name: 1 for name in "abcdef"}
    with pytest.raises(Disagreement, match=r"c is 1 in process 0 and None in process 1, and 3 more"):
        agree(together("", said("{}")), shown=values, digests={})


def test_one_process_agrees_with_itself():
    tensor = torch.tensor([1.0, 2.0])
    SINGLE_PROCESS.sum_(tensor)
    SINGLE_PROCESS.broadcast_(tensor, source=0)
    assert tensor.tolist() == [1, 2] and SINGLE_PROCESS.any(True) and not SINGLE_PROCESS.any(False) and SINGLE_PROCESS.gather("a") == ("a",)
    assert share(5, SINGLE_PROCESS) == slice(0, 5)
    agree(SINGLE_PROCESS, shown={"a": 1}, digests={})


@pytest.mark.parametrize("batch, processes, told", [
    (2, 2, []), (4, 1, []), (1, 4, []), (2, 1, ["2 × 1"]), (4, 2, ["train_batch_size is 4 and was 2"])])
def test_other_processes_may_go_on_and_another_global_batch_is_told(batch, processes, told):
    began = flat(parse({"train_batch_size": 2}))
    point = Point(Path("state"), {"settings": began, "processes": 2, "step": 3, "steps": 9})
    chosen = parse({"train_batch_size": batch, "lr_scheduler": "constant"})
    notes = [note for note in compare_settings(chosen, point, steps=9, processes=processes) if "lr_scheduler" not in note]
    assert len(notes) == len(told) and all(part in note for part, note in zip(told, notes, strict=True))
