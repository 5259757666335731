"""Feeds damaged and random input to everything that reads what others made, and counts how it ends.

    python tools/fuzz_readers.py --inputs 100000 --seed 1

Each input must end in a value or in one of the package's own refusals (LoraTrainError), within a time, without a file, a
program or a connection outside of a folder made for it. The same seed makes the same inputs; one of them alone is made
with `--only READER --first N --inputs 1`. Exit code 0 if all of them ended well.

A crash of the interpreter or a hang ends the tool, with the stack and the exit code saying so; the input then lies in the
folder that was printed first. Decoding is limited to 4 million pixels here, so that the time goes into many inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import filelock  # noqa: F401 - it tries links in the temporary folder when it is imported, which no input did
import fuzz_studio
import torch
from fuzz_inputs import (
    ODD,
    YAML_SEEDS,
    anything,
    checkpoint_seeds,
    image_file,
    image_seeds,
    json_text,
    lora_seeds,
    mutated,
    state_seeds,
    tensors_file,
    text,
)
from PIL import Image

from lib_lora_train.adapters import file as lora_file
from lib_lora_train.dataset import caption_files, folder, images
from lib_lora_train.dataset.caption_variation import process_caption
from lib_lora_train.dataset.examples import with_repeats
from lib_lora_train.errors import LoraTrainError, printable
from lib_lora_train.host.standalone import StandaloneHost, describe_file
from lib_lora_train.run.output import checked_name, destination
from lib_lora_train.settings import DECLARATIONS, Settings, flat, parse
from lib_lora_train.settings.areas import CaptionSettings, DatasetSettings
from lib_lora_train.settings.dataset_config import SubsetSettings
from lib_lora_train.settings.toml import read_toml, write_toml
from lib_lora_train.training import checkpoint

SECONDS = 30.0
"""What one input may take before it counts as a hang. The slowest measured is far below; a busy machine is not a fault."""
MOST_MEMORY = 1 << 30
"""Bytes that the process may grow by over all inputs."""


# ---- readers --------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Reader:
    """`make` an input, then `read` it; `read` gets the input and an empty folder."""

    name: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes, Path], object]
    share: int = 3


def readers() -> list[Reader]:
    """Everything that reads, each with its own kind of damage."""
    toml = [write_toml(flat(Settings())).encode(),
            b"[a]\nnetwork_dim = 16\nlearning_rate = 1e-4\n[b]\ntrigger_word = '''x\n'''\n",
            b'"quoted" = [1, {a = 2}]\n[[t]]\nx = 0x10\n']
    words = [b"a photo of zzk, red hair\nsecond line", "日本語, タグ, 猫".encode(), b"\xef\xbb\xbftag, tag,, TAG"]
    png, loras, states = image_seeds(), lora_seeds(), state_seeds()
    models, size = checkpoint_seeds()
    return [
        Reader("captions", lambda rng: mutated(rng, words), _caption),
        Reader("TOML", lambda rng: mutated(rng, toml), _toml),
        Reader("JSON by the API", _body, _Server()),
        Reader("settings", _settings, _parsed),
        Reader("LoRA files", lambda rng: tensors_file(rng, loras), _lora),
        Reader("checkpoints", lambda rng: _pair(tensors_file(rng, models), b"" if rng.random() < 0.6 else mutated(
            rng, YAML_SEEDS)),
               lambda data, root: _checkpoint(data, root, size=size), share=1),
        Reader("training states", lambda rng: tensors_file(rng, states), _state),
        Reader("pictures", lambda rng: image_file(rng, png), _image),
        Reader("folders", lambda rng: text(rng, ["1", "10_dog", ".png", ".txt"]).encode("utf-8", "surrogatepass"), _folder),
        Reader("zip files", lambda rng: fuzz_studio.zip_file(rng, png), fuzz_studio.read_zip, share=1),
        Reader("dataset folders", fuzz_studio.dataset_files,
               lambda data, root: fuzz_studio.read_dataset(data, root, image=_TINY.getvalue()), share=1),
        Reader("LoRA names", lambda rng: text(rng, ["zzk", "my character", "CON"]).encode("utf-8", "surrogatepass"), _name),
    ]


def _written(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


def _caption(data: bytes, root: Path) -> object:
    found = caption_files.read_caption_file(_written(data, root / "1.txt"))
    if found.error:
        raise found.error
    chosen = CaptionSettings(shuffle_caption=True, caption_tag_dropout_rate=0.2, enable_wildcard=True)
    return process_caption((found.line, *found.further_lines), chosen, rng=random.Random(1), trigger_word="zzk, girl")


def _toml(data: bytes, root: Path) -> object:
    return parse(read_toml(_written(data, root / "run.toml")))


def _settings(rng: random.Random) -> bytes:
    names = list(DECLARATIONS)
    chosen: dict[str, Any] = {}
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(names)
        near = rng.choice((DECLARATIONS[name].default, DECLARATIONS[name].minimum, DECLARATIONS[name].maximum))
        chosen[name] = near if rng.random() < 0.5 else anything(rng)
    if rng.random() < 0.2:
        chosen[rng.choice(ODD)] = anything(rng)
    return json.dumps(chosen).encode("utf-8", "surrogatepass")


def _parsed(data: bytes, root: Path) -> object:
    settings = parse(json.loads(data))
    # What was accepted can be kept in a run's folder and read back as it was.
    path = root / "settings.toml"
    path.write_text(write_toml(flat(settings)), encoding="utf-8", errors="replace")
    kept = parse(read_toml(path))
    as_text = {name: printable(value) if isinstance(value, str) else value for name, value in flat(settings).items()}
    assert flat(kept) == as_text, "the record says something else"
    return settings


def _body(rng: random.Random) -> bytes:
    seeds = [b'{"settings": {"train_data_dir": "@DATA", "network_dim": 16, "learning_rate": 1e-4, "flip_aug": true}}']
    if rng.random() < 0.5:
        return mutated(rng, seeds)
    return json_text(rng, {"settings": {"train_data_dir": "@DATA", **{
        rng.choice(list(DECLARATIONS)): anything(rng) for _ in range(rng.randrange(3))}}})


class _Server:
    """The API on a host without a model, asked in the process."""

    def __init__(self) -> None:
        self._client: Any = None
        self._data = Path()

    def __call__(self, data: bytes, root: Path) -> object:
        if self._client is None:
            from fastapi import FastAPI
            from fastapi.testclient import TestClient

            from lib_lora_train import api
            from lib_lora_train.run.runner import Runner
            app = FastAPI()
            host = StandaloneHost(None, lora_folder=root, runs_folder=root)
            self._data = Path(tempfile.mkdtemp(dir=root.parent))
            _written(_TINY.getvalue(), self._data / "1.png")
            api.install(app, runner=Runner(), host=host, token="t", credentials={}, api_enabled=True)
            self._client = TestClient(app, base_url="http://localhost")
        body = data.replace(b"@DATA", json.dumps(str(self._data))[1:-1].encode())
        answer = self._client.post("/lora-train/v1/plan", content=body, headers={"Content-Type": "application/json"})
        if answer.status_code == 200:
            return answer.json()["steps"]
        sentence = answer.json()["error"]
        assert answer.status_code in (400, 413) and sentence, f"{answer.status_code}: {sentence}"
        raise LoraTrainError(sentence)


def _lora(data: bytes, root: Path) -> object:
    path = _written(data, root / "x.safetensors")
    lora_file.read_metadata(path)
    return lora_file.inspect(path)


def _pair(data: bytes, yaml: bytes) -> bytes:
    return struct.pack("<I", len(yaml)) + yaml + data


def _checkpoint(data: bytes, root: Path, *, size: int) -> object:
    length = struct.unpack_from("<I", data)[0]
    if length:
        _written(data[4:4 + length], root / "x.yaml")
    path = _written(data[4 + length:], root / "x.safetensors")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        header = path.read_bytes()
        start = 8 + int.from_bytes(header[:8], "little")
        size = start + max(entry["data_offsets"][1] for entry in json.loads(header[8:start]).values() if "dtype" in entry)
    with path.open("r+b") as file:
        file.truncate(min(max(size, len(data)), 1 << 30))  # a hole in place of the weights
    host = StandaloneHost(path, lora_folder=root, runs_folder=root, device=torch.device("cpu"))
    host.checkpoint()
    host.outline()
    return describe_file(path)


def _state(data: bytes, root: Path) -> object:
    path = _written(data, root / checkpoint.FILE_NAME)
    checkpoint.read_metadata(path)
    return checkpoint.read(path)


def _image(data: bytes, root: Path) -> object:
    path = _written(data, root / "x.png")
    images.check_image(path)
    images.read_size(path)
    with mock.patch.object(images, "MAX_PIXELS", 4_000_000):
        return images.read_image(path).getextrema()


_TINY = io.BytesIO()
Image.new("RGB", (64, 64)).save(_TINY, "PNG")


def _folder(data: bytes, root: Path) -> object:
    name = data.decode("utf-8", "surrogatepass").replace("/", "").replace("\0", "")[:60]
    top = root / "data"
    top.mkdir()
    image = _TINY.getvalue()
    for child, content in ((f"{name}.png", image), (f"{name}.txt", b"a, b"), (f"{name}", b""), ("1.png", image)):
        try:
            _written(content, top / child)
        except (OSError, ValueError):
            continue  # a name that this system cannot hold
    subset = SubsetSettings(DatasetSettings(trigger_word=name.replace("\ud800", "")))
    return with_repeats(folder.read_folder(top, subsets=(subset,)), max_train_epochs=1)


def _name(data: bytes, root: Path) -> object:
    name = data.decode("utf-8", "surrogatepass")
    path = destination(root / "loras", name=name, overwrite=False)
    path.write_bytes(b"x")
    assert path.resolve().parent == (root / "loras").resolve() and [path.name] == os.listdir(root / "loras")
    return checked_name(name)


# ---- running --------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Tally:
    """How one reader's inputs ended."""

    inputs: int = 0
    values: int = 0
    refusals: int = 0
    slowest: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)


