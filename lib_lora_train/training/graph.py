"""The step recorded once and replayed: on CUDA the host then launches one graph instead of thousands of kernels.

A recording is made for each shape of inputs (bucket, batch size, length of the captions), one more for the end of a step. It
reads and writes buffers that stay where they are: the inputs' staging buffers, the frozen weights, the flat LoRA weights,
moments and gradients, the loss scaler, the learning rate. Where one of these moves, as the model does when others had it,
all recordings are dropped and made anew. What cannot be recorded runs as it is written (eager), with the same numbers; why is
reported once.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch

from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.events import Report, Warned
from lib_lora_train.training.staging import Shapes, Staging, shapes_of
from lib_lora_train.training.step import StepInputs
from lib_lora_train.training.work import Work

# Recordings kept: they share one pool of memory, as large as the largest needs, but each holds its list of kernels (some tens
# of megabytes for SDXL) and its input buffers.
MOST_SHAPES = 24

Replay = Callable[[], None]


class Recorder(Protocol):
    """What records work on a device. Between two recordings nothing may be left that only lives in one of them."""

    def warm(self, function: Callable[[], None]) -> None:
        """Run `function`, so that what happens on first use only (handles, choice of kernels) is behind it."""

    def record(self, function: Callable[[], None]) -> Replay:
        """Run `function` and return what does the same work again on the same tensors.

        Raises RuntimeError where that is not possible; nothing has been run then.
        """

    def forget(self) -> None:
        """Give back the memory of recordings that are no longer held."""


class CudaRecorder:
    """CUDA graphs (torch >= 2.1) in one memory pool, recorded on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], None]) -> None:
        """Run it on the stream of the recordings, between what is enqueued before and after."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                function()
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Replay:
        """Capture and replay once. Only this thread is kept from what a capture forbids: the WebUI has others."""
        with torch.cuda.device(self._device):
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Waits for the device, once for each recording.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    function()
            except RuntimeError:
                torch.cuda.set_stream(current)       # older torch stays on the other one where a capture fails
                self._stream = torch.cuda.Stream()   # and may not have let go of it
                raise

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()
        replay()
        return replay

    def forget(self) -> None:
        """Free the pool; the next recording gets another."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # a graph in flight must not lose its memory
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()


def recorder_for(device: torch.device, *, wanted: bool) -> Recorder | None:
    """What records steps on this device; None where they run as they are written (also on AMD's cards: nobody has tried)."""
    if not wanted or device.type != "cuda" or torch.version.hip is not None:
        return None
    return CudaRecorder(device)


class Execution:
    """Does the `work` of a step: replayed where there is a recorder, else as it is written."""

    def __init__(self, work: Work, recorder: Recorder | None, *, report: Report, most_shapes: int = MOST_SHAPES) -> None:
        self._work, self._recorder, self._report, self._most_shapes = work, recorder, report, most_shapes
        self._staging: OrderedDict[Shapes, Staging] = OrderedDict()  # least recently used first
        self._replays: dict[Shapes | None, Replay] = {}              # None: the end of a step
        self._warm: set[Shapes | None] = set()
        self._result: torch.Tensor | None = None

    def gradients(self, inputs: StepInputs) -> None:
        """As `Work.gradients`, for inputs on the CPU or wherever they are."""
        if self._recorder is None and self._work.device.type == "cpu":
            self._work.gradients(inputs)
            return
        shapes = shapes_of(inputs)
        staging = self._staging.pop(shapes, None) or Staging(shapes, self._work.device)
        self._staging[shapes] = staging
        staging.fill(inputs)
        self._run(shapes, lambda: self._work.gradients(staging.inputs))
        if len(self._staging) > self._most_shapes:
            oldest, _ = self._staging.popitem(last=False)
            self._replays.pop(oldest, None)
            self._warm.discard(oldest)

    def finish(self) -> torch.Tensor:
        """As `Work.finish`."""
        def finish() -> None:
            self._result = self._work.finish()
        if self._work.waits:
            finish()
        else:
            self._run(None, finish)
        assert self._result is not None
        return self._result

    def clear(self) -> None:
        """As `Work.clear`."""
        self._work.clear()

    def let_go(self) -> None:
        """Drop recordings and buffers: memory is needed, or what they were made of moves."""
        self._staging.clear()
        self._replays.clear()
        gc.collect()
        if self._recorder is not None:
            self._recorder.forget()
        elif self._work.device.type == "cuda":
            with torch.cuda.device(self._work.device):
                torch.cuda.empty_cache()

    def _run(self, key: Shapes | None, function: Callable[[], None]) -> None:
        """Replay; at the second time record; at the first just run, so that the recording meets nothing new."""
        recorder = self._recorder
        if recorder is None:
            function()
        elif key in self._replays:
            self._replays[key]()
        elif key not in self._warm and (key is None or not self._warm - {None} or self._chooses_kernels()):
            recorder.warm(function)
            self._warm.add(key)
        else:
            self._record(recorder, key, function)

    def _chooses_kernels(self) -> bool:
        """Whether the first run of every shape does what no recording may. Without that, only the first shape of a run is
        warmed up: later ones would take their memory twice, in the recordings' pool and outside."""
        return self._work.compiles or torch.backends.cudnn.benchmark

    def _record(self, recorder: Recorder, key: Shapes | None, function: Callable[[], None]) -> None:
        try:
            self._replays[key] = recorder.record(function)
            return
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            if key not in self._warm:  # perhaps this shape has a first time of its own
                lines = []
            else:
                lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines:
            self.let_go()
            self._recorder = None
            self._report(Warned(f"The step runs without CUDA graphs, which is slower: {lines[0]}"))
            function()
        else:
            recorder.warm(function)
            self._warm.add(key)
