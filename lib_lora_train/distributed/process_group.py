"""What processes that train together ask of each other: `ProcessGroup`, over torch.distributed or for a single process.

Values and CPU tensors go over gloo, gradients on GPUs over NCCL where torch has it. The end of a process closes its gloo
connections, so that the others' next collective fails; a machine that vanished is noticed after the timeout. A process that
fails says why in the store first, and lets process 0 save what was learnt before it exits.

Not covered: processes that come and go during a run. Whoever restarts lost processes has them resume.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lib_lora_train.distributed.launch import LaunchEnvironment
from lib_lora_train.errors import HostError, Interrupted, LoraTrainError, TrainingError, is_out_of_memory

TIMEOUT = 1800.0
"""Seconds after which a process that joins no collective is lost: one may encode images for longer than another."""
_JOINING = timedelta(seconds=300)  # for all processes to be started in
_SAVING = timedelta(seconds=60)  # that the others give process 0 to save: a launcher ends all soon after the first one
_ANSWER = timedelta(seconds=3)  # for a message from or to processes that still run

T = TypeVar("T")


class ProcessLost(TrainingError):
    """Another process ended or does not answer: the training cannot go on. `intact` False: the weights must not be saved, the
    last gradient may be summed in part. `explained`: the process that ended said why, to its user too."""

    def __init__(self, what: str, *, why: str = "", remedy: str = "", intact: bool = True, explained: bool = False) -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.intact, self.explained = intact, explained


class ProcessGroup:
    """The processes that train one LoRA: `rank` is this one's number, from 0, of `world_size`. Number 0 saves and prints.

    The methods are collectives: all processes call them in the same order. Where one process is lost, the others raise
    ProcessLost, or Interrupted if its user stopped it.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, *, store: dist.Store | None = None,
                 gloo: dist.ProcessGroup | None = None, nccl: dist.ProcessGroup | None = None) -> None:
        """`nccl` sums tensors on GPUs, None over the CPU; `gloo` does all else. A single process needs none of them."""
        self.rank, self.world_size = rank, world_size
        self._store, self._gloo, self._nccl = store, gloo, nccl
        self._lost = self._silent = False  # another process ended; it timed out

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor, on any device, by its sum over all processes. With NCCL the device alone waits."""
        if self.world_size == 1:
            return
        if tensor.device.type == "cpu":
            self._collective(lambda: dist.all_reduce(tensor, group=self._gloo, async_op=True))
        elif self._nccl is not None:
            self._collective(lambda: dist.all_reduce(tensor, group=self._nccl))
        else:
            copy = tensor.cpu()
            self.all_reduce_(copy)
            tensor.copy_(copy)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        count = torch.tensor([int(flag)])
        self.all_reduce_(count)
        return bool(count)

    def all_gather(self, value: T) -> list[T]:
        """The value of each process, in the order of their ranks; anything that can be pickled."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            self._collective(lambda: dist.all_gather_object(values, value, group=self._gloo))
        return values

    def abort(self, error: BaseException) -> None:
        """Tell the others why this process ends, end their collectives, and wait until process 0 has saved."""
        if not self._lost:
            what = str(error) if isinstance(error, LoraTrainError) else f"{type(error).__name__}: {error}"
            told = {"rank": self.rank, "what": what, "interrupted": isinstance(error, (Interrupted, KeyboardInterrupt))}
            with contextlib.suppress(RuntimeError):
                self._store.set("failed", json.dumps(told))
        if isinstance(error, KeyboardInterrupt):  # closing the connections would wait for a collective under way
            sys.stderr.flush()
            os._exit(130)
        # With NCCL only gloo's group: NCCL's may wait for the lost process for ever, and ends with this process.
        closed, self._gloo = (self._gloo if self._nccl else None), None
        with contextlib.suppress(RuntimeError):
            _destroy(closed)
        del closed
        if self._silent:  # process 0, which may hold the store, may be the one that does not answer
            time.sleep(_ANSWER.total_seconds())
            return
        with contextlib.suppress(RuntimeError):
            if self.rank == 0:  # it may hold the store, and leaves last
                self._store.set("saved", "")
                self._store.wait([f"left {rank}" for rank in range(1, self.world_size)], _ANSWER)
            else:
                self._store.wait(["saved"], _SAVING)
                self._store.set(f"left {self.rank}", "")

    def _collective(self, call: Callable[[], dist.Work | None]) -> None:
        try:
            work = call()
            while work is not None and not work.is_completed():
                time.sleep(0.0005)  # `work.wait()` alone would not hear Ctrl+C
            if work is not None:
                work.wait()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._reason(error) from error

    def _reason(self, error: RuntimeError) -> LoraTrainError:
        """Why a collective failed: what the process that ended says in the store, or that it said nothing."""
        self._lost, self._silent = True, "timed out" in str(error).lower()
        with contextlib.suppress(RuntimeError):
            if not self._silent:
                self._store.wait(["failed"], _ANSWER)
                told = json.loads(self._store.get("failed"))
                if told["interrupted"]:
                    return Interrupted(f"Process {told['rank']} of {self.world_size} was stopped: {told['what']}")
                return ProcessLost(f"Process {told['rank']} of {self.world_size} ended: {told['what']}",
                                   intact=self._nccl is None, explained=True)
        what, why = (("does not answer any more", "it was stopped, or its machine cannot be reached") if self._silent else
                     ("ended unexpectedly", "it was killed, or its machine was lost"))
        return ProcessLost(
            f"Another of the {self.world_size} processes {what}", why=why, intact=self._nccl is None,
            remedy="the last save and the resume point are whole: start all processes again with --resume")


