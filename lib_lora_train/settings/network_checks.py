"""Which settings of the network do not go together, and which have no effect beside others."""

from __future__ import annotations

from collections.abc import Iterator

from lib_lora_train.errors import SettingError
from lib_lora_train.settings.field import declarations
from lib_lora_train.settings.network import BLOCK_RATES, BLOCK_SIZES, LORA_PLUS, NetworkSettings

_DECLARED = {declaration.name: declaration for declaration in declarations(NetworkSettings)}
_OF_FILE = ("network_dim", "network_alpha", "network_module", "dora_wd", "network_targets", "conv_dim", "conv_alpha", "factor",
            "full_matrix", "rs_lora", *BLOCK_SIZES)
_OF_CONVOLUTIONS = ("conv_alpha", "conv_block_alphas")
_WITH_CONVOLUTIONS = ("attention and feed-forward", "attention and convolutions")


def unused_of_network(chosen: NetworkSettings) -> Iterator[tuple[str, str]]:
    """(name, why it has no effect) of settings of the network."""
    continued, module, targets = bool(chosen.network_weights), chosen.network_module, chosen.network_targets
    if chosen.network_train_unet_only:
        yield "loraplus_text_encoder_lr_ratio", f"only the UNet is trained, {_named('network_train_unet_only')}"
    if not any(getattr(chosen, name) for name in BLOCK_RATES):
        yield "block_lr_zero_threshold", "no rates of blocks are set"
    if continued:
        yield from ((name, f"it is taken from the LoRA that is continued, {_named('network_weights')}") for name in _OF_FILE)
        return
    yield from unused_of_kind(module)
    if module != "LoKr":
        yield from ((name, f"the network is a {module}, {_named('network_module')}") for name in ("factor", "full_matrix"))
    if module == "OFT":
        yield "rs_lora", "the strength of an OFT has no rank"
    if targets == "text encoder":
        yield from ((name, "no block of the UNet is trained") for name in (
            "block_dims", "block_alphas", *BLOCK_RATES, "loraplus_unet_lr_ratio"))
    if targets not in _WITH_CONVOLUTIONS:
        yield from ((name, f"no convolution is among the layers, {_named('network_targets')} = {targets}") for name in (
            "conv_dim", "conv_block_dims", *_OF_CONVOLUTIONS))
    elif not (chosen.conv_dim or chosen.conv_block_dims or targets == "attention and convolutions"):
        yield from ((name, f"no convolution is trained, {_named('conv_dim')}") for name in _OF_CONVOLUTIONS)


def unused_of_kind(module: str) -> Iterator[tuple[str, str]]:
    """(name, why it has no effect) of settings of the training that this kind of network, new or continued, has no use for."""
    if module != "LoRA":
        yield from ((name, f"a {module} has no pairs of matrices") for name in LORA_PLUS)


def check_network_settings(chosen: NetworkSettings) -> None:
    """Raises SettingError for what does not go together."""
    if chosen.network_targets == "text encoder" and chosen.network_train_unet_only:
        raise SettingError("Nothing would be trained", why=f"{_named('network_targets')} is the text encoder, and "
                           f"{_named('network_train_unet_only')} leaves it as it is",
                           remedy=f"switch {_named('network_train_unet_only')} off")
    if not chosen.network_weights:
        check_kind(chosen, module=chosen.network_module, dora=chosen.dora_wd)


def check_kind(chosen: NetworkSettings, *, module: str, dora: bool) -> None:
    """Raises SettingError for what is not possible with this kind of network, new or continued."""
    if module == "OFT" and dora:
        raise SettingError(f"{_named('dora_wd')} is not possible with {_named('network_module')} = OFT",
                           why="a rotation changes no length", remedy="switch it off, or choose LoRA")
    if module == "OFT" and chosen.scale_weight_norms:
        raise SettingError(f"{_named('scale_weight_norms')} is not possible with {_named('network_module')} = OFT",
                           why="a rotation is no product that could be scaled",
                           remedy=f"set {_named('network_alpha')} to 0.001, which bounds how far an OFT turns")
    for name in ("network_dropout", "rank_dropout"):
        if getattr(chosen, name) and (module != "LoRA" or dora):
            kind = "DoRA" if dora else module
            raise SettingError(f"{_named(name)} is not possible with {kind}", why="it leaves out parts of a LoRA's own two "
                               "products", remedy=f"take {_named('module_dropout')}, or LoRA as {_named('network_module')}")


def _named(name: str) -> str:
    return _DECLARED[name].named
