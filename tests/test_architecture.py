"""The rules of the layout that a reader of the code relies on, checked by reading every file. Each test lists all offenders."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lib_lora_train"

# A package imports only from those above it in this list.
ORDER = ("errors", "terminal", "records", "events", "storage", "settings", "distributed", "dataset", "tagging", "model",
         "adapters", "inputs", "memory", "training", "host", "evaluation", "run", "results", "studio", "api", "ui", "demo",
         "__main__")
NOT_CORE = ("host", "ui", "api")
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
EVERY_FILE = [*FILES, *SCRIPTS, *TOOLS, ROOT / "install.py"]

MOST_LINES, MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 40_400, 400, 60
LEFT_OUT = frozenset("""
picture pictures paint paints painted painter painting card cards processor processors ranks joined place agreement
agreements alone rehearse rehearsed rehearsal work execution piece pieces recompute recomputed again unit units
recording recordings recorder roomy crowded ledger birth bury way scene wishes outcome aside stray strays homes
loan lent take hand hands seal witness lowrank products narrow base feeder ahead soon burden spill building room point
keeper facts fence confine book opened asked mark whole judge judges floor settle fitting""".split())
LEFT_OUT_PAIRS = ("let_go", "bring_back", "low_rank")
STANDARD_TERMS = frozenset({"base_dtype", "base_model", "place_model", "resume_point"})
"""Names of the field that contain such a word in its ordinary sense; also as a part of a longer name."""
OF_FILES = frozenset({"pictures", "outcome", "base_version", "base_weights", "hand"})
"""Fields whose names stand in files or are those of settings: events.jsonl, LoRA files, dataset.json."""
BASE_MODULE = "lib_lora_train/adapters/base.py"  # what any adapter offers; named so in the plan of the house

PRIVATE_OF_TENSORS = frozenset({"_cdata", "_version", "_base", "_typed_storage", "_untyped_storage", "_is_view", "_grad_fn"})


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """lib_lora_train/model/sd/unet.py -> "lib_lora_train.model.sd.unet"; a package is named without __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """lib_lora_train.model.sd.unet -> "model"; "" for the package itself."""
    return "".join(module.split(".")[1:2])


@cache
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
    return [path for path in FILES if part_of(module_name(path)) not in NOT_CORE]


def no(offenders: list[str]) -> None:
    assert not offenders, "\n" + "\n".join(offenders)


def test_a_package_imports_only_from_those_above_it() -> None:
    found = []
    for path in FILES:
        own = part_of(module_name(path))
        if own and own not in ORDER:
            found.append(f"{named(path)} is in no package of the list: add it where it belongs")
            continue
        for line, name in imports(path):
            other = part_of(name)
            if name.split(".")[0] == PACKAGE and other not in ("", own) and (
                    not own or ORDER.index(other) > ORDER.index(own)):
                found.append(f"{named(path)}:{line} {own or 'the package itself'} must not import {name}")
    no(found)


def test_only_the_hosts_know_the_webui_and_only_the_page_knows_gradio() -> None:
    found = []
    for path in [*FILES, *SCRIPTS]:
        own = "scripts" if path in SCRIPTS else part_of(module_name(path))
        for line, name in imports(path):
            top = name.split(".")[0]
            door = own == "scripts" and name.startswith("modules.script_callbacks")
            if (top == "modules" and own != "host" and not door) or (top == "gradio" and own != "ui"):
                found.append(f"{named(path)}:{line} imports {name}")
    no(found)


def test_the_webuis_entry_script_is_small() -> None:
    no([named(path) for path in SCRIPTS if len(path.read_text(encoding="utf-8").splitlines()) > 40])


def test_nothing_is_caught_blindly_or_passed_through_unseen() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{named(path)}:{node.lineno} bare except")
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and node.args.kwarg:
                found.append(f"{named(path)}:{node.lineno} takes **{node.args.kwarg.arg}")
    no(found)


def test_every_public_function_of_the_core_says_what_it_does() -> None:
    no([f"{named(path)}:{node.lineno} {name}" for path in core_files() for name, node in public(tree(path))
        if not ast.get_docstring(node)])


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module and the public methods of those classes; not what is nested in them."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    no([named(path) for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")])


