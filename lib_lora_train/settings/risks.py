"""Values that are known to fail, in one list, which the plan, the check of a folder and the run tell alike.

Not here: memory (`memory/plan.py`), and settings that have no effect (`settings.ignored`).
"""

from __future__ import annotations

from collections.abc import Iterator

from lib_lora_train.errors import counted
from lib_lora_train.settings import Settings, named

_RATES = {name: (1e-6, 1e-2) for name in ("adamw", "adamw8bit", "pagedadamw8bit", "adamwschedulefree", "radamschedulefree")} | {
    name: (1e-7, 3e-3) for name in ("lion", "lion8bit")}
"""Optimizer -> (a learning rate below this learns next to nothing, one from this on ruins a LoRA). kohya's guide names 1e-4 to
1e-3 for the UNet, and less for the text encoder (sd-scripts, docs/train_network.md). Lion's are 3 to 10 times smaller
(arXiv 2302.06675, section 5)."""
_MOST_STRENGTH = 4.0  # alpha / rank
_MOST_SAVES = 50


def risks(settings: Settings, *, steps: int, images: int, processes: int = 1, epoch: int = 0) -> Iterator[str]:
    """A sentence for each value that is known to fail in a run of so many steps and images: the number, why, and what is
    usual. An `epoch` has so many steps, 0 where nobody knows."""
    optimizer, network = settings.optimizer, settings.network
    unet = "unet_lr" if optimizer.unet_lr else "learning_rate"
    low, high = _RATES.get(optimizer.optimizer_type.lower(), (0.0, float("inf")))
    usual_rates = {unet: "1e-4 ~ 1e-3", "text_encoder_lr": "1e-5 ~ 1e-4"}
    for rate, (name, usual) in zip(settings.rates, usual_rates.items(), strict=True):
        if rate >= high:
            yield f"{named(name)} = {rate:g} mostly ruins a LoRA with {optimizer.optimizer_type}: {usual} is usual."
        elif 0 < rate < low:
            yield f"{named(name)} = {rate:g} is so low that next to nothing is learnt: {usual} is usual."
    strength = network.network_alpha / network.network_dim ** (0.5 if network.rs_lora else 1)
    if strength > _MOST_STRENGTH and not network.network_weights and network.network_module != "OFT":  # a bound
        root = "the root of " if network.rs_lora else ""
        yield (f"{named('network_alpha')} = {network.network_alpha:g} is {strength:.3g} times {root}{named('network_dim')} = "
               f"{network.network_dim}: so strong a LoRA is mostly ruined. From half of that up to it is usual.")
    if steps and optimizer.lr_warmup_steps >= steps:
        yield (f"{named('lr_warmup_steps')} = {optimizer.lr_warmup_steps} is no less than the run's {steps} steps: the "
               "learning rate never gets where it should. A tenth of the steps is usual.")
    if (batch := optimizer.train_batch_size * processes) > images > 0:
        several = f" × {processes} processes" if processes > 1 else ""
        yield (f"{named('train_batch_size')} = {optimizer.train_batch_size}{several} is more than the "
               f"{counted(images, 'picture')} there: a batch of {batch} holds some of them several times, which takes memory "
               f"and teaches nothing more. 1 to {min(4, images)} is usual.")
    for every, interval in (("save_every_n_epochs", epoch), ("save_every_n_steps", 1)):
        value = getattr(settings.save, every)
        if value and interval and (saves := steps // (value * interval)) > _MOST_SAVES:
            yield (f"{named(every)} = {value} keeps {saves} LoRAs, each a file of its own. With {value * saves // 8} there are "
                   "eight: 3 to 10 is usual.")
