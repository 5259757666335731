"""A batch cut into pieces is the same batch: where memory runs out, and where several processes share it."""

from __future__ import annotations

import pytest
import torch

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.errors import TrainingError
from lib_lora_train.training import device_step, loop
from lib_lora_train.training.microbatches import piece, pieces
from lib_lora_train.training.noise import draw
from lib_lora_train.training.step import StepInputs, StepOptions, denoising_loss, prepare
from tests.training import small_run
from tests.training.emulator import Emulator
from tests.training.small_run import WIDE, batch

BATCHES = [batch(i, rows=rows, shape=WIDE, caption="a cat " * (1 + 30 * (i % 3 == 1)))
           for i, rows in enumerate((1, 5, 2, 4, 5, 5, 1, 3))]


def inputs(rows: int) -> StepInputs:
    one = batch(7, rows=rows)
    draws = draw(one.mean.shape, seed=1, step=1, micro=0, timesteps=1000)
    ids = small_run.model("sdxl").text.ids([small_run.model("sdxl").text.tokenize(caption) for caption in one.captions])
    return prepare(one, draws=draws, text=ids)


@pytest.mark.parametrize("most, sizes", [(None, [5]), (5, [5]), (4, [2, 3]), (2, [1, 2, 2]), (1, [1] * 5)])
def test_pieces_are_few_equal_and_together_the_whole(most, sizes):
    whole = inputs(5)
    cut = list(pieces(whole, most))
    assert [len(part) for part in cut] == sizes
    for part, tensors in enumerate(zip(*(part.tensors() for part in cut), strict=True)):
        assert torch.equal(torch.cat(tensors), whole.tensors()[part])
    assert list(pieces(piece(whole, slice(2, 2)), most)) == []


@pytest.mark.parametrize("rows", [[slice(0, 2), slice(2, 5)], [slice(0, 0), slice(0, 1), slice(1, 5)]])
def test_gradients_and_losses_of_the_rows_add_up_to_those_of_the_batch(rows):
    """Also where a process gets no row at all."""
    model, whole = small_run.model("sdxl"), inputs(5)

    def gradients(parts: list[StepInputs]) -> tuple[torch.Tensor, float]:
        network = AdapterNetwork.build(find_targets(model.components, family=model.architecture.family, text_encoder=True), rank=2, alpha=2, seed=0)
        for layer in network.layers.values():
            layer.up.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        weights, total = network.flatten(1e-3, 1e-3), 0.0
        for part in parts:
            adapters = network.adapters()
            loss = denoising_loss(
                model, inputs=part, conditioning=model.text.encode_ids(part.text, adapters=adapters), adapters=adapters["unet"],
                options=StepOptions(dtype=torch.float32, min_snr_gamma=5.0, recompute=frozenset()))
            loss.backward()
            total += loss.item()
        return weights.gradient, total
    together, loss = gradients([whole])
    apart, sum_of_losses = gradients([one for one in (piece(whole, part) for part in rows) if len(one)])
    assert sum_of_losses == pytest.approx(loss, rel=1e-5)
    assert (apart - together).abs().max() < 1e-5 * together.abs().max()


def running_out(monkeypatch, *, above: int, error: Exception) -> list[int]:
    """Let losses of more rows than that fail; the sizes that were tried."""
    original, tried = device_step.denoising_loss, []

    def limited(*args, **kwargs):
        tried.append(len(kwargs["inputs"]))
        if tried[-1] > above:
            raise error
        return original(*args, **kwargs)
    monkeypatch.setattr(device_step, "denoising_loss", limited)
    return tried


@pytest.fixture(scope="module")
def unharmed() -> small_run.Result:
    """What a run learns that has memory enough."""
    return small_run.run("sd1", BATCHES, accumulation=2)


@pytest.mark.parametrize("error, recorded", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True), (MemoryError(), False),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), False),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), False)],
    ids=["card", "python", "cuBLAS", "cpu on Windows", "cpu"])
def test_where_memory_runs_out_the_run_goes_on_in_smaller_pieces_and_learns_the_same(monkeypatch, unharmed, error, recorded):
    recorder = Emulator()
    if recorded:
        monkeypatch.setattr(loop, "recorder_for", lambda device, wanted: recorder)
    tried = running_out(monkeypatch, above=1, error=error)
    pieced = small_run.run("sd1", BATCHES, accumulation=2)
    small_run.assert_equal(pieced, unharmed)
    # The first micro-batch has one row, the second five, then three at most, then two at most, then one. As soon as there is
    # a recording, what is too much is tried once more without.
    assert [rows for rows in tried if rows > 1] == ([5, 2, 2, 2, 2] if recorded else [5, 2, 2])
    assert len(pieced.warnings) == 1 and "5 pictures at once" in pieced.warnings[0]
    assert recorder.forgot == (5 if recorded else 0) and bool(recorder.held) == recorded


def test_one_picture_too_much_is_the_end_and_says_what_helps(monkeypatch):
    running_out(monkeypatch, above=0, error=torch.cuda.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(TrainingError, match="memory ran out while training.*gradient checkpointing"):
        small_run.run("sd1", BATCHES)


def test_another_error_is_not_taken_for_a_full_memory(monkeypatch):
    tried = running_out(monkeypatch, above=1, error=RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        small_run.run("sd1", BATCHES)
    assert tried == [1, 5]
