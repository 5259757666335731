"""Ranks, alphas and learning rates of single blocks of the UNet, as kohya's `block_dims` and `down_lr_weight` give them.

Numbers, their order and the named curves are those of sd-scripts (networks/lora.py, get_block_dims_and_alphas and
get_block_lr_weight): first what comes before the blocks, then the downward, middle and upward ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lib_lora_train.errors import SettingError
from lib_lora_train.model.family import Family
from lib_lora_train.settings import NetworkSettings, named
from lib_lora_train.settings.network import BLOCK_RATES

_CURVES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda x: math.sin(math.pi * (1 - x) / 2), "sine": lambda x: math.sin(math.pi * x / 2), "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x, "zeros": lambda x: 0.0}
"""By name: the rate of the block at x, 0 for the first and 1 for the last."""


def block_values(chosen: NetworkSettings, name: str, family: Family) -> tuple[float, ...] | None:
    """The numbers of a setting with one for each block; None where it is empty. Raises SettingError."""
    text = str(getattr(chosen, name))
    if not text.strip():
        return None
    found, count = _numbers(text, name), family.blocks
    if len(found) != count or any(number < 0 or (name.endswith("dims") and number % 1) for number in found):
        kind = "whole numbers from 0 on" if name.endswith("dims") else "numbers from 0 on"
        raise SettingError(f"{named(name)} = {text:.80} is not possible for {family.title}",
                           why=f"it has {len(found)} numbers", remedy=f"write {count} {kind} with commas between them")
    return found


def rate_weights(chosen: NetworkSettings, family: Family) -> tuple[float, ...] | None:
    """What the learning rate of each block is multiplied by, for all `family.blocks`; None where nothing is set. Raises
    SettingError."""
    if not any(str(getattr(chosen, name)).strip() for name in BLOCK_RATES):
        return None
    weights = [weight for name, count in zip(BLOCK_RATES, family.block_counts, strict=True)
               for weight in _weights(str(getattr(chosen, name)), name, count)]
    weights = [weight if weight > chosen.block_lr_zero_threshold else 0.0 for weight in weights]
    before, after = family.blocks_around
    return (*[1.0] * before, *weights, *[1.0] * after)


def _weights(text: str, name: str, count: int) -> list[float]:
    """The weights of so many blocks: numbers, of which missing ones are 1, or a curve by name with what is added to it."""
    curve, _, added = text.strip().partition("+")
    if curve.strip() in _CURVES and count > 1:
        base = _numbers(added, name)[0] if added else 0.0
        return [_CURVES[curve.strip()](index / (count - 1)) + base for index in range(count)]
    found = _numbers(text, name) if text.strip() else ()
    if len(found) > count or any(weight < 0 for weight in found):
        raise SettingError(f"{named(name)} = {text:.80} is not possible", why=f"there are {count} such blocks",
                           remedy=f"write up to {count} numbers from 0 on, or one of {', '.join(_CURVES)}")
    return [*found, *[1.0] * (count - len(found))]


def _numbers(text: str, name: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) if part.strip() else 0.0 for part in text.strip(" []()").split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise SettingError(f"{named(name)} = {text:.80} is not possible", why="it must be numbers with commas between them"
                           + (f", or one of {', '.join(_CURVES)}" if name.endswith("lr_weight") else ""))
    return found
