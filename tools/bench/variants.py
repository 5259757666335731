"""The named settings of `bench speed --compare`. Imports no torch, since the help lists the names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lib_lora_train.errors import SettingError
from lib_lora_train.settings.field import Value

VARIANTS: Mapping[str, Mapping[str, Value]] = {
    "defaults": {},
    "eager": {"cuda_graphs": "off"},
    "graphs": {"cuda_graphs": "on"},
    "compiled": {"torch_compile": True, "cuda_graphs": "off"},
    "channels_last": {"channels_last": "on"},
    "channels_first": {"channels_last": "off"},
    "recompute": {"gradient_checkpointing": True},
    "offload": {"cpu_offload_checkpointing": True},
    "swapped": {"blocks_to_swap": 200, "memory_plan": "manual"},
    "int8": {"base_weights": "int8"},
    "fp8": {"base_weights": "fp8"},
    "fp32": {"mixed_precision": "no"},
    "fp16": {"mixed_precision": "fp16"},
    "bf16": {"mixed_precision": "bf16"},
}
"""Names for `--compare`, and the settings that they stand for."""

HOW_ONLY = frozenset({"cuda_graphs", "torch_compile", "channels_last", "gradient_checkpointing", "cpu_offload_checkpointing",
                      "blocks_to_swap", "memory_plan"})
"""Settings that change how a step is computed and not what: losses of runs that differ in nothing else should be equal."""


def variants_of(names: Sequence[str]) -> dict[str, dict[str, Value]]:
    """{name: settings} for what `--compare` was given: names of VARIANTS, or NAME:SETTING=VALUE,SETTING=VALUE.

    Raises SettingError for an unknown name.
    """
    chosen: dict[str, dict[str, Value]] = {}
    for text in names:
        name, _, changes = text.partition(":")
        if changes:
            pairs = [part.partition("=") for part in changes.split(",")]
            chosen[name] = {key.strip(): value.strip() for key, _, value in pairs}
        elif name in VARIANTS:
            chosen[name] = dict(VARIANTS[name])
        else:
            raise SettingError(f"There is nothing called '{name}' to compare",
                               remedy=f"write one of {', '.join(VARIANTS)}, or NAME:SETTING=VALUE")
    return chosen
