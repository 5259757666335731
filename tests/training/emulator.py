"""What a CUDA graph does, on a CPU: the operations of one run are remembered and done again on the very same storages.

So it goes wrong where a graph would: a tensor that was put in another's place is not seen, a Python number stays what it was
at the recording, and whatever would have to wait for the device fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# They read a value back from the device, or bring one there from ordinary memory: neither can be captured.
FORBIDDEN = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
             aten.lift_fresh.default, aten.lift_fresh_copy.default}


class Waited(AssertionError):
    """An operation that cannot be captured was met."""


class Recording(TorchDispatchMode):
    """Remembers each operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in FORBIDDEN:
            raise Waited(f"{func} in a step that is recorded")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do all of it again; results go where they went at the recording."""
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            returned = zip(func._schema.returns, _listed(results), _listed(again))  # noqa: B905  (some return nothing)
            for declared, old, new in returned:
                # A view of an argument, or an argument that was written to, is up to date already.
                if declared.alias_info is None and isinstance(old, torch.Tensor) and old.numel():
                    old.detach().copy_(new)


class Emulator:
    """A `Recorder`. `recorded` and `replayed` count, `held` are recorded since `forget` was called; `recording` is whether it
    is at it. `refuse` is raised in place of recordings, `stuck` where they are forgotten; `room` is there beside them."""

    def __init__(self, refuse: Exception | None = None, *, stuck: Exception | None = None, room: bool = True) -> None:
        self.warmed = self.recorded = self.replayed = self.forgot = self.held = 0
        self.recording = False
        self._refuse, self._stuck, self._room = refuse, stuck, room

    def warm(self, function: Callable[[], None]) -> None:
        self.warmed += 1
        function()

    def roomy(self) -> bool:
        return self._room

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        if self._refuse is not None:
            raise self._refuse
        self.recording = True
        try:
            with Recording() as recording:
                function()
        finally:
            self.recording = False
        self.recorded += 1
        self.held += 1

        def replay() -> None:
            self.replayed += 1
            recording.replay()
        return replay

    def forget(self) -> None:
        self.forgot += 1
        self.held = 0
        if self._stuck is not None:
            raise self._stuck


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]