def test_no_file_is_long() -> None:
    found = []
    for path in [*EVERY_FILE, *(ROOT / "javascript").glob("*.js"), *ROOT.glob("*.css")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES_OF_A_FILE:
            found.append(f"{named(path)} has {lines} lines")
    no(found)


def test_no_function_is_long() -> None:
    found = []
    for path in EVERY_FILE:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    found.append(f"{named(path)}:{node.lineno} {node.name} has {lines} lines")
    no(found)


def test_the_package_is_small() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) <= MOST_LINES


def test_nothing_private_of_torch_is_used() -> None:
    no([f"{named(path)}:{line} {what}" for path in EVERY_FILE for line, what in private_of_torch(tree(path))])


def private_of_torch(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of torch's private modules, of private attributes of anything imported from torch, and of tensors'."""
    from_torch = set()
    for node in ast.walk(module):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name, alias in zip(names, getattr(node, "names", ()), strict=False):
            if name.split(".")[0] == "torch":
                from_torch.add(alias.asname or alias.name.split(".")[0])
                if any(map(is_private, name.split("."))):
                    yield node.lineno, f"imports {name}"
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, (ast.Attribute, ast.Call)):
                root = root.func if isinstance(root, ast.Call) else root.value
            owner = root.id if isinstance(root, ast.Name) else ""
            if owner in from_torch or (node.attr in PRIVATE_OF_TENSORS and owner not in ("self", "cls")):
                yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            owner, name = ast.unparse(node.args[0]), node.args[1]
            if owner.split(".")[0] in from_torch and isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield node.lineno, ast.unparse(node)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_what_is_private_of_torch_is_found() -> None:
    for source in ("import torch\ntorch._C.x()", "from torch import nn\nnn.Linear(1, 2)._parameters",
                   "x.untyped_storage()._cdata", "import torch\ngetattr(torch.cuda, '_sleep', None)",
                   "from torch.utils._python_dispatch import Mode"):
        assert len(list(private_of_torch(ast.parse(source)))) == 1, source
    for source in ("from torch import nn\nclass A(nn.Module):\n    def f(self): self._version",
                   "import torch\ntorch.nn.Linear"):
        assert not list(private_of_torch(ast.parse(source))), source


def test_names_are_the_words_of_the_field() -> None:
    found = []
    for path in [*FILES, *SCRIPTS, *TOOLS]:
        for line, kind, name in [(1, "module", path.stem), *definitions(tree(path))]:
            if (words := left_out(name)) and (kind, named(path)) != ("module", BASE_MODULE) and (
                    kind != "field" or name not in OF_FILES):
                found.append(f"{named(path)}:{line} {kind} {name}: {', '.join(words)}")
    no(found)


def definitions(module: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, kind, name) of all classes, their fields, functions and parameters."""
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef):
            yield node.lineno, "class", node.name
            yield from ((field.lineno, "field", field.target.id) for field in node.body
                        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, "function", node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, "parameter", node.arg


def left_out(name: str) -> list[str]:
    """The words of a name that are of our own dialect and not of the field."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().strip("_")
    for term in STANDARD_TERMS:
        words = re.sub(rf"(^|_){term}(_|$)", r"\1\2", words)
    return [*(word for word in words.split("_") if word in LEFT_OUT),
            *(pair for pair in LEFT_OUT_PAIRS if f"_{pair}_" in f"_{words}_")]


def test_a_word_that_is_left_out_is_found_in_a_name() -> None:
    names = {"HandJudge": ["hand", "judge"], "_base_dtype_name": [], "letGo": ["let_go"], "handler": [], "_base": ["base"]}
    assert {name: left_out(name) for name in names} == names


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
    assert paths
    assert import_in_a_new_process(paths, absent=(), folder=tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_what_runs_before_anything_is_installed_needs_nothing_but_python() -> None:
    no([f"{named(path)} imports {name}" for path in (ROOT / "install.py", ROOT / "tools" / "start.py")
        for _, name in imports(path) if name.split(".")[0] not in {*sys.stdlib_module_names, "launch"}])


def test_what_scripts_add_to_the_page_has_no_id_of_the_page() -> None:
    layout = set(re.findall(r'elem_id="(\w+)"', (ROOT / PACKAGE / "ui" / "layout.py").read_text(encoding="utf-8")))
    scripts = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "javascript").glob("*.js")))
    added = set(re.findall(r'\bid: "(\w+)"', scripts))
    assert layout and added and not layout & added
