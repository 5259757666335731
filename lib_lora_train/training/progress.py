"""Losses and speed of a running loop, read off the device without waiting for it."""

from __future__ import annotations

import collections
import dataclasses
import time

import torch


@dataclasses.dataclass(frozen=True)
class Arrived:
    """The loss of a finished step, and whether its gradients overflowed."""

    step: int
    loss: float
    overflowed: bool


class LossLog:
    """Losses on their way from the device.

    On CUDA each step's numbers are copied to pinned memory behind the step's own kernels and picked up once the
    device has passed them, usually a step or two later. Elsewhere they are there at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._waiting: collections.deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = collections.deque()

    def push(self, step: int, result: torch.Tensor) -> None:
        """Remember a step's (loss, overflow flag), [2] fp32 on the device, which the next step may overwrite."""
        passed = None
        if not self._cuda:
            pair = result.clone()
        else:
            # The copy goes on the stream of the loss's card, an event on that of the thread's current one: they are the
            # same only if we say so (the WebUI's --device-id chooses a card without making it the current one).
            with torch.cuda.device(self._device):
                pair, passed = torch.empty(2, pin_memory=True), torch.cuda.Event()
                pair.copy_(result, non_blocking=True)
                passed.record()
        self._waiting.append((step, pair, passed))

    def arrived(self, *, wait: bool = False) -> list[Arrived]:
        """The steps that the device has finished, in order; with `wait`, all of them (one synchronisation)."""
        ready = []
        while self._waiting:
            step, pair, passed = self._waiting[0]
            if passed is not None and not passed.query():
                if not wait:
                    break
                passed.synchronize()
            self._waiting.popleft()
            loss, overflowed = pair.tolist()
            ready.append(Arrived(step, loss, bool(overflowed)))
        return ready


class Speed:
    """Steps per second over the last 20 steps, without the first: it pays for warming up."""

    def __init__(self) -> None:
        self._times: collections.deque[float] = collections.deque(maxlen=21)

    def tick(self) -> float | None:
        """Count one finished step; the speed, None before the third step."""
        self._times.append(time.perf_counter())
        if len(self._times) < 3:
            return None
        times = list(self._times)[1:] if len(self._times) < 21 else list(self._times)
        passed = times[-1] - times[0]
        return (len(times) - 1) / passed if passed > 0 else None