class Watch:
    """Notes whatever is written, started or connected outside of `root` while an input is read."""

    def __init__(self, root: Path) -> None:
        self.root, self.on, self.seen = str(root.resolve()), False, []
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect"):
            self.seen.append(f"{event} {arguments}"[:200])
        path: object = None
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = arguments[0]
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.symlink", "os.link"):
            path = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            real = os.path.realpath(os.path.join(_folder_of(event, arguments), os.fsdecode(path)))
            if real != os.devnull and not (real + os.sep).startswith(self.root + os.sep):
                self.seen.append(f"{event} {real}"[:200])


def _folder_of(event: str, arguments: tuple[Any, ...]) -> str:
    """What a relative path of the event starts from: emptying a folder names what is in it from the open folder."""
    if event in ("os.mkdir", "os.remove", "os.rmdir") and isinstance(arguments[-1], int) and arguments[-1] >= 0:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{arguments[-1]}")
    return ""


def run(inputs: int, *, seed: int, root: Path, first: int = 0, only: str = "", seconds: float = SECONDS) -> dict[str, Tally]:
    """Read `inputs` inputs, shared out among the readers (checkpoints take the longest and get fewer).

    `root` is a folder that may be filled and emptied.
    """
    chosen = [reader for reader in readers() for _ in range(reader.share) if only in ("", reader.name)]
    tallies, watch = {reader.name: Tally() for reader in chosen}, Watch(root)
    for number in range(first, first + inputs):
        reader = chosen[number % len(chosen)]
        data = reader.make(random.Random(f"{seed} {reader.name} {number}"))
        _written(data, root / "input")  # what is left if the interpreter dies
        folder_of_one = Path(tempfile.mkdtemp(dir=root))
        tally = tallies[reader.name]
        tally.inputs += 1
        faulthandler.dump_traceback_later(seconds, exit=True)
        began, watch.on = time.perf_counter(), True
        try:
            reader.read(data, folder_of_one)
            tally.values += 1
        except LoraTrainError:
            tally.refusals += 1
        except Exception as error:  # noqa: BLE001 - to find these is what this is for
            tally.failures.append(f"{reader.name}, input {number}: {type(error).__name__}: {str(error)[:200]}")
            tally.failures[-1] += f" ({_where(error)})"
        finally:
            watch.on = False
            tally.slowest = max(tally.slowest, time.perf_counter() - began)
            faulthandler.cancel_dump_traceback_later()
        tally.failures += [f"{reader.name}, input {number}: {seen}" for seen in watch.seen]
        watch.seen.clear()
        _empty(folder_of_one)
    return tallies


