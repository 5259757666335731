"""What the page says before the start."""

from __future__ import annotations

import torch
from lib_lora_train.memory.time_estimate import Cost, image_cost

from lib_lora_train.api import service
from lib_lora_train.host.port import Outline


def test_the_plan_of_a_loaded_model_tells_time_and_memory(images, host):
    plan = service.plan({"train_data_dir": str(images), "resolution": "64", "min_bucket_reso": 64}, host=host)
    assert plan["estimate"].startswith("about ") and plan["estimate"].endswith("GB of memory")


def test_a_memory_budget_is_told_and_what_is_given_up_for_it(images, host):
    asked = {"train_data_dir": str(images), "resolution": "128", "min_bucket_reso": 64}
    roomy = service.plan({**asked, "memory_budget": 4}, host=host)
    assert "of 4.0 GB" in roomy["estimate"] and "nothing has to be given up" in roomy["estimate"]
    tight = service.plan({**asked, "memory_budget": 0.01}, host=host)
    assert "every block is computed twice" in tight["estimate"]
    assert any("more than there is" in warning for warning in tight["warnings"]) and roomy["warnings"] != tight["warnings"]


def test_a_resolution_between_two_bucket_sizes_is_planned_as_it_is_trained(images, host):
    plan = service.plan({"train_data_dir": str(images), "resolution": "100", "min_bucket_reso": 64}, host=host)
    assert plan["estimate"].startswith("about ") and plan["resolution"] == [100, 100]


def test_without_a_model_nothing_is_guessed(images, host):
    host.checkpoint_file = None
    plan = service.plan({"train_data_dir": str(images), "resolution": "64", "min_bucket_reso": 64}, host=host)
    assert plan["estimate"] == "" and plan["steps"] > 0


def _cost(outline: Outline, side: int) -> Cost:
    from lib_lora_train.model.family import detect
    return image_cost(outline.tensors, detect(outline.tensors, outline.hints), width=side, height=side, rank=4,
                        dtype=torch.float32)


def test_arithmetic_grows_with_the_image_and_weights_do_not(host):
    small, large = _cost(host.outline(), 64), _cost(host.outline(), 128)
    # Convolutions and linear layers grow fourfold, attention sixteenfold; text and time do not grow.
    assert 3 < large.operations / small.operations < 16
    assert 3 < large.activation_bytes / small.activation_bytes < 16
    assert large.parameters == small.parameters


def test_bytes_that_autograd_keeps_are_those_of_a_real_pass(host):
    """Counted on shapes against counted on numbers, with attention's own kernels."""
    from lib_lora_train.adapters.network import AdapterNetwork
    from lib_lora_train.adapters.targets import find_targets
    from lib_lora_train.model import frozen
    with host.lease() as lent:
        model = frozen.build(lent.tensors, hints=lent.hints, tokenizers=lent.tokenizers)
    targets = find_targets(model.components, family=model.architecture.family, text_encoder=False)
    network = AdapterNetwork.build(targets, rank=4, alpha=1, seed=0)
    own = {t.untyped_storage().data_ptr() for t in (*model.unet.tensors.values(), *network.parameters())}
    kept: dict[int, torch.Tensor] = {}

    def remember(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        model.unet(torch.randn(1, 4, 16, 16), torch.zeros(1), torch.randn(1, 77, 32), adapters=network.adapters()["unet"])
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    guessed = _cost(host.outline(), 128).activation_bytes
    assert 0.7 < guessed / real < 1.3
