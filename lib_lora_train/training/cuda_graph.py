"""The step recorded once and replayed: on CUDA the host then launches one graph instead of thousands of kernels.

A recording is made for each shape of inputs (bucket, batch size, length of the captions), one more for the end of a step. It
reads and writes buffers that stay where they are: the inputs' staging buffers, the frozen weights, the flat LoRA weights,
moments and gradients, the loss scaler, the learning rate. Where one of these moves, as the model does when others had it,
all recordings are dropped and made anew. What cannot be recorded runs as it is written (eager), with the same numbers; why is
reported once.

Recordings are dropped all together, never one alone: they share a stream, and torch from 2.12 on (PR 175276) frees the cuBLAS
workspace of that stream, which the others still name, with the first that goes (issue 193402).
"""

from __future__ import annotations

import contextlib
import gc
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch

from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.events import Report, Warned
from lib_lora_train.training.device_step import Work
from lib_lora_train.training.staging import Shapes, Staging, shapes_of
from lib_lora_train.training.step import StepInputs

# Shapes that are recorded; what comes after them runs as it is written. Recordings share one pool of memory, as large as the
# largest needs, but each holds its list of kernels (some tens of megabytes for SDXL) and its input buffers.
MOST_SHAPES = 24

TOO_SMALL = "the memory is too small for recordings."

Replay = Callable[[], None]


class Recorder(Protocol):
    """What records work on a device. Between two recordings nothing may be left that only lives in one of them."""

    def warm(self, function: Callable[[], None]) -> None:
        """Run `function`, so that what happens on first use only (handles, choice of kernels) is behind it."""

    def roomy(self) -> bool:
        """Whether `warm`, whose memory is not that of the recordings, has room beside them."""

    def record(self, function: Callable[[], None]) -> Replay:
        """Run `function` and return what does the same work again on the same tensors.

        Raises RuntimeError where that is not possible; nothing has been run then, and the device is fit for other work.
        """

    def forget(self) -> None:
        """Give back the memory of recordings that are no longer held."""


# The stream of each device's recordings, for as long as the process lives: torch keeps a workspace of cuBLAS for every stream
# that ever multiplied. It is replaced only after a capture that CUDA invalidated.
_streams: dict[int, torch.cuda.Stream] = {}
# Graphs that failed while older torch's allocators were still asking them; see `_end_invalid`.
_invalid: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """CUDA graphs (torch >= 2.1) in one memory pool, recorded on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._index, self._pool = torch.cuda.current_device(), torch.cuda.graph_pool_handle()
        self._held = 0  # bytes of the pool
        self._leaked = False  # whether torch may have forgotten that a failed capture named the pool

    @property
    def _stream(self) -> torch.cuda.Stream:
        if self._index not in _streams:
            with torch.cuda.device(self._device):
                _streams[self._index] = torch.cuda.Stream()
        return _streams[self._index]

    def warm(self, function: Callable[[], None]) -> None:
        """Run it on the stream of the recordings, between what is enqueued before and after."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                function()
            current.wait_stream(self._stream)

    def roomy(self) -> bool:
        """A run takes about as much again as the pool has, which no run outside of a capture may use."""
        return torch.cuda.mem_get_info(self._device)[0] > self._held

    def record(self, function: Callable[[], None]) -> Replay:
        """Capture and replay once. Only this thread is kept from what a capture forbids: the WebUI has others."""
        with torch.cuda.device(self._device):
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Waits for the device, once for each recording.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    function()
                    self._held += torch.cuda.memory_reserved() - before
            except RuntimeError:
                torch.cuda.set_stream(current)  # older torch stays on the other one where a capture fails
                self._leaked |= _end_invalid(graph, self._pool, index=self._index)
                torch.cuda.set_stream(current)
                raise

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()
        replay()
        return replay

    def forget(self) -> None:
        """Free the pool; the next recording gets another."""
        with torch.cuda.device(self._device):
            pool, self._pool, self._held = self._pool, torch.cuda.graph_pool_handle(), 0
            leaked, self._leaked = self._leaked, False
            torch.cuda.synchronize()  # a graph in flight must not lose its memory
            torch.cuda.empty_cache()
            # A pool that no graph names has no idle segments left now. Where it has, nobody else will give them back (torch
            # before PR 190348); once too often would end the process.
            if leaked and any(tuple(segment["segment_pool_id"]) == tuple(pool) and not segment["active_size"]
                              for segment in torch.cuda.memory_snapshot()):
                torch._C._cuda_releasePool(self._index, pool)
                torch.cuda.empty_cache()


