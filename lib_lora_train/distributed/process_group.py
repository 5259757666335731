"""The processes joined by torch.distributed: gloo between processors, NCCL between cards.

Two channels: what is agreed on and said goes over the CPU (`control`), the gradients of cards over NCCL where torch has it.
A killed process closes its connections, and the others hear of it at the next meeting; a machine that vanished is missed
after `patience`. A process that fails says why before it goes, and process 0 is given time to keep what was learnt.

Not here: ranks that come and go while the training runs. Whoever restarts lost processes has them resume.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from lib_lora_train.distributed.environment import Place
from lib_lora_train.distributed.protocol import SINGLE_PROCESS, Lost, ProcessGroup
from lib_lora_train.errors import HostError, Interrupted, LoraTrainError, is_out_of_memory

PATIENCE = 1800.0
"""Seconds after which a process that does not come to a meeting is lost: more than one rank's part of encoding the pictures
may take longer than another's, less than a night."""
_GATHERING = 300.0  # seconds for all processes to be started in
_FAREWELL = 60.0  # seconds that the others give process 0 to keep what was learnt, before a launcher sees them gone
_HEARD = 3.0  # seconds that process 0, where the others read why it ended, waits for them

_T = TypeVar("_T")


@contextlib.contextmanager
def joined(place: Place | None, *, patience: float = PATIENCE) -> Iterator[ProcessGroup]:
    """The processes of `place` together, until the block is left; ALONE where `place` is None.

    All of them leave together. One that leaves with an exception tells the others what it says. Raises HostError where the
    processes do not find each other.
    """
    if place is None:
        yield SINGLE_PROCESS
        return
    together = _join(place, patience)
    try:
        yield together
        together.any(False)  # whoever is done waits for the others: to a launcher an early end looks like a failure
    except (Exception, KeyboardInterrupt) as error:
        together.fail(error)
        raise
    together.leave()


