"""What kohya's, LyCORIS' and kohya_ss' settings of the network are here: `network_module`, `network_args`, `LoRA_type`.

LyCORIS is v3 (f49d30d): its preset is "full" and its conv_dim and conv_alpha those of the other layers where none is given.
"""

from __future__ import annotations

from collections.abc import Mapping

from lib_lora_train.settings.network import BLOCK_RATES, BLOCK_SIZES, LORA_PLUS

_OF_CONVOLUTIONS = ("conv_dim", "conv_alpha")
_OF_OTHER_TYPES = (*_OF_CONVOLUTIONS, "conv_block_dims", "conv_block_alphas", "factor", "full_matrix", "dora_wd",
                   "LyCORIS_preset")
"""What kohya_ss writes for every type of LoRA."""
_VARIANTS = ("use_cp", "use_tucker", "use_scalar", "train_norm", "rank_dropout_scale", "decompose_both")
"""As those, of LyCORIS' types; the last one is LoKr's."""
_TYPES = {"standard": "LoRA", "lora": "LoRA", "kohya locon": "LoRA", "lycoris/locon": "LoRA", "lycoris/loha": "LoHa",
          "lycoris/lokr": "LoKr"}
_MODULES = {"networks.lora": "LoRA", "networks.loha": "LoHa", "networks.lokr": "LoKr", "networks.oft": "OFT"}
_ALGORITHMS = {"lora": "LoRA", "locon": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
_PRESETS = {"full": "attention and convolutions", "unet-only": "attention and convolutions",
            "attn-mlp": "attention and feed-forward", "unet-transformer-only": "attention and feed-forward",
            "attn-only": "attention"}
_OF_THE_UNET = ("unet-only", "unet-transformer-only")
_RENAMED = {"dora": "dora_wd", "dropout": "network_dropout"}
_TAKEN = frozenset({
    *_OF_CONVOLUTIONS, "factor", "full_matrix", "dora_wd", "rs_lora", "network_dropout", "rank_dropout", "module_dropout",
    *LORA_PLUS, *BLOCK_SIZES, *BLOCK_RATES, "block_lr_zero_threshold"})
"""The names in `network_args` that are settings here."""
_FORMATS = ("as they are", "fp8", "int8", "")
_OFF = ("", "0", "0.0", "none", "false", "no")
_MEANT_OTHERWISE = {"wd_on_output": "dora_wd is applied to each input, as the WebUI applies it"}


def adopted_network(values: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """A file's values with those of the network made ours, and what became of them. What has no place here stays as it is, for
    the caller to refuse."""
    found, became = dict(values), list[str]()
    kind = str(found.get("LoRA_type", "")).strip().lower()
    lycoris = kind.startswith("lycoris/") or str(found.get("network_module", "")).lower().startswith("lycoris.")
    others = _OF_OTHER_TYPES if kind in ("standard", "lora", "") else ()
    others += _VARIANTS if not lycoris else _VARIANTS[-1:] if kind != "lycoris/lokr" else ()
    for name in others if "LoRA_type" in found else ():
        if str(found.pop(name, "")).lower() not in _OFF:
            became.append(f"{name} is left out: it belongs to other kinds of LoRA")
    if kind in _TYPES:
        found["network_module"] = _TYPES[kind]
        became.append(f"LoRA_type = {found.pop('LoRA_type')} is read as network_module = {_TYPES[kind]}")
    _adopt_merged_loras(found, became)
    given = _arguments(found.pop("network_args", None))
    arguments = {_RENAMED.get(name, name): value for name, value in given.items()}
    if lycoris:
        _adopt_algorithm(found, arguments, became)
        _adopt_preset(found, arguments, became)
    elif str(found.get("network_module", "")).lower() in _MODULES:
        found["network_module"] = _MODULES[str(found["network_module"]).lower()]
        if found["network_module"] == "OFT":  # sd-scripts' adapts the attentions alone unless it is told otherwise
            linear = arguments.pop("enable_all_linear", "")
            found.setdefault("network_targets", "attention and feed-forward" if linear else "attention")
            became.append(f"network_module of OFT is read with network_targets = {found['network_targets']}")
    taken = {name: arguments.pop(name) for name in list(arguments) if name in _TAKEN and name not in found}
    if taken:
        found |= taken
        became.append(f"network_args is read as {', '.join(f'{name} = {value}' for name, value in taken.items())}")
    became += [f"network_args, {name}, is left out: {why}" for name, why in _MEANT_OTHERWISE.items()
               if arguments.pop(name, None)]
    if left := [f"{name}={value}" for name, value in arguments.items() if value.lower() not in _OFF]:
        found["network_args"] = left
    if found.get("conv_dim") and "conv_alpha" not in found and (given or "LoRA_type" in values):
        found["conv_alpha"] = found.get("network_alpha", 1) if lycoris else 1  # their defaults
    return found, became


def _adopt_merged_loras(found: dict[str, object], became: list[str]) -> None:
    """kohya's `base_weights`, paths of LoRAs that are merged into the model, each with a multiplier. Ours of that name is the
    number format of the model."""
    paths = found.get("base_weights")
    paths = paths.split(",") if isinstance(paths, str) else paths if isinstance(paths, list) else []
    paths = [str(path).strip() for path in paths if str(path).strip().lower() not in _FORMATS]
    if paths:
        del found["base_weights"]
        weights = found.pop("base_weights_multiplier", None) or []
        weights = weights if isinstance(weights, list) else str(weights).replace(",", " ").split()
        weights = [*weights, *[1] * len(paths)]
        found["train_on_top_of"] = ", ".join(f"{path}:{weight}" for path, weight in zip(paths, weights, strict=False))
        became.append(f"base_weights is read as train_on_top_of = {found['train_on_top_of']}")


def _adopt_algorithm(found: dict[str, object], arguments: dict[str, str], became: list[str]) -> None:
    """LyCORIS' `algo` as the kind of network."""
    algorithm = arguments.pop("algo", "lora").lower() if "LoRA_type" not in found else ""
    if str(found.get("network_module", "")).lower().startswith("lycoris.") and algorithm in _ALGORITHMS:
        found["network_module"] = _ALGORITHMS[algorithm]
        became.append(f"network_module of LyCORIS, algo = {algorithm}, is read as {_ALGORITHMS[algorithm]}")
    elif algorithm and algorithm not in _ALGORITHMS:
        arguments["algo"] = algorithm  # to be refused


def _adopt_preset(found: dict[str, object], arguments: dict[str, str], became: list[str]) -> None:
    """LyCORIS' preset as the layers to train. Its first and last convolution and its time embedding are never adapted here."""
    preset = str(arguments.get("preset") or found.get("LyCORIS_preset") or "full")
    if preset in _PRESETS:
        arguments.pop("preset", None)
        given = "LyCORIS_preset" if found.pop("LyCORIS_preset", None) else "network_args"
        found.setdefault("network_targets", _PRESETS[preset])
        if preset in _OF_THE_UNET:
            found["network_train_unet_only"] = True
        became.append(f"{given}, preset = {preset}, is read as network_targets = {found['network_targets']}")


def _arguments(given: object) -> dict[str, str]:
    """{name: value} of a list of name=value, or of a text of them."""
    texts = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    pairs = [str(text).partition("=") for text in texts]
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs if name.strip()}
