"""The report of a problem, as one zip: versions, machine, settings, events, the traceback, the log.

Folders, the names of users, computers and image files, and the comment are private: they are replaced in every text unless
the user agrees to show them. The names of the LoRA and the checkpoint, the trigger word and the sentences stay. Other paths
are recognised in the text, up to a space.
"""

from __future__ import annotations

import collections
import getpass
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import socket
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lib_lora_train import __version__
from lib_lora_train.dataset.images import IMAGE_SUFFIXES
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES
from lib_lora_train.host.port import Host
from lib_lora_train.run.record import FAILURE, read_settings
from lib_lora_train.settings import DECLARATIONS
from lib_lora_train.settings.dataset_config import folders_in

PACKAGES = ("torch", "torchvision", "safetensors", "transformers", "open_clip_torch", "Pillow", "pillow-avif-plugin", "numpy",
            "gradio", "fastapi", "xformers", "bitsandbytes")
_PARTS = ("settings.toml", "events.jsonl", FAILURE)
_MOST = 1 << 20  # bytes of the end of each part
_LINES = 500
_ROOT = Path(__file__).resolve().parents[2]
_END = r"\s\"'`|,;:()<>\[\]{}"  # what ends a path in a text

ABOUT = """What this zip holds, to be given to whoever helps:

report.json    versions, machine, graphics card, checkpoint
settings.toml  what the run was started with
events.jsonl   what happened, a line each
error.txt      where the program failed, if it did
log.txt        the end of this extension's log

{privacy}
"""
_REPLACED = """Folders, the names of users and computers, of pictures and your comment have been replaced by words in <>. The
names of the LoRA and the checkpoint and the trigger word have not. Look into the files before you give them away."""
_AGREED = "You agreed to show folders and names: nothing has been replaced."


class LogTail(logging.Handler):
    """A log handler that keeps the last lines of this package's log."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines: collections.deque[str] = collections.deque(maxlen=_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record."""
        try:
            self._lines.append(self.format(record))
        except Exception:  # noqa: BLE001 - as every handler of Python's: a wrong log line ends no training
            self.handleError(record)
            return
        # Where nobody set up logging, Python prints warnings and errors itself, but not beside any handler: not beside this.
        if logging.lastResort and record.levelno >= logging.lastResort.level and not logging.getLogger().handlers:
            logging.lastResort.handle(record)

    def text(self) -> str:
        """The lines, oldest first."""
        return "\n".join(list(self._lines))


def remember_log() -> LogTail:
    """The process's one `LogTail`; the first call installs it."""
    logger = logging.getLogger("lib_lora_train")
    for handler in logger.handlers:
        # Compared by name: the WebUI may have read this module anew.
        if type(handler).__name__ == LogTail.__name__:
            return handler  # type: ignore[return-value]
    tail = LogTail()
    logger.addHandler(tail)
    return tail


