"""The learning rate over a run as a small curve beside its settings, from the very function that the training asks."""

from __future__ import annotations

import html

from lib_lora_train.run.optimizing import schedule_config, traits_of
from lib_lora_train.settings import Settings
from lib_lora_train.training.schedules import learning_rate_factor

_WIDTH, _HEIGHT = 320, 64
_MOST_POINTS = 320
_OPEN = '<div class="lora-train-schedule">'
_STEPS = 1000  # where the run's length is not known yet


def schedule_curve(settings: Settings, *, steps: int = 0) -> str:
    """An SVG with a line of text below, as HTML, for a run of so many steps; 0 where that is not known. Raises SettingError."""
    optimizer, traits = settings.optimizer, traits_of(settings)
    if traits.own_rate:
        return f"{_OPEN}{html.escape(traits.own_schedule)}.</div>"
    length = steps or optimizer.max_train_steps or _STEPS
    schedule = schedule_config(settings, steps=length)
    shown = sorted({round(number * (length - 1) / (_MOST_POINTS - 1)) for number in range(_MOST_POINTS)})
    factors = [learning_rate_factor(schedule, step) for step in shown]
    rate = settings.rates[0]
    line = " ".join(f"{step / max(1, length - 1) * _WIDTH:.1f},{(1 - factor) * _HEIGHT:.1f}"
                    for step, factor in zip(shown, factors, strict=True))
    end = "next to nothing" if factors[-1] < 1e-3 else f"{factors[-1] * rate:.3g}"
    said = [f"{schedule.name}: {max(factors) * rate:.3g} at most, {end} at the end of {length} steps"]
    if not steps and not optimizer.max_train_steps:
        said.append("the number of steps is an example")
    if traits.adapts_rate:
        said.append("times the rate that the optimizer finds")
    told = "; ".join([*said, *filter(None, [traits.own_schedule])])
    drawn = (f'<svg viewBox="-2 -2 {_WIDTH + 4} {_HEIGHT + 4}" preserveAspectRatio="none" role="img" '
             f'aria-label="{html.escape(told)}"><path d="M0 0V{_HEIGHT}H{_WIDTH}"/><polyline points="{line}"/></svg>')
    return f"{_OPEN}{drawn}{html.escape(told)}</div>"
