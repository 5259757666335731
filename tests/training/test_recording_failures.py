"""Where a recording fails, or its memory is too much: the run goes on as it is written, and the card is fit for others."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from functools import partial

import pytest
import torch

from lib_lora_train.training import cuda_graph, device_step, loop
from lib_lora_train.training.cuda_graph import CudaRecorder, Execution
from lib_lora_train.training.staging import Shapes, shapes_of
from tests.training import small_run
from tests.training.emulator import Emulator
from tests.training.small_run import SQUARE, WIDE, assert_equal, batch

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

BATCHES = [batch(i, rows=1 + i // 4, shape=WIDE if i % 4 > 1 else SQUARE) for i in range(8)]
"""Four shapes, each twice in a row."""

FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.fixture(scope="module")
def written_out() -> small_run.Result:
    """What a run learns that records nothing and has memory enough."""
    return small_run.run("sd1", BATCHES)


def ended_by(cause: Exception) -> RuntimeError:
    """What torch raises at the end of a capture that `cause` has ended before."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


@pytest.mark.parametrize("refusal, why", [
    (RuntimeError("CUDA error: operation not permitted\nmore lines"), "CUDA error: operation not permitted"),
    (ended_by(RuntimeError("CUDA error: operation not permitted")), "CUDA error: operation not permitted"),
    (FULL, "the memory is too small for recordings."), (ended_by(FULL), "the memory is too small for recordings.")],
    ids=["refused", "ended", "memory full", "ended by a full memory"])
