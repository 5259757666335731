"""CUDA graphs: without a GPU torch's capture is replaced; on one, replayed steps equal those as written."""

from __future__ import annotations

import pytest
import torch

from lib_lora_train.training import loop
from lib_lora_train.training.cuda_graph import CudaGraphStep
from tests.training import small_run
from tests.training.small_run import SQUARE, WIDE, assert_equal, batch

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
BATCHES = [batch(i, rows=1 + (i % 5 == 4), shape=WIDE if i % 3 == 2 else SQUARE) for i in range(12)]


def capturing(monkeypatch, refused: tuple[int, ...] = ()) -> list[tuple[torch.Size, ...]]:
    """Let a run on the CPU capture: the n-th capture fails where it is `refused`; the shapes that were captured."""
    captured: list[tuple[torch.Size, ...]] = []

    def capture(module, inputs, allow_unused_input):
        captured.append(tuple(tensor.shape for tensor in inputs))
        module(*inputs).backward()  # warming up leaves gradients behind, as torch's does
        if len(captured) in refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        shapes = captured[-1]

        def replay(*tensors):
            assert tuple(tensor.shape for tensor in tensors) == shapes
            return module(*tensors)
        return replay
    monkeypatch.setattr(CudaGraphStep, "capture", staticmethod(capture))
    monkeypatch.setattr(loop, "TrainStep", CudaGraphStep)
    return captured


@pytest.mark.parametrize("text", [False, True])
def test_each_shape_is_captured_once_and_learns_the_same(monkeypatch, text):
    written = small_run.run("sd1", BATCHES, text=text, accumulation=2)
    captured = capturing(monkeypatch)
    graphed = small_run.run("sd1", BATCHES, text=text, accumulation=2)
    assert_equal(graphed, written, rtol=1e-6)
    assert 1 < len(captured) == len(set(captured)) and graphed.warnings == []


def test_a_capture_that_fails_leaves_those_that_exist_and_is_told_once(monkeypatch):
    written = small_run.run("sd1", BATCHES)
    captured = capturing(monkeypatch, refused=(2,))
    graphed = small_run.run("sd1", BATCHES)
    assert_equal(graphed, written, rtol=1e-6)
    assert len(captured) == 2 and len(graphed.warnings) == 1


def test_graphs_are_dropped_when_the_model_is_handed_over(monkeypatch):
    captured = capturing(monkeypatch)

    def hand_over(progress) -> bool:
        progress.release()
        return True
    small_run.run("sd1", [batch(i) for i in range(3)], before_step=hand_over)
    assert len(captured) == 3


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("family, options", [
    ("sd1", {"text": True, "min_snr": 5.0, "accumulation": 2}), ("sdxl", {"checkpointing": True}), ("sd1", {})],
    ids=["text encoder and accumulation", "sdxl", "plain"])
def test_fifty_replayed_steps_equal_fifty_as_written(dtype, family, options):
    batches = [batch(i, rows=1 + (i % 5 == 4), shape=WIDE if i % 3 == 2 else SQUARE)
               for i in range(50 * options.get("accumulation", 1))]
    written = small_run.run(family, batches, device="cuda", dtype=dtype, **options)
    replayed = small_run.run(family, batches, device="cuda", dtype=dtype, graphs=True, **options)
    assert replayed.warnings == []
    assert_equal(replayed, written, rtol=1e-3 if dtype == torch.float32 else 2e-2)


@cuda
def test_out_of_memory_on_a_gpu_only_makes_the_microbatches_smaller(monkeypatch):
    from lib_lora_train.training import train_step
    original, batches = train_step.denoising_loss, [batch(i, rows=3) for i in range(6)]
    plain = small_run.run("sd1", batches, device="cuda")

    def hungry(model, batch, **inputs):
        if len(batch) > 1:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return original(model, batch, **inputs)
    monkeypatch.setattr(train_step, "denoising_loss", hungry)
    smaller = small_run.run("sd1", batches, device="cuda")
    assert len(smaller.warnings) == 1
    assert_equal(smaller, plain, rtol=1e-3)
