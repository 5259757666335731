"""Work done ahead gives what it gives when done in turn, keeps within its bounds, and leaves no thread behind."""

from __future__ import annotations

import threading
import time

import pytest

from lib_lora_train.dataset.prefetch import Prefetch, reading_threads


def ahead(items, work, *, threads: int = 3, most: int = 4, most_bytes: int = 1000, cost=lambda item: 1, kept=lambda result: 1):
    return Prefetch(items, work, threads=threads, most=most, cost=cost, kept=kept, most_bytes=most_bytes)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lora-train-prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert ours() == []


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order_whichever_is_ready_first(threads: int) -> None:
    later = threading.Event()

    def work(item: int) -> int:
        if item == 0 and threads > 1:
            assert later.wait(60)  # the first one is ready after a later one
        if item == 2:
            later.set()
        return item * item

    with ahead(range(50), work, threads=threads) as results:
        assert list(results) == [item * item for item in range(50)]


def test_no_more_is_begun_than_may_wait() -> None:
    """Counted whenever something begins: what is begun and not taken. And so many are begun without being asked for."""
    lock, begun, taken, most, reached = threading.Lock(), [0], [0], [0], threading.Event()

    def work(item: int) -> int:
        with lock:
            begun[0] += 1
            most[0] = max(most[0], begun[0] - taken[0])
            if begun[0] - taken[0] >= 4:
                reached.set()
        return item

    with ahead(range(200), work, most=4) as results:
        assert reached.wait(60)
        for _ in range(200):
            with lock:
                taken[0] += 1  # counted before it is taken, as the room is free only afterwards
            next(results)
    # One more than allowed can be seen while one is being taken: counted as taken, and its successor not yet begun.
    assert begun == [200] and most[0] == 4


def test_what_is_worked_on_and_what_waits_stays_within_the_bytes() -> None:
    lock, alive, most = threading.Lock(), [0], [0]

    def change(by: int) -> None:
        with lock:
            alive[0] += by
            most[0] = max(most[0], alive[0])

    def work(size: int) -> int:
        change(size)  # while it is worked on
        change(size // 10 - size)  # what of it is kept
        return size // 10

    sizes = [100, 30, 250, 10, 400, 90, 300, 20] * 20
    with ahead(sizes, work, most=100, most_bytes=420, cost=lambda size: size, kept=lambda kept: kept) as results:
        for size in sizes:
            assert next(results) == size // 10
            change(-(size // 10))
    # What was just taken is counted here until `change` is reached, and no longer there.
    assert alive == [0] and most[0] <= 420 + 40


def test_one_item_that_is_larger_than_all_bounds_is_computed_by_itself() -> None:
    lock, active, beside_large = threading.Lock(), [0], []

    def work(size: int) -> int:
        with lock:
            active[0] += 1
        if size == 5000:
            time.sleep(0.05)  # time for the other threads to begin something, if they could
            beside_large.append(active[0])
        with lock:
            active[0] -= 1
        return size

    sizes = [1, 2, 5000, 3, 5000, 5000, 4]
    with ahead(sizes, work, most_bytes=10, cost=lambda size: size, kept=lambda size: size) as results:
        assert list(results) == sizes
    assert beside_large == [1, 1, 1]


class Broken(Exception):
    pass


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_exception_comes_where_its_result_would_have_come(threads: int) -> None:
    def work(item: int) -> int:
        if item == 5:
            raise Broken("the fifth")
        return item

    with ahead(range(9), work, threads=threads) as results:
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(Broken, match="the fifth"):
            next(results)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_exception_of_the_caller_ends_the_threads_and_the_work(threads: int) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), ahead(range(10_000), lambda item: done.append(item), threads=threads) as results:
        next(results)
        assert len(ours()) == threads
        raise KeyboardInterrupt
    assert ours() == [] and len(done) <= 1 + 4
    with pytest.raises(StopIteration):
        next(results)


def test_an_item_under_way_is_waited_for() -> None:
    """Whoever leaves the block may remove what the work reads."""
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def work(item: int) -> None:
        begun.set()
        assert may_end.wait(60)
        ended.append(item)

    with ahead([1], work, threads=1):
        assert begun.wait(60)
        may_end.set()
    assert ended == [1]


def test_there_is_always_a_thread_and_never_a_crowd() -> None:
    assert 1 <= reading_threads() <= 8