SINGLE_PROCESS = ProcessGroup()


def rows_of(count: int, group: ProcessGroup) -> slice:
    """This process's part of `count` rows: consecutive parts, equal but for one row, some empty if there are few rows."""
    return slice(count * group.rank // group.world_size, count * (group.rank + 1) // group.world_size)


@contextlib.contextmanager
def process_group(launch: LaunchEnvironment | None, *, timeout: float = TIMEOUT) -> Iterator[ProcessGroup]:
    """The group of all launched processes until the block ends, in all of them at once; `SINGLE_PROCESS` for None. An
    exception in one process ends the block in all of them. Raises HostError where they cannot connect."""
    if launch is None:
        yield SINGLE_PROCESS
        return
    group = _connect(launch, timedelta(seconds=timeout))
    try:
        yield group
        group.any(False)  # a launcher takes a process that ends before the others for a failure
    except (Exception, KeyboardInterrupt) as error:
        group.abort(error)
        raise
    _destroy()


def _destroy(group: dist.ProcessGroup | None = None) -> None:
    """Close the connections of a group; None: of all.

    gloo's threads need Python's lock to free the tensors of the last collective, and torch holds that lock while it waits for
    these threads to end. The pause lets them have it first: without it, processes that had just exchanged objects hung.
    """
    time.sleep(0.2)
    dist.destroy_process_group(group)


def _connect(launch: LaunchEnvironment, timeout: timedelta) -> ProcessGroup:
    """Connect to the other processes. Raises HostError."""
    if not dist.is_available():
        raise HostError("This torch was built without torch.distributed",
                        remedy="install torch's ordinary packages, or train in one process")
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")  # torch's packages for Windows ask for libuv and are built without it
    have_nccl: list[Any] = [None] * launch.world_size
    try:
        # It reads the variables that `launch` was read from. Under torchrun the store is in torchrun's own process.
        store, _, _ = next(dist.rendezvous("env://", timeout=_JOINING))
        dist.init_process_group("gloo", store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
        gloo, nccl = dist.group.WORLD, None
        dist.all_gather_object(have_nccl, torch.cuda.is_available() and dist.is_nccl_available())
        if all(have_nccl):
            gloo = dist.new_group(backend="gloo", timeout=timeout)  # can be closed while NCCL waits for a lost process
            nccl = dist.new_group(backend="nccl", timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise HostError(
            f"Process {launch.rank} of {launch.world_size} cannot join the others at {launch.address}:{launch.port}",
            why=str(error).partition("\n")[0],
            remedy=f"start all of them within {_JOINING.total_seconds():.0f} seconds, with the same MASTER_ADDR, MASTER_PORT "
            "and WORLD_SIZE; let the machines reach each other, and choose a port that no other program uses") from error
    if any(have_nccl) and nccl is None:
        without = ", ".join(str(rank) for rank, has in enumerate(have_nccl) if not has)
        raise HostError(f"The {launch.world_size} processes cannot train together",
                        why=f"torch finds no GPU, or no NCCL, in process {without}, and in the others it does",
                        remedy="start processes only where there is a GPU, or hide the GPUs from all of them "
                        "(CUDA_VISIBLE_DEVICES)")
    return ProcessGroup(launch.rank, launch.world_size, store=dist.PrefixStore("lora_train", store), gloo=gloo, nccl=nccl)
