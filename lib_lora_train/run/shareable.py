"""Which of a run's settings may leave this machine: none that says where things are, and no note of the user's own."""

from __future__ import annotations

from collections.abc import Mapping

from lib_lora_train.settings import DECLARATIONS, Value

_PRIVATE = frozenset({"training_comment", "resume", "output_name", "log_with", "wandb_run_name", "log_tracker_name",
                      "log_prefix"})


def shareable(values: Mapping[str, object], *, changed: bool = False) -> dict[str, Value]:
    """The settings by name that are no paths and no texts of several lines; with `changed` those that differ from their
    default only."""
    return {name: value for name, value in values.items() if (found := DECLARATIONS.get(name)) is not None
            and name not in _PRIVATE and not found.is_path and not found.several_lines
            and isinstance(value, (bool, int, float, str)) and not set(str(value)) & set("/\\")
            and not (changed and value in (found.default, ""))}
