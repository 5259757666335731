"""The page of the WebUI's settings, on stand-ins for its modules; tests/webui asks the real ones."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest


class OptionInfo:
    """modules.options.OptionInfo as before 1.7, which knows no categories."""

    def __init__(self, default, label, component, component_args, *, section, restrict_api) -> None:
        self.section = section

    def info(self, text: str) -> OptionInfo:
        return self


def test_the_settings_page_stands_under_training_also_where_options_know_no_category(monkeypatch: pytest.MonkeyPatch):
    added = {}
    modules = ModuleType("modules")
    modules.paths = SimpleNamespace(data_path="/webui")
    modules.shared = SimpleNamespace(
        OptionInfo=OptionInfo, opts=SimpleNamespace(add_option=added.__setitem__),
        cmd_opts=SimpleNamespace(enable_insecure_extension_access=False, listen=False, share=False))
    monkeypatch.setitem(sys.modules, "modules", modules)
    name = "lib_lora_train.host.webui.allowed_paths"
    try:
        importlib.import_module(name).add_option()
    finally:
        sys.modules.pop(name, None)
        vars(sys.modules["lib_lora_train.host.webui"]).pop("allowed_paths", None)
    option = added["lora_train_folders"]
    # "training" is registered in the WebUI's modules/shared_options.py since 1.7.
    assert option.section == ("lora_train", "Train LoRA") and option.category_id == "training"