def _end_invalid(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], *, index: int) -> bool:
    """Put right what torch leaves half done where CUDA invalidated a capture. Raises nothing. Whether the pool's memory may
    still be kept for it.

    Up to torch 2.12 (before PR 180395) `capture_end` raises before the allocator and the default random generator hear of the
    end: `empty_cache` and random numbers on the card then fail for as long as the process lives.
    """
    try:
        graph.pool()
        return False  # it was sound to its end: what failed was something else, such as a full memory
    except RuntimeError:
        pass
    stream, ended = _streams.pop(index, None), False  # CUDA may not have let go of the stream
    with contextlib.suppress(AttributeError, RuntimeError):
        if ended := _ended(pool, index=index, stream=stream):
            # Such a torch neither gives the pool back nor stops asking the graph, by its address, what is captured.
            _invalid.append(graph)
            torch._C._cuda_releasePool(index, pool)
    with contextlib.suppress(RuntimeError):
        # A capture that succeeds takes the generator along, out of the one that did not.
        number, blank = torch.zeros(1, device=f"cuda:{index}"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(blank, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            number.zero_()
    return not ended


def _ended(pool: tuple[int, int], *, index: int, stream: torch.cuda.Stream | None) -> bool:
    """Tell the allocator that the capture into `pool` is over. False where it knew that."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None) or torch._C._cuda_endAllocateCurrentStreamToPool
    try:
        end(index, pool)
        return True
    except RuntimeError:  # no capture into it is under way
        return False
    except TypeError:  # torch 2.1 is told the stream instead, and does not look whether there is a capture on it
        pass
    try:
        torch.cuda.empty_cache()
        return False
    except RuntimeError:  # refused while there is one
        with torch.cuda.stream(stream):
            end(index)
        return True


def recorder_for(device: torch.device, *, wanted: bool) -> Recorder | None:
    """What records steps on this device; None where they run as they are written (also on AMD's cards: nobody has tried)."""
    if not wanted or device.type != "cuda" or torch.version.hip is not None:
        return None
    return CudaRecorder(device)


class Execution:
    """Does the `work` of a step: replayed where there is a recorder, else as it is written."""

    def __init__(self, work: Work, recorder: Recorder | None, *, report: Report, most_shapes: int = MOST_SHAPES) -> None:
        self._work, self._recorder, self._report, self._most_shapes = work, recorder, report, most_shapes
        self._first_runs_differ = False  # whether the first run of a shape was seen to do what no recording may
        self.suspended, self._overfull = False, False
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
            unrecorded = next((kept for kept in self._staging if kept not in self._replays), None)
            if unrecorded is not None:
                del self._staging[unrecorded]

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

    def recompute(self) -> bool:
        """As `Work.recompute`. Recordings made before it are to be dropped."""
        return self._work.recompute()

    @property
    def crowded(self) -> bool:
        """Whether recordings, made or tried, may be what fills the memory."""
        return self._overfull or bool(self._replays.keys() - {None})

    def suspend(self) -> None:
        """Drop recordings and make none, until `resume` or `record_no_more`."""
        self.suspended, self._overfull = True, False
        with contextlib.suppress(RuntimeError):  # what a device still refuses after a recording failed is no reason to stop
            self.release()

    def resume(self) -> None:
        """Let go of what there is, and record again."""
        self.suspended = False
        self.release()

    def record_no_more(self, why: str) -> None:
        """From now on all runs as it is written, which is reported; recordings are dropped."""
        recorder, self._recorder, self.suspended = self._recorder, None, False
        self._report(Warned(f"The step runs without CUDA graphs, which is slower: {why}"))
        self._staging.clear()
        self._replays.clear()
        gc.collect()
        with contextlib.suppress(RuntimeError):  # as in `suspend`
            if recorder is not None:
                recorder.forget()

    def release(self) -> None:
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
        """Replay what is recorded. Else record it, if it was run before or need not be; at first just run it.

        Where there is room, every shape is run before it is recorded, so that the recording meets nothing new. Where there is
        none, only the first of a run is: the others would take their memory twice, in the recordings' pool and outside.
        """
        recorder = self._recorder
        if recorder is None:
            function()
        elif key in self._replays:
            self._replays[key]()
        elif self.suspended or self._full(key) or key not in self._warm and self._runs_first(key, recorder):
            recorder.warm(function)
            self._warm.add(key)
        else:
            self._record(recorder, key, function)

    def _full(self, key: Shapes | None) -> bool:
        return key is not None and len(self._replays.keys() - {None}) >= self._most_shapes

    def _runs_first(self, key: Shapes | None, recorder: Recorder) -> bool:
        differ = self._first_runs_differ or self._work.compiles or torch.backends.cudnn.benchmark
        return key is None or differ or not self._warm - {None} or recorder.roomy()

    def _record(self, recorder: Recorder, key: Shapes | None, function: Callable[[], None]) -> None:
        try:
            self._replays[key] = recorder.record(function)
            return
        except RuntimeError as error:
            why, full = _reason(error)
            if full and key is not None:
                self._overfull = True
                raise MemoryError(why) from error
        # Outside of the except clause: the error held the frames, and these tensors in the recordings' memory. Nothing of
        # `function` has been run.
        if key in self._warm:
            self.record_no_more(why)
            function()
        else:  # perhaps this shape has a first time of its own, and so will others
            self._first_runs_differ = True
            self.release()
            recorder.warm(function)
            self._warm.add(key)


def _reason(error: RuntimeError) -> tuple[str, bool]:
    """(why a recording failed, whether the memory was full). What ended a capture says more than that it was ended."""
    first = error.__context__ or error
    lines = str(first).strip().splitlines() or [type(first).__name__]
    full = is_out_of_memory(first) or is_out_of_memory(error)
    return TOO_SMALL if full else lines[0], full
