"""A gradio component from each declared setting.

The WebUI stores the values of components in its ui-config.json at the first start and goes on using them when a later
version declares another default, and a path or a name has no business there: every component of the page is kept out.
"""

from __future__ import annotations

from typing import Any, TypeVar

import gradio as gr

from lib_lora_train.settings import Declaration, Value

MOST_SLIDER_POSITIONS = 100
_FINEST_STEP = 1e-5
_UNCHANGED = object()
Component = TypeVar("Component")


def element_id(name: str) -> str:
    """The HTML id of a setting's component."""
    return f"lora_train_{name}"


def field(declaration: Declaration, value: Value) -> Any:
    """The component for a setting, showing `value`.

    It refuses nothing itself: what was typed is judged by `settings.parse`, whose sentence is shown beside the button.
    """
    value = displayed(declaration, value)
    common = {"label": declaration.label, "elem_id": element_id(declaration.name), "interactive": True}
    if declaration.type is bool:
        component = gr.Checkbox(value=bool(value), min_width=120, **common)
    elif declaration.choices:
        component = gr.Dropdown(value=value, choices=list(declaration.choices), min_width=120,
                                allow_custom_value=declaration.open_choice, **common)
    elif declaration.type is str:
        lines = {"lines": 2, "max_lines": 8} if declaration.several_lines else {"max_lines": 1}
        component = gr.Textbox(value=str(value), min_width=200 if declaration.is_path else 90, **lines, **common)
    elif slides(declaration):
        component = gr.Slider(value=value, minimum=declaration.minimum, maximum=declaration.maximum,
                              step=step_of(declaration), min_width=200, **common)
    else:
        component = gr.Number(value=value, step=step_of(declaration), min_width=90, **common)
    # The WebUI's own name for a tooltip, which it also translates; without a WebUI our script shows it.
    component.webui_tooltip = declaration.help
    return unsaved(component)


def slides(declaration: Declaration) -> bool:
    """Whether a slider can reach every value that matters."""
    if declaration.type not in (int, float) or declaration.minimum is None or declaration.maximum is None or declaration.zero:
        return False
    if declaration.type is float and declaration.step is None:
        return False
    return (declaration.maximum - declaration.minimum) / step_of(declaration) <= MOST_SLIDER_POSITIONS


def step_of(declaration: Declaration) -> float:
    """What one press of an arrow adds."""
    if declaration.step is not None:
        return declaration.step
    return 1 if declaration.type is int else _FINEST_STEP


def unsaved(component: Component) -> Component:
    """The component, kept out of the WebUI's ui-config.json."""
    component.do_not_save_to_config = True  # type: ignore[attr-defined]
    return component


def displayed(declaration: Declaration, value: Value | None) -> Value | None:
    """What the setting's component shows for `value`: nothing for a 0 that is "auto" or "none"."""
    return value or None if declaration.zero else value


def update(declaration: Declaration, value: object = _UNCHANGED) -> Any:
    """gradio's update that has the setting's component show `value`; one that it cannot show, or none, leaves it as it is.

    The step is named each time: gradio 3 makes it 1 in every update of a number that does not.
    """
    stepped = {"step": step_of(declaration)} if declaration.type in (int, float) and not declaration.choices else {}
    if value is _UNCHANGED or not shown(declaration, value):
        return gr.update(**stepped)
    return gr.update(value=displayed(declaration, value), **stepped)  # type: ignore[arg-type]


def shown(declaration: Declaration, value: object) -> bool:
    """Whether the setting's component could show `value`: one from the browser's memory may be of another version."""
    if declaration.type is bool:
        return isinstance(value, bool)
    if declaration.choices and not declaration.open_choice:
        return value in declaration.choices
    if declaration.type is str:
        return isinstance(value, str)
    if value is None:
        return bool(declaration.zero)
    return isinstance(value, (int, float)) and not isinstance(value, bool)
