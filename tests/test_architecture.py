"""What the plan of the house promises of every file, checked by reading the files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lib_lora_train"

# Bottom-up: a room imports only from rooms above it in this list. A new room is added where it belongs.
ROOMS = ("errors", "events", "storage", "settings", "distributed", "dataset", "tagging", "model", "adapters", "inputs",
         "training", "memory", "host", "evaluation", "run", "studio", "api", "ui", "demo", "__main__")
NOT_CORE = ("host", "ui", "api")

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """lib_lora_train/model/unet.py -> "lib_lora_train.model.unet"; a package is named without __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """lib_lora_train.model.unet -> "model"; "" for the package itself."""
    return "".join(module.split(".")[1:2])


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of everything the file imports anywhere, also inside functions."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) - node.level + 1], *filter(None, [node.module])]) \
                if node.level else node.module or ""
            # `from package import name` may name a module; whether it does shows on the disk (the WebUI is elsewhere).
            for alias in node.names:
                below = ROOT.joinpath(*base.split("."), alias.name)
                is_module = base == "modules" or below.is_dir() or below.with_suffix(".py").is_file()
                yield node.lineno, f"{base}.{alias.name}" if is_module else base


def core_files() -> list[Path]:
    return [path for path in FILES if room(module_name(path)) not in NOT_CORE]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    own = room(module_name(path))
    assert own == "" or own in ROOMS, f"{named(path)} is in no room of the list; add it where it belongs"
    for line, name in imports(path):
        if name.split(".")[0] != PACKAGE or room(name) in ("", own):
            continue
        assert own, f"{named(path)}:{line} the package itself imports nothing"
        assert ROOMS.index(room(name)) < ROOMS.index(own), f"{named(path)}:{line} {own} must not import {name}"


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=named)
def test_only_the_hosts_know_the_webui_and_only_the_page_knows_gradio(path: Path) -> None:
    own = "scripts" if path in SCRIPTS else room(module_name(path))
    for line, name in imports(path):
        top = name.split(".")[0]
        if top == "modules":
            allowed = own == "host" or (own == "scripts" and name.startswith("modules.script_callbacks"))
            assert allowed, f"{named(path)}:{line} imports {name}"
        assert top != "gradio" or own == "ui", f"{named(path)}:{line} imports gradio"


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_the_webuis_door_is_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_is_caught_blindly_or_passed_through_unseen(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{named(path)}:{node.lineno} bare except"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            assert node.args.kwarg is None, f"{named(path)}:{node.lineno} takes **{node.args.kwarg.arg}"


@pytest.mark.parametrize("path", core_files(), ids=named)
def test_every_public_function_of_the_core_says_what_it_does(path: Path) -> None:
    silent = [f"{named(path)}:{node.lineno} {name}" for name, node in public(tree(path)) if not ast.get_docstring(node)]
    assert not silent, "\n".join(silent)


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module and the public methods of those classes; not what is nested in them."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


def test_no_room_is_a_drawer_for_odds_and_ends() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")]


# Imports the modules it is told, and prints what else happened meanwhile: output, files written, folders made,
# connections, processes, threads, a CUDA context. Other people's packages are imported before anybody looks.
IMPORTER = """
import contextlib, importlib, io, os, sys, threading
absent, foreign, ours = (argument.split(",") for argument in sys.argv[1:])
sys.modules.update({name: None for name in absent if name})
for name in filter(None, foreign):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
happened, watching = [], True
def watch(event, arguments):
    if not watching:
        return
    writes = event == "open" and (set(arguments[1] or "") & set("wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if writes or event in ("os.mkdir", "socket.connect", "subprocess.Popen", "os.system"):
        happened.append(f"{event} {arguments}")
output, threads = io.StringIO(), threading.active_count()
sys.addaudithook(watch)
with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
    for name in ours:
        importlib.import_module(name)
watching = False
torch = sys.modules.get("torch")
print(*happened, output.getvalue(), "threads" if threading.active_count() > threads else "",
      "CUDA" if torch and torch.cuda.is_initialized() else "", sep="")
"""


def import_in_a_new_process(paths: list[Path], *, absent: tuple[str, ...], folder: Path) -> str:
    foreign = sorted({name for path in paths for _, name in imports(path) if name.split(".")[0] != PACKAGE})
    ours = ",".join(map(module_name, paths))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTER, ",".join(absent), ",".join(foreign), ours], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_the_core_does_nothing_and_needs_neither_gradio_nor_the_webui(tmp_path: Path) -> None:
    absent = ("gradio", "modules", "launch")
    assert import_in_a_new_process(core_files(), absent=absent, folder=tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_importing_hosts_page_and_api_does_nothing(tmp_path: Path) -> None:
    def needs_the_webui(path: Path) -> bool:
        return any(isinstance(node, (ast.Import, ast.ImportFrom)) and "modules" in ast.unparse(node).split()[1]
                   for node in tree(path).body)
    paths = [path for path in FILES if path not in core_files() and not needs_the_webui(path)]
    if paths:
        assert import_in_a_new_process(paths, absent=(), folder=tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [ROOT / "install.py", ROOT / "tools" / "start.py"], ids=named)
def test_what_runs_before_anything_is_installed_needs_nothing_but_python(path: Path) -> None:
    tops = {name.split(".")[0] for _, name in imports(path)} - {"launch"}
    assert tops <= set(sys.stdlib_module_names)