def bundle(run: Path | None, *, host: Host | None = None, program: str = "", paths: bool = False) -> bytes:
    """The zip about the run of this folder; None is about the machine alone. `program` names what this runs in; with `paths`
    nothing private is replaced."""
    settings = read_settings(run) if run else {}
    texts = {"about.txt": ABOUT.format(privacy=_AGREED if paths else _REPLACED), "report.json": _report(run, host, program),
             "log.txt": remember_log().text()}
    texts |= {name: text for name in _PARTS if run and (text := _end_of(run / name))}
    if not paths:
        private = Private.of(settings, host=host, run=run)
        texts = {name: text if name == "about.txt" else private.replaced(text) for name, text in texts.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(zipfile.ZipInfo(name), text.encode("utf-8", "replace"), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


class Private:
    """Replaces what is private in a text by words in <>."""

    def __init__(self, *, folders: Mapping[str, str], code_folders: Mapping[str, str], names: Mapping[str, str],
                 texts: Iterable[str] = ()) -> None:
        """Replace `folders` with the rest of the path, `code_folders` without, `names` as whole words, `texts` anywhere."""
        flags = re.IGNORECASE if os.name == "nt" else 0
        below, whole = rf"(?:[/\\]+[^{_END}]*|(?!\w))", r"(?!\w)"
        paths = [(spelt, word, below) for path, word in folders.items() for spelt in _spellings(path)]
        paths += [(spelt, word, whole) for path, word in code_folders.items() for spelt in _spellings(path)]
        paths.sort(key=lambda entry: -len(entry[0]))
        self._rules = [(re.compile(re.escape(spelt) + rest, flags), word)
                       for spelt, word, rest in paths]
        self._rules += [(re.compile(re.escape(spelt)), "<text>") for text in texts if text.strip()
                        for spelt in _spellings(text)]
        # Any other path. Those that were replaced begin with a word in <> and do not match.
        start, step = r"(?<![\w<>/\\.:])(?:[A-Za-z]:[/\\]+|\\\\+|/)", r"[/\\]+"
        self._rules += [(re.compile(rf"{start}[^{_END}/\\]+(?:{step}[^{_END}]*)+"), "<path>")]
        suffixes = "|".join(re.escape(s) for s in sorted({*IMAGE_SUFFIXES, *CAPTION_SUFFIXES}))
        self._rules += [(re.compile(rf"[^{_END}/\\]+({suffixes})(?![\w.])", re.IGNORECASE), r"<file>\1")]
        self._rules += [(re.compile(rf"(?<![^\W_]){re.escape(spelt)}(?![^\W_])", re.IGNORECASE), word)
                        for name, word in sorted(names.items(), key=lambda entry: -len(entry[0])) if len(name) > 1
                        for spelt in _spellings(name)]

    @classmethod
    def of(cls, settings: Mapping[str, object], *, host: Host | None, run: Path | None) -> Private:
        """What is private on this machine and in a run."""
        home = _home()
        folders = {str(home): "<home>"} if home else {}
        folders |= {os.getcwd(): "<current folder>", tempfile.gettempdir(): "<temporary folder>"}
        if host is not None:
            folders |= {str(host.lora_folder): "<LoRA folder>", str(host.runs_folder): "<runs>"}
        if run is not None:
            folders |= {str(run.parent): "<runs>"}
        folders |= {str(value): f"<{name}>" for name, value in settings.items()
                    if value and name in DECLARATIONS and DECLARATIONS[name].is_path and set(str(value)) & set("/\\")}
        for path in folders_in(str(settings.get("dataset_config", ""))):
            folders |= dict.fromkeys([path, path.replace("\\", "\\\\")], "<image_dir>") if set(path) & set("/\\") else {}
        folders |= {os.path.realpath(path): word for path, word in folders.items()}
        folders = {path: word for path, word in folders.items() if len(path) > 3}  # not "/", "C:\\"
        code_folders = {str(_ROOT): "<extension>", sys.prefix: "<python>", sys.base_prefix: "<python>"}
        return cls(folders=folders, code_folders=code_folders, names=_names(),
                   texts=[str(settings.get("training_comment", ""))])

    def replaced(self, text: str) -> str:
        """`text` without anything private."""
        for pattern, word in self._rules:
            text = pattern.sub(word, text)
        return text


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None  # neither HOME nor an account


def _names() -> dict[str, str]:
    """The names of the user and the computer, as far as the system tells them."""
    home = _home()
    users = {os.environ.get(name, "") for name in ("USER", "USERNAME", "LOGNAME", "SUDO_USER")} | {home.name if home else ""}
    try:
        users.add(getpass.getuser())
    except (KeyError, OSError, ImportError):
        pass  # a container without accounts
    computers = {socket.gethostname(), platform.node(), os.environ.get("COMPUTERNAME", ""), os.environ.get("HOSTNAME", "")}
    computers |= {computer.split(".")[0] for computer in computers}
    named = {computer: "<computer>" for computer in computers - {"localhost"}}
    return {name: word for name, word in {**named, **dict.fromkeys(users, "<user>")}.items() if name}


def _spellings(text: str) -> set[str]:
    """How `text` may be spelled in a log, in JSON, in TOML, or by another system."""
    trimmed = text.rstrip("/\\") or text
    plain = {trimmed, trimmed.replace("\\", "/"), trimmed.replace("/", "\\")}
    plain |= {unicodedata.normalize(form, spelt) for spelt in plain for form in ("NFC", "NFD")}
    quoted = {json.dumps(spelt, ensure_ascii=ascii_only)[1:-1] for spelt in plain for ascii_only in (True, False)}
    return plain | quoted | {repr(spelt)[1:-1] for spelt in plain}


def _report(run: Path | None, host: Host | None, program: str) -> str:
    checkpoint = host.checkpoint() if host is not None else None
    return json.dumps({
        "run": run.name if run else None,
        "program": program, "extension": __version__,
        "python": sys.version, "system": platform.platform(), "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _package(name))},
        "cards": _gpus(), "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
        "checkpoint": {"name": checkpoint.name, "family": checkpoint.family, "sha256": checkpoint.sha256[:10],
                       "vae": checkpoint.vae_name} if checkpoint else None,
    }, indent=1, ensure_ascii=False)


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus() -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return []
    return [{"name": gpu.name, "memory": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
