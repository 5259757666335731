"""Installing the extension changes nothing of what is there."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest

import install


def installed() -> dict[str, str]:
    return {distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()}


def test_installing_the_extension_changes_no_version_of_anything():
    before = installed()
    done = subprocess.run([sys.executable, "-I", str(Path(install.__file__))], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "") and installed() == before


@pytest.mark.parametrize("there", install.TOML_READERS)
def test_where_any_reader_of_toml_is_there_nothing_is_asked_of_pip(monkeypatch, there):
    monkeypatch.setattr(install, "importable", lambda name: name == there)
    monkeypatch.setattr(install, "install", lambda package: pytest.fail(package))
    install.main()


def test_only_a_missing_reader_of_toml_is_installed_as_the_webui_does(monkeypatch, capsys):
    asked = []
    launch = types.SimpleNamespace(run_pip=lambda command, what: asked.append(command))
    monkeypatch.setattr(install, "importable", lambda name: False)
    monkeypatch.setitem(sys.modules, "launch", launch)
    install.main()
    assert asked == ["install --quiet tomli"] and capsys.readouterr().out == ""
    monkeypatch.setattr(launch, "run_pip", lambda command, what: (_ for _ in ()).throw(RuntimeError("no network")))
    install.main()
    assert "no network" in capsys.readouterr().out


def test_packages_for_optimizers_are_named_and_never_installed():
    """Nothing in the package runs pip: the only line that has a command for it is one for the user to read."""
    package = Path(install.__file__).parent / "lib_lora_train"
    found = [path.name for path in package.rglob("*.py") if "-m pip" in path.read_text(encoding="utf-8")]
    assert found == ["optimizer_kinds.py"]
    assert "subprocess" not in (package / "training" / "optimizer_kinds.py").read_text(encoding="utf-8")