def test_what_cannot_be_recorded_runs_as_written_even_where_the_recorder_is_stuck(monkeypatch, written_out, refusal, why):
    recorder = Emulator(refuse=refusal, stuck=RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED"))
    monkeypatch.setattr(loop, "recorder_for", lambda device, wanted: recorder)
    refused = small_run.run("sd1", BATCHES)
    assert_equal(refused, written_out)
    assert refused.warnings == [f"The step runs without CUDA graphs, which is slower: {why}"]
    assert recorder.recorded == 0 and recorder.forgot == (2 if "memory" in why else 1)


def test_shapes_beyond_those_that_are_kept_run_as_written_and_no_recording_is_dropped_for_them(monkeypatch):
    batches = [batch(i, rows=1 + i % 3) for i in range(12)]
    plain, recorder = small_run.run("sd1", batches, graphs=False), Emulator()
    monkeypatch.setattr(loop, "recorder_for", lambda device, wanted: recorder)
    monkeypatch.setattr(loop, "Execution", partial(Execution, most_shapes=2))
    recorded = small_run.run("sd1", batches)
    assert_equal(recorded, plain)
    # Two of three shapes and, where the optimiser needs no answer, the end of a step.
    assert recorder.recorded in (2, 3) and recorder.replayed >= 4 and recorder.forgot == 0
    assert recorded.warnings == []


def failing(monkeypatch, fails) -> list[int]:
    """Let the losses fail for which `fails(shapes of the inputs, options)` has an error; the rows of all that were tried."""
    original, tried = device_step.denoising_loss, []

    def loss(*args, **kwargs):
        tried.append(len(kwargs["inputs"]))
        error = fails(shapes_of(kwargs["inputs"]), kwargs["options"])
        if error is not None:
            raise error
        return original(*args, **kwargs)
    monkeypatch.setattr(device_step, "denoising_loss", loss)
    return tried


def test_where_only_recordings_fill_the_memory_they_are_given_up_and_the_batch_stays_whole(monkeypatch, written_out):
    recorder = Emulator()
    monkeypatch.setattr(loop, "recorder_for", lambda device, wanted: recorder)
    tried = failing(monkeypatch, lambda shapes, options: FULL if len(tried) > 5 and recorder.held else None)
    freed = small_run.run("sd1", BATCHES)
    assert_equal(freed, written_out)
    assert freed.warnings == ["The step runs without CUDA graphs, which is slower: the memory is too small for recordings."]
    assert sorted(tried[-4:]) == [2, 2, 2, 2] and recorder.held == 0


def test_one_picture_too_much_is_tried_again_with_all_that_can_be_recomputed(monkeypatch):
    batches, units = [batch(i) for i in range(3)], frozenset(small_run.model("sd1").unet.checkpointable)
    plain = small_run.run("sd1", batches)
    tried = failing(monkeypatch, lambda shapes, options: None if options.recompute == units else FULL)
    recomputed = small_run.run("sd1", batches)
    assert_equal(recomputed, plain)
    assert len(recomputed.warnings) == 1 and "goes on with gradient checkpointing" in recomputed.warnings[0]
    assert tried == [1] * 4


def test_a_shape_whose_first_run_cannot_be_recorded_is_run_first_and_so_are_all_after_it(monkeypatch, written_out):
    """Without room beside the recordings, shapes after the first are recorded at once."""
    recorder, met, refused = Emulator(room=False), set(), Counter()
    monkeypatch.setattr(loop, "recorder_for", lambda device, wanted: recorder)

    def first_times(shapes: Shapes, options) -> RuntimeError | None:
        if recorder.recording and shapes not in met:
            refused[shapes] += 1
            return RuntimeError("CUDA error: operation not permitted when stream is capturing")
        met.add(shapes)
        return None
    failing(monkeypatch, first_times)
    recorded = small_run.run("sd1", BATCHES)
    assert_equal(recorded, written_out)
    assert recorded.warnings == [] and len(met) == 4 and sum(refused.values()) == 1
    assert recorder.recorded >= 4 and recorder.forgot == 1


class Card:
    """What torch's allocator and generator remember of captures, as torch of a `kind` leaves it where CUDA ends one.

    2.1, 2.11   nobody hears of the end, and `empty_cache` is refused for ever
    2.13        the allocator hears of it, the pool stays named
    newest      both are put right
    """

    def __init__(self, monkeypatch, kind: str) -> None:
        self.kind, self.invalid = kind, False
        self.named: Counter[tuple[int, int]] = Counter()
        self.under_way: dict[tuple[int, int], str] = {}
        self.generator_captured = False
        self.streams, self.made, self.emptied = ["the caller's"], 0, 0
        card, pools = self, iter(range(1, 99))

        class Graph:
            sound, memory = False, (0, 0)

            def pool(self) -> tuple[int, int]:
                if not self.sound:
                    raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
                return self.memory

            def replay(self) -> None:
                assert self.sound

            def __del__(self) -> None:
                if self.memory != (0, 0) and (self.sound or kind == "newest"):
                    card.named[self.memory] -= 1

        class Capture:
            def __init__(self, graph, *, stream, capture_error_mode, pool=None) -> None:
                assert capture_error_mode == "thread_local"  # other threads may do as they like
                self.graph, self.stream = graph, stream
                self.pool = pool or (next(pools), 0)

            def __enter__(self) -> None:
                card.empty_cache()
                card.streams.append(self.stream)
                card.named[self.pool] += 1
                card.under_way[self.pool] = self.stream
                card.generator_captured, self.graph.memory = True, self.pool

            def __exit__(self, *_) -> None:
                if card.invalid:
                    card.invalid = False
                    if kind in ("2.13", "newest"):
                        del card.under_way[self.pool]
                    raise RuntimeError("the capture was invalidated")  # and the stream of the capture stays current
                del card.under_way[self.pool]
                card.generator_captured, self.graph.sound = False, True
                card.streams.pop()
        zeros = torch.zeros
        for owner, replacements in (
                (torch, {"zeros": lambda *size, device: zeros(*size)}),
                (cuda_graph, {"_streams": {}, "_invalid": []}),
                (torch.cuda, {"device": lambda device: contextlib.nullcontext(), "current_device": lambda: 0,
                              "Stream": self.new_stream, "stream": self.on, "current_stream": lambda: self.streams[-1],
                              "set_stream": self.streams.append, "synchronize": lambda: None, "CUDAGraph": Graph,
                              "graph": Capture, "graph_pool_handle": lambda: (0, next(pools)),
                              "memory_reserved": lambda: 0, "memory_snapshot": self.segments,
                              "empty_cache": self.empty_cache})):
            for name, replacement in replacements.items():
                monkeypatch.setattr(owner, name, replacement)
        old = kind in ("2.1", "2.11")
        monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateCurrentStreamToPool" if old else "_cuda_endAllocateToPool",
                            self.end_on_stream if kind == "2.1" else self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def new_stream(self) -> str:
        self.made += 1
        return f"stream {self.made}"

    @contextlib.contextmanager
    def on(self, stream: str):
        self.streams.append(stream)
        yield
        self.streams.pop()

    def segments(self) -> list[dict]:
        return [{"segment_pool_id": pool, "active_size": 0} for pool, names in self.named.items() if names]

    def empty_cache(self) -> None:
        self.emptied += 1
        if self.under_way:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if self.under_way.pop(pool, None) is None:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def end_on_stream(self, device: int) -> None:
        [pool] = [pool for pool, stream in self.under_way.items() if stream == self.streams[-1]]
        del self.under_way[pool]

    def release(self, device: int, pool: tuple[int, int]) -> None:
        self.named[pool] -= 1

    def refuses(self, recorder: CudaRecorder, error: Exception | None = None) -> str:
        """What a recording raises that CUDA invalidates, or that ends with `error`."""
        def function() -> None:
            self.invalid = error is None
            if error is not None:
                raise error
        try:
            recorder.record(function)
        except RuntimeError as raised:
            return str(raised)
        return ""

    def assert_fit_for_others(self) -> None:
        gc.collect()
        assert not self.under_way and not self.generator_captured and self.streams[-1] == "the caller's"
        assert not any(self.named.values()), self.named
        self.empty_cache()


KINDS = ["2.1", "2.11", "2.13", "newest"]


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_invalid_capture_the_card_is_fit_for_others_and_for_another_recording(monkeypatch, kind):
    card = Card(monkeypatch, kind)
    recorder = CudaRecorder(torch.device("cuda", 0))
    kept, used = recorder.record(lambda: None), []
    assert card.refuses(recorder) == "the capture was invalidated"
    del kept
    gc.collect()
    recorder.forget()
    card.assert_fit_for_others()
    replay = recorder.record(lambda: used.append(card.streams[-1]))
    replay()
    assert used[0] not in ("stream 1", "the caller's")  # CUDA may still hold the one of the capture that failed
    del replay
    recorder.forget()
    card.assert_fit_for_others()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_memory_invalidates_no_capture_and_all_recorders_of_a_card_share_a_stream(monkeypatch, kind):
    card, used = Card(monkeypatch, kind), []
    assert card.refuses(CudaRecorder(torch.device("cuda", 0)), FULL) == str(FULL)
    FULL.__traceback__ = None  # its frames hold the graph
    for _ in range(2):
        recorder = CudaRecorder(torch.device("cuda", 0))
        recorder.record(lambda: used.append(card.streams[-1]))
        recorder.forget()
    assert used == ["stream 1"] * 2
    card.assert_fit_for_others()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_a_recording_still_names_is_not_given_back_a_second_time(monkeypatch, kind):
    card = Card(monkeypatch, kind)
    recorder = CudaRecorder(torch.device("cuda", 0))
    kept = recorder.record(lambda: None)
    recorder.forget()
    kept()
    assert sum(card.named.values()) == 1
    del kept
    card.assert_fit_for_others()


def test_torch_compile_makes_kernels_for_more_shapes_than_newer_torch_does_by_itself():
    def twice(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2

    def backend(traced, inputs):
        made.append(inputs)
        return traced.forward
    try:
        compiled, made = torch.compile(twice, dynamic=False, backend=backend), []
    except RuntimeError as error:
        pytest.skip(str(error))
    with device_step._many_shapes():
        for size in range(1, 21):
            compiled(torch.zeros(size, 2))
    torch._dynamo.reset()
    assert len(made) == 20


@cuda
def test_what_cannot_be_captured_leaves_the_card_fit_for_others(monkeypatch):
    batches = [batch(i) for i in range(4)]
    plain, original = small_run.run("sd1", batches, device="cuda", graphs=False), device_step.denoising_loss

    def waiting(*args, **kwargs):
        loss = original(*args, **kwargs)
        assert loss.item() > 0
        return loss
    monkeypatch.setattr(device_step, "denoising_loss", waiting)
    refused = small_run.run("sd1", batches, device="cuda")
    assert_equal(refused, plain, rtol=1e-3)
    assert len(refused.warnings) == 1 and "without CUDA graphs" in refused.warnings[0]
    del refused, plain
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.isfinite(torch.randn(1, device="cuda")).all()
    assert [one for one in torch.cuda.memory_snapshot() if tuple(one["segment_pool_id"]) != (0, 0)] == []
    monkeypatch.setattr(device_step, "denoising_loss", original)
    assert small_run.run("sd1", batches, device="cuda").warnings == []


@cuda
def test_more_shapes_than_are_recorded_equal_those_written_out(monkeypatch):
    batches = [batch(i, rows=1 + i % 4) for i in range(32)]
    plain = small_run.run("sd1", batches, device="cuda", graphs=False)
    monkeypatch.setattr(loop, "Execution", partial(Execution, most_shapes=2))
    recorded = small_run.run("sd1", batches, device="cuda")
    assert_equal(recorded, plain, rtol=1e-3)
    assert recorded.warnings == []
