"""A place in the WebUI's queue: the lock is got, or the wait for it ended."""

from __future__ import annotations

import threading

import pytest

from lib_lora_train.errors import Interrupted
from lib_lora_train.host.webui.queue import QueueLock


def test_a_free_lock_is_held_inside_and_free_afterwards_whatever_happens():
    lock = threading.Lock()
    with pytest.raises(ZeroDivisionError), QueueLock(lock).held():
        assert lock.locked()
        _ = 1 / 0
    assert not lock.locked()


def test_a_wait_that_is_given_up_ends_at_once_and_keeps_nothing():
    lock, ended, stopped = threading.Lock(), [], threading.Event()
    lock.acquire()
    queue_lock = QueueLock(lock)

    def wait() -> None:
        try:
            with queue_lock.held(stop=stopped.is_set):
                ended.append("held")
        except Interrupted:
            ended.append("given up")
    waiter = threading.Thread(target=wait)
    waiter.start()
    while not queue_lock.waiting():
        assert waiter.is_alive()
    stopped.set()
    waiter.join(10)
    assert ended == ["given up"] and not queue_lock.waiting()
    # The helper hands back what comes too late.
    lock.release()
    assert lock.acquire(timeout=10)


def test_a_lock_comes_when_the_lock_is_released_and_cannot_be_given_up_then():
    lock = threading.Lock()
    lock.acquire()
    queue_lock = QueueLock(lock)

    def release() -> None:
        while not queue_lock.waiting():
            pass
        lock.release()
    threading.Thread(target=release).start()
    with queue_lock.held(stop=lambda: not lock.locked()):
        assert lock.locked() and not queue_lock.waiting()
    assert not lock.locked()


class FIFOLock:
    """A lock that is handed on in the order in which it was asked for, and shows how many ask: as the WebUI's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._pending_threads: list[object] = []

    def acquire(self) -> bool:
        with self._changed:
            me = object()
            if self._held:
                self._pending_threads.append(me)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: not self._held and self._pending_threads[0] is me, 30)
                self._pending_threads.remove(me)
            self._held = True
            return True

    def release(self) -> None:
        with self._changed:
            assert self._held
            self._held = False
            self._changed.notify_all()

    def locked(self) -> bool:
        return self._held

    def wait_for_queue(self, length: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._pending_threads) == length, 30)


def worker(lock: FIFOLock, name: str, order: list[str], before: threading.Event | None = None, *,
           then=lambda: None) -> threading.Thread:
    def work() -> None:
        lock.acquire()
        order.append(name)
        then()
        if before is not None:
            assert before.wait(30)
        lock.release()
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_those_who_wait_go_first_in_their_order_and_who_comes_later_waits_for_the_next_time():
    lock, order, threads = FIFOLock(), [], []
    queue_lock = QueueLock(lock)

    def come_late() -> None:
        threads.append(worker(lock, "late", order))
        lock.wait_for_queue(3)  # behind "second" and the trainer
    with queue_lock.held():
        assert not queue_lock.others_waiting()
        threads.append(worker(lock, "first", order, then=come_late))
        lock.wait_for_queue(1)
        threads.append(worker(lock, "second", order))
        lock.wait_for_queue(2)
        assert queue_lock.others_waiting()
        queue_lock.yield_to_others(stop=lambda: False)
        assert order == ["first", "second"] and lock.locked()
    for thread in threads:
        thread.join(30)
    assert order == ["first", "second", "late"] and not lock.locked()


def test_who_no_longer_wants_it_back_gets_no_lock_and_releases_none():
    lock, go = FIFOLock(), threading.Event()
    queue_lock, order = QueueLock(lock), []
    with pytest.raises(Interrupted), queue_lock.held():
        other = worker(lock, "other", order, before=go)
        lock.wait_for_queue(1)
        queue_lock.yield_to_others(stop=lambda: bool(order))
    assert lock.locked() and not queue_lock.waiting()
    go.set()
    other.join(30)
    assert lock.acquire() and order == ["other"]
    lock.release()  # for the helper that still stands in the queue, who hands it back


def test_it_can_be_left_and_taken_again():
    lock = FIFOLock()
    queue_lock = QueueLock(lock)
    with queue_lock.held():
        queue_lock.release()
        assert not lock.locked()
        queue_lock.acquire()
        assert lock.locked()
    assert not lock.locked()
