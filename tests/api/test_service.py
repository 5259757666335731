"""What the page says before the start."""

from __future__ import annotations

from lib_lora_train.api import service


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
