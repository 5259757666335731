"""What is known of the weights is remembered for as long as they are the same, and no longer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lib_lora_train.model.fingerprint import Fingerprints, sampled_fingerprint


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.nn.Parameter(torch.randn(7, 9, generator=generator)), "b": torch.randn(5, generator=generator).half()}


class Reading:
    """Counts how often everything is read; the answer is a number for each set of weights."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, tensors: dict[str, Tensor]) -> str:
        self.seen.append(sum(float(tensor.detach().double().sum()) for tensor in tensors.values()))
        return str(self.seen[-1])


def test_the_same_weights_are_read_once():
    reading, tensors = Reading(), weights()
    fingerprints = Fingerprints(reading)
    # The mapping is made anew for each run; the tensors in it are the host's.
    answers = {fingerprints.of(dict(tensors)) for _ in range(3)}
    assert len(reading.seen) == 1 and answers == {str(reading.seen[0])}


def test_the_same_weights_moved_elsewhere_and_back_are_not_read_again():
    reading, tensors = Reading(), weights()
    fingerprints = Fingerprints(reading)
    fingerprints.of(tensors)
    for tensor in tensors.values():
        tensor.data = tensor.data.clone()
    fingerprints.of(tensors)
    assert len(reading.seen) == 1


def written(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        tensors["a"][3, 4] += 1  # at none of the places that are sampled
    return tensors


def written_past_the_count(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["a"].data.mul_(2)
    return tensors


@pytest.mark.parametrize("change", [
    written, written_past_the_count, lambda t: {**t, "b": t["b"].clone()}, lambda t: {"a": t["a"]},
    lambda t: {"a": t["a"], "c": t["b"]}, lambda t: {**t, "c": torch.ones(1)}],
    ids=["written to", "written past torch's count", "another object", "one less", "another name", "one more"])
def test_whatever_may_have_changed_is_read_again(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]):
    reading, tensors = Reading(), weights()
    fingerprints = Fingerprints(reading)
    fingerprints.of(tensors)
    changed = change(tensors)
    answer = fingerprints.of(changed)
    assert len(reading.seen) == 2 and answer == Reading()(changed)


def test_what_torch_does_not_count_is_never_remembered():
    reading = Reading()
    fingerprints = Fingerprints(reading)
    with torch.inference_mode():
        tensors = {"a": torch.randn(3)}
    fingerprints.of(tensors), fingerprints.of(tensors)
    assert len(reading.seen) == 2


def test_nothing_is_kept_alive():
    import gc
    import weakref

    fingerprints, tensors = Fingerprints(Reading()), weights()
    fingerprints.of(tensors)
    watched = [weakref.ref(tensor) for tensor in tensors.values()]
    del tensors
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_a_sample_tells_names_shapes_formats_and_numbers_apart():
    tensors = weights()
    told = [tensors, {"a": tensors["a"], "c": tensors["b"]}, {**tensors, "a": tensors["a"].reshape(9, 7)},
            {**tensors, "b": tensors["b"].bfloat16()}, {**tensors, "a": tensors["a"] + 1}]
    assert len({sampled_fingerprint(one) for one in told}) == len(told)