def _where(error: BaseException) -> str:
    """The file and line that raised it, of our package where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "lib_lora_train" in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def _empty(root: Path) -> None:
    for path in sorted(root.rglob("*"), key=lambda path: -len(path.parts)):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    root.rmdir()


def table(tallies: dict[str, Tally], *, grown: int) -> Iterator[str]:
    """What was found, a row a reader, as Markdown."""
    yield "| reader | inputs | values | refusals | anything else | slowest |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, tally in tallies.items():
        yield (f"| {name} | {tally.inputs:,} | {tally.values:,} | {tally.refusals:,} | {len(tally.failures)} | "
               f"{1000 * tally.slowest:.0f} ms |")
    total = sum(tally.inputs for tally in tallies.values())
    yield f"\n{total:,} inputs, the process grew by at most {grown / 2**20:.0f} MiB"


def peak() -> int:
    """The most memory that the process ever had, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    """The tool; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="one reader's name")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    warnings.simplefilter("ignore")  # Pillow tells of every damaged TIFF
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        print(f"Inputs are read in {root}; seed {chosen.seed}", flush=True)
        run(40, seed=0, root=Path(root), only=chosen.only)  # what is loaded once must not count as growth
        before = peak()
        tallies = run(chosen.inputs, seed=chosen.seed, root=Path(root), first=chosen.first, only=chosen.only)
        grown = peak() - before
    print(*table(tallies, grown=grown), sep="\n")
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    print(*failures[:50], sep="\n")
    return 1 if failures or grown > MOST_MEMORY else 0


if __name__ == "__main__":
    sys.exit(main())