class TorchProcessGroup:
    """`ProcessGroup` over torch.distributed."""

    def __init__(self, place: Place, store: dist.Store, *, control: dist.ProcessGroup, cards: dist.ProcessGroup | None) -> None:
        """`cards` is the group that sums what lies on a card, None where that goes over the CPU as all else does."""
        self.rank, self.world = place.rank, place.world
        self._store, self._cards = dist.PrefixStore("lora_train", store), cards
        self._control: dist.ProcessGroup | None = control
        self._bereft = self._silent = False  # another one left; it does not even answer, and will not say goodbye

    def sum_(self, tensor: torch.Tensor) -> None:
        """See `ProcessGroup`. On cards the device waits, not the process."""
        assert tensor.is_contiguous()
        if tensor.device.type == "cpu":
            self._meet(lambda: dist.all_reduce(tensor, async_op=True, group=self._control))
        elif tensor.device.type == "cuda" and self._cards is not None:
            self._meet(lambda: dist.all_reduce(tensor, group=self._cards))
        else:
            copy = tensor.cpu()  # a synchronisation: torch has nothing that connects these devices
            self.sum_(copy)
            tensor.copy_(copy)

    def any(self, wanted: bool) -> bool:
        """See `ProcessGroup`."""
        count = torch.tensor([int(wanted)])
        self.sum_(count)
        return bool(count.item())

    def gather(self, text: str) -> tuple[str, ...]:
        """See `ProcessGroup`."""
        data = text.encode("utf-8", "surrogatepass")
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self.sum_(sizes)
        ends = sizes.cumsum(0).tolist()
        # Each fills its own part of zeros: the sum is all parts side by side.
        together = torch.zeros(max(1, ends[-1]), dtype=torch.uint8)
        if data:
            together[ends[self.rank] - len(data):ends[self.rank]] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.sum_(together)
        whole = bytes(together.tolist())
        return tuple(whole[end - size:end].decode("utf-8", "surrogatepass")
                     for end, size in zip(ends, sizes.tolist(), strict=True))

    def broadcast_(self, tensor: torch.Tensor, *, source: int) -> None:
        """See `ProcessGroup`."""
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        self._meet(lambda: dist.broadcast(tensor, src=source, async_op=True, group=self._control))

    def leave(self) -> None:
        """The end of a run that went well, after the last meeting."""
        self._control, self._cards = None, None
        dist.destroy_process_group()
        self._goodbye(wait_for=tuple(range(1, self.world)) if self.rank == 0 else (), seconds=_HEARD)

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends, let them notice, and let process 0 keep what was learnt first."""
        if not self._bereft:
            what = str(error) if isinstance(error, LoraTrainError) else f"{type(error).__name__}: {error}"
            interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
            why = json.dumps({"rank": self.rank, "what": what.rstrip("."), "interrupted": interrupted})
            _within(_HEARD, lambda: (self._store.set("why", why), self._store.add("failed", 1)))
        if isinstance(error, KeyboardInterrupt):
            # A meeting may be under way, and closing the connections would wait for it.
            sys.stderr.flush()
            os._exit(130)
        # The others hear of it by the connection that is closed. What a card still computes may wait for a process that is
        # gone, so that nothing of NCCL is touched: the end of the process takes it along.
        control, cards, self._control, self._cards = self._control, self._cards, None, None
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group(control if cards is not None else None)
        del control
        if self.rank == 0:
            self._goodbye(wait_for=tuple(range(1, self.world)), seconds=_HEARD)
        else:
            self._goodbye(wait_for=(0,), seconds=_HEARD if self._silent else _FAREWELL)

    def _meet(self, begin: Callable[[], dist.Work | None]) -> None:
        try:
            work = begin()
            if work is not None:
                _wait(work)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> LoraTrainError:
        """Why a meeting failed: what the one who left says, or that it said nothing."""
        self._bereft = True
        why = _within(_HEARD, lambda: self._store.get("why") if self._store.add("failed", 0) else b"")
        if why:
            told = json.loads(why)
            if told["interrupted"]:
                return Interrupted(f"Process {told['rank']} of {self.world} was stopped: {told['what']}")
            return Lost(f"Process {told['rank']} of {self.world} ended: {told['what']}", intact=self._cards is None,
                        explained=True)
        silent = self._silent = "timed out" in str(error).lower()
        return Lost(
            f"Another of the {self.world} processes " + ("does not answer any more" if silent else "ended unexpectedly"),
            why="it was stopped, or its machine cannot be reached" if silent else "it was killed, or its machine was lost",
            remedy="the last save and the resume point are whole: start all processes again with --resume",
            intact=self._cards is None)

    def _goodbye(self, *, wait_for: tuple[int, ...], seconds: float) -> None:
        """Say that this process is leaving, and stay until those have said so too, at most so long.

        Process 0, which may keep the store, says it first and leaves last.
        """
        def gone() -> None:
            if self.rank == 0:
                self._store.add("left 0", 1)
            until = time.monotonic() + seconds
            while time.monotonic() < until and not all(self._store.add(f"left {rank}", 0) for rank in wait_for):
                time.sleep(0.05)
            if self.rank:
                self._store.add(f"left {self.rank}", 1)
        _within(seconds + _HEARD, gone)


def _join(place: Place, patience: float) -> TorchProcessGroup:
    """Find the others. Raises HostError."""
    if not dist.is_available():
        raise HostError(f"The {place.world} processes cannot train together", why="this torch was built without "
                        "torch.distributed", remedy="install torch's ordinary packages, or train in one process")
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")  # torch's packages for Windows are built without it, and ask for it
    gathering = datetime.timedelta(seconds=_GATHERING)
    try:
        # `Place` was read from the variables that this reads again; with torchrun the store lives in its agent.
        store, _, _ = next(dist.rendezvous("env://", timeout=gathering))
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world,
                                timeout=datetime.timedelta(seconds=patience))
        control, group = dist.group.WORLD, None
        if _all_have_cards(place):
            # A control of its own: it can be closed while NCCL still waits for somebody.
            control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=patience))
            group = dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=patience))
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_joined(place, error) from error
    return TorchProcessGroup(place, store, control=control, cards=group)


def _all_have_cards(place: Place) -> bool:
    """Whether gradients are summed between cards, which a process cannot know by itself. Raises HostError in all of them where
    some have a card and others none: each would wait for the others in another way."""
    have = torch.zeros(place.world, dtype=torch.int64)
    have[place.rank] = int(torch.cuda.is_available() and dist.is_nccl_available())
    dist.all_reduce(have)
    without = [str(rank) for rank, one in enumerate(have.tolist()) if not one]
    if 0 < len(without) < place.world:
        raise HostError(f"The {place.world} processes cannot train together",
                        why=f"torch finds no card, or no NCCL, in process {', '.join(without)}, and in the others it does",
                        remedy="start processes only where there is a card, or hide the cards from all of them "
                        "(CUDA_VISIBLE_DEVICES)")
    return not without


def _not_joined(place: Place, error: Exception) -> HostError:
    text = str(error).lower()
    what = f"Process {place.rank} of {place.world} cannot join the others at {place.address}:{place.port}"
    if "eaddrinuse" in text or "already in use" in text:
        return HostError(what, why="another program uses this port", remedy="choose another MASTER_PORT")
    if "timed out" in text or "timeout" in text:
        return HostError(what, why=f"not all of them came within {_GATHERING:.0f} seconds",
                         remedy="start all of them, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and let the "
                         "machines reach each other")
    return HostError(what, why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                     remedy="check MASTER_ADDR and MASTER_PORT")


def _wait(work: dist.Work) -> None:
    """Wait as `work.wait()` does, but so that Ctrl+C is heard. Raises RuntimeError where it failed."""
    pause = 0.00005
    while not work.is_completed():
        time.sleep(pause)
        pause = min(0.005, pause * 1.2)
    work.wait()


def _within(seconds: float, call: Callable[[], _T]) -> _T | None:
    """What `call` returns; None where it fails or takes longer: a store whose process is stopped never answers."""
    answers: list[_T] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(call())
    thread = threading.Thread(target=ask, name="lora-train-store", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
