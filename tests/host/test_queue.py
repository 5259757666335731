"""A turn in somebody's queue: got, or given up."""

from __future__ import annotations

import threading

import pytest

from lib_lora_train.errors import Interrupted
from lib_lora_train.host.webui_queue import Turn


def test_a_free_lock_is_held_inside_and_free_afterwards_whatever_happens():
    lock = threading.Lock()
    with pytest.raises(ZeroDivisionError), Turn(lock).held():
        assert lock.locked()
        _ = 1 / 0
    assert not lock.locked()


def test_a_wait_that_is_given_up_ends_at_once_and_keeps_nothing():
    lock, turn, ended = threading.Lock(), None, []
    lock.acquire()
    turn = Turn(lock)

    def wait() -> None:
        try:
            with turn.held():
                ended.append("held")
        except Interrupted:
            ended.append("given up")
    waiter = threading.Thread(target=wait)
    waiter.start()
    assert turn.waiting()
    turn.give_up()
    waiter.join(10)
    assert ended == ["given up"] and not turn.waiting()
    # The helper hands back what comes too late.
    lock.release()
    assert lock.acquire(timeout=10)


def test_a_turn_comes_when_the_lock_is_released_and_cannot_be_given_up_then():
    lock = threading.Lock()
    lock.acquire()
    turn = Turn(lock)
    threading.Timer(0.05, lock.release).start()
    with turn.held():
        turn.give_up()
        assert lock.locked() and not turn.waiting()
    assert not lock.locked()
