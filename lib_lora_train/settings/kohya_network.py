"""What kohya's, LyCORIS' and kohya_ss' settings of the network are here: `network_module`, `network_args`, `LoRA_type`."""

from __future__ import annotations

from collections.abc import Mapping

_OF_CONVOLUTIONS = ("conv_dim", "conv_alpha")
_PLAIN_TYPES = ("standard", "lora", "")
_LOCON_TYPES = ("kohya locon", "lycoris/locon")
_TAKEN = frozenset(_OF_CONVOLUTIONS)
"""The names in `network_args` that are settings here."""


def adopted_network(values: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """A file's values with those of the network made ours, and what became of them. What has no place here stays as it is."""
    found, became = dict(values), list[str]()
    kind = str(found.get("LoRA_type", "")).strip().lower()
    if "LoRA_type" in found and kind in _PLAIN_TYPES:
        for name in _OF_CONVOLUTIONS:  # kohya_ss writes them for every type
            found.pop(name, None)
    if kind in _LOCON_TYPES:
        became.append(f"LoRA_type = {found.pop('LoRA_type')} is read as conv_dim = {found.get('conv_dim')}")
    arguments = _arguments(found.get("network_args"))
    taken = {name: value for name, value in arguments.items() if name in _TAKEN and name not in found}
    if taken:
        found |= taken
        became.append(f"network_args is read as {', '.join(f'{name} = {value}' for name, value in taken.items())}")
        rest = [f"{name}={value}" for name, value in arguments.items() if name not in taken]
        found["network_args"] = rest
    if found.get("conv_dim") and "conv_alpha" not in found and {"LoRA_type", "network_args"} & values.keys():
        found["conv_alpha"] = 1  # kohya's default
    return found, became


def _arguments(given: object) -> dict[str, str]:
    """{name: value} of a list of name=value, or of a text of them."""
    texts = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    pairs = [str(text).partition("=") for text in texts]
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs if name.strip()}
