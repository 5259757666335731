"""Which layers a run adapts, and how large the adapter of each is: as the settings say, or as the file that is continued."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from lib_lora_train.adapters.base import AdapterKind
from lib_lora_train.adapters.dora import DoRA
from lib_lora_train.adapters.dropout import DropoutRates
from lib_lora_train.adapters.loha import LoHa
from lib_lora_train.adapters.lokr import LoKr
from lib_lora_train.adapters.network import DEFAULT_KIND, Sizes
from lib_lora_train.adapters.oft import OFT
from lib_lora_train.adapters.targets import (
    DEFAULT_PRESET,
    WITH_CONVOLUTIONS,
    Target,
    find_targets,
    of_keys,
    of_preset,
)
from lib_lora_train.errors import SettingError
from lib_lora_train.model.architecture import UNET_COMPONENT
from lib_lora_train.model.family import FAMILIES, Family
from lib_lora_train.model.ops.weights import Weight
from lib_lora_train.run.blocks import block_values, rate_weights
from lib_lora_train.settings import NetworkSettings, named
from lib_lora_train.settings.network import BLOCK_SIZES

Components = Mapping[str, Mapping[str, Weight]]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The layers to adapt, the rank and alpha of each, and the kind of the adapters."""

    targets: tuple[Target, ...]
    sizes: Sizes
    kind: AdapterKind


def select(chosen: NetworkSettings, components: Components, *, family: Family) -> Selection:
    """The layers of a new network. Raises SettingError where none is left, or for numbers that do not fit its blocks, and
    ModelError."""
    lists = {name: block_values(chosen, name, family) for name in BLOCK_SIZES}
    rates = rate_weights(chosen, family)
    text = not chosen.network_train_unet_only
    found = find_targets(components, family=family, text_encoder=text, chosen=of_preset(preset_of(chosen)))
    sizes = {}
    for target in found:
        block = family.block_index(target.key) if target.component == UNET_COMPONENT else None
        rank, alpha = size_of_layer(target, chosen, lists=lists, block=block)
        if rank and (block is None or rates is None or rates[block]):
            sizes[target.key] = rank, alpha * math.sqrt(rank) if chosen.rs_lora else alpha
    if not sizes:
        raise SettingError("Nothing would be trained", why="the model has none of the chosen layers, or all of their ranks or "
                           "rates are 0", remedy=f"choose {DEFAULT_PRESET}, {named('network_targets')}")
    return Selection(tuple(target for target in found if target.key in sizes), sizes, chosen_kind(chosen))


def rate_factors(chosen: NetworkSettings, targets: Collection[Target], *, family: Family) -> dict[str, float]:
    """{layer's key: what its learning rate is multiplied by}; {} where nothing is set. Raises SettingError."""
    rates = rate_weights(chosen, family)
    return {} if rates is None else {target.key: rates[family.block_index(target.key)] for target in targets
                                     if target.component == UNET_COMPONENT}


def targets_of_file(chosen: NetworkSettings, components: Components, *, family: Family,
                    keys: Collection[str]) -> tuple[Target, ...]:
    """The layers to go on with of a file that holds tensors of these `keys`: all of its own, and those of a part of the model
    (UNet, text encoder) that is to be trained and that it lacks. Raises ModelError."""
    held, wanted = of_keys(keys), of_preset(preset_of(chosen))
    with_text, with_unet = family.adapts_text(keys), any(key.startswith("lora_unet_") for key in keys)

    def of_file(target: Target) -> bool:
        lacking = not (with_unet if target.component == UNET_COMPONENT else with_text)
        return held(target) or lacking and wanted(target)

    return find_targets(components, family=family, text_encoder=with_text or not chosen.network_train_unet_only,
                        chosen=of_file)


def chosen_kind(chosen: NetworkSettings) -> AdapterKind:
    """The kind of network that is chosen."""
    kinds = {"LoRA": DEFAULT_KIND, "LoHa": LoHa(), "LoKr": LoKr(chosen.factor, chosen.full_matrix), "OFT": OFT()}
    kind = kinds[chosen.network_module]
    return DoRA(kind) if chosen.dora_wd else kind


def dropout_rates(chosen: NetworkSettings) -> DropoutRates:
    """What is left out at random."""
    return DropoutRates(chosen.network_dropout, chosen.rank_dropout, chosen.module_dropout)


def module_of(kind: AdapterKind) -> tuple[str, bool]:
    """What `chosen_kind` makes the kind of: network_module, and whether it is DoRA."""
    inner = kind.inner if isinstance(kind, DoRA) else kind
    return type(inner).__name__, isinstance(kind, DoRA)


def preset_of(chosen: NetworkSettings) -> str:
    """The preset, which a rank for convolutions widens as kohya's `conv_dim` does."""
    widened = (chosen.conv_dim or chosen.conv_block_dims) and chosen.network_targets == DEFAULT_PRESET
    return WITH_CONVOLUTIONS if widened else chosen.network_targets


def size_of_layer(target: Target, chosen: NetworkSettings, *, lists: Mapping[str, Sequence[float] | None],
                  block: int | None) -> tuple[int, float]:
    """(rank, alpha) of one layer: `conv_dim` is that of convolutions above 1x1, as in kohya's scripts, and `lists` those of
    each block."""
    rank, alpha, ranks, alphas = chosen.network_dim, chosen.network_alpha, lists["block_dims"], lists["block_alphas"]
    if target.kernel:
        rank = chosen.conv_dim or chosen.network_dim
        alpha = chosen.conv_alpha or chosen.network_alpha * (rank / chosen.network_dim) ** (0.5 if chosen.rs_lora else 1)
        ranks, alphas = lists["conv_block_dims"], lists["conv_block_alphas"]
    if block is not None and ranks is not None:
        rank = int(ranks[block])
    if block is not None and alphas is not None:
        alpha = alphas[block] or float(rank)
    return rank, alpha


def check_family(chosen: NetworkSettings, family: str) -> None:
    """Raises SettingError for what a family of that name does not have; "" is any."""
    if family and chosen.network_targets.startswith("B-LoRA") and not FAMILIES[family].b_lora:
        raise SettingError(f"{named('network_targets')} = {chosen.network_targets} is not possible for "
                           f"{FAMILIES[family].title}", why="its blocks are those of SDXL (arXiv 2403.14572)",
                           remedy=f"choose {DEFAULT_PRESET}, or load an SDXL checkpoint")
    if family:
        for name in BLOCK_SIZES:
            block_values(chosen, name, FAMILIES[family])
        rate_weights(chosen, FAMILIES[family])
