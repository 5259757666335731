"""No file can run a program: nothing that unpickles is ever called, and pickles that are offered are refused unopened."""

from __future__ import annotations

import ast
import io
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib_lora_train.__main__ import main
from lib_lora_train.adapters import file
from lib_lora_train.dataset.buckets import Buckets
from lib_lora_train.errors import LoraTrainError
from lib_lora_train.host.standalone import StandaloneHost, describe_file
from lib_lora_train.inputs.latent_files import CACHE_FOLDER, LatentDisk
from lib_lora_train.model.sd.hints_file import hints_from_yaml
from lib_lora_train.model.sd.tokens import tokenizer_from_folder
from lib_lora_train.settings.toml import read_toml
from tests.scanned_folder import scan

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "lib_lora_train").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "tools").glob("*.py"),
                  *(ROOT / "tools" / "bench").glob("*.py"), ROOT / "install.py"])
# What unpickles, unmarshals or runs text, by the last parts of its name.
MODULES = frozenset({"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"})
CALLS = frozenset({
    "torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "torch.export.load", "torch.classes",
    "numpy.load", "np.load", "np.fromfile", "pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "eval", "exec", "compile", "__import__", "os.system", "os.popen"})


def dotted(node: ast.expr) -> str:
    """ "torch.jit.load" of such an expression, "" of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def test_no_source_names_what_unpickles_or_runs_text():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if MODULES & {name.split(".")[0] for name in names} or CALLS & set(names):
                found.append(f"{path}:{node.lineno} imports {names}")
            if isinstance(node, ast.Call) and (
                    dotted(node.func) in CALLS or any(keyword.arg == "allow_pickle" for keyword in node.keywords)):
                found.append(f"{path}:{node.lineno} calls {dotted(node.func)}")
    assert not found, "\n".join(found)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


_found: list[str] = []
_watching: list[bool] = []
sys.addaudithook(lambda event, arguments: _found.append(str(arguments)) if event == "pickle.find_class" and _watching else None)


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Path]:
    """The file that no reader may make; fails if anything was unpickled at all."""
    target = tmp_path / "ran"
    _found.clear()
    _watching.append(True)
    yield target
    _watching.clear()
    assert not target.exists() and not _found


def payloads(target: Path) -> dict[str, bytes]:
    """The file formats that hold pickles: plain, torch's old and new ones, numpy's two, and a zip that hides one."""
    legacy, modern, arrays, array, hidden = (io.BytesIO() for _ in range(5))
    torch.save({"lora": Bomb(target)}, legacy, _use_new_zipfile_serialization=False)
    torch.save({"lora": Bomb(target)}, modern)
    objects = np.array([Bomb(target), None], dtype=object)
    np.savez(arrays, mean=objects, std=objects)
    np.save(array, objects, allow_pickle=True)
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(target)))
    return {"plain": pickle.dumps(Bomb(target)), "protocol 0": pickle.dumps(Bomb(target), 0), "legacy": legacy.getvalue(),
            "modern": modern.getvalue(), "npz": arrays.getvalue(), "npy": array.getvalue(), "zip": hidden.getvalue()}


KINDS = ("plain", "protocol 0", "legacy", "modern", "npz", "npy", "zip")


def test_the_payloads_do_run_where_somebody_loads_them(tmp_path: Path):
    # Or the tests below would prove nothing.
    for kind, data in payloads(tmp_path / "ran").items():
        if kind in ("plain", "protocol 0"):
            pickle.loads(data)
        elif kind in ("npz", "npy"):
            loaded = np.load(io.BytesIO(data), allow_pickle=True)
            _ = loaded["mean"] if kind == "npz" else loaded
        elif kind in ("legacy", "modern"):
            torch.load(io.BytesIO(data), **({"weights_only": False} if torch.__version__ >= "2.4" else {}))
        else:
            continue
        assert (tmp_path / "ran").exists(), kind
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".pth", ".bin", ".npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_under_any_name_is_refused_as_lora_and_as_checkpoint(tmp_path: Path, quiet: Path, kind: str, suffix: str):
    path = tmp_path / f"offered{suffix}"
    path.write_bytes(payloads(quiet)[kind])
    host = StandaloneHost(path, lora_folder=tmp_path, runs_folder=tmp_path)
    readers: list[Callable[[], object]] = [
        lambda: file.load(path), lambda: file.read_metadata(path), lambda: file.inspect(path), lambda: describe_file(path),
        lambda: host.lease().__enter__()]
    for reader in readers:
        with pytest.raises(LoraTrainError) as refused:
            reader()
        assert "offered" in str(refused.value)
    assert host.checkpoint() is None and host.outline() is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_the_place_of_a_cached_picture_is_a_miss(tmp_path: Path, quiet: Path, kind: str):
    image = tmp_path / "1.png"
    Image.new("RGB", (64, 64)).save(image)
    placement = Buckets((64, 64), enable_bucket=True, min_bucket_reso=64, max_bucket_reso=128, bucket_reso_steps=64,
                        bucket_no_upscale=False).assign(64, 64)
    disk = LatentDisk(vae_fingerprint="vae")
    latents = torch.ones(4, 8, 8), torch.zeros(4, 8, 8)
    assert disk.store(image, placement, latents=latents) is None
    (cached,) = (tmp_path / CACHE_FOLDER).iterdir()
    cached.write_bytes(payloads(quiet)[kind])
    # kohya's own cache of the same image is not even looked at.
    (tmp_path / "1.npz").write_bytes(payloads(quiet)["npz"])
    assert LatentDisk(vae_fingerprint="vae").load(image, placement) is None
    assert len(scan(tmp_path, max_train_epochs=1).examples) == 1
    assert disk.store(image, placement, latents=latents) is None
    mean, _ = LatentDisk(vae_fingerprint="vae").load(image, placement)
    assert bool((mean == 1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_the_place_of_any_other_file_is_refused(tmp_path: Path, quiet: Path, kind: str):
    data = payloads(quiet)[kind]
    for name in ("1.png", "1.txt", "run.toml", "model.yaml"):
        (tmp_path / name).write_bytes(data)
    for reader in (lambda: scan(tmp_path, max_train_epochs=1), lambda: read_toml(tmp_path / "run.toml"),
                   lambda: hints_from_yaml(tmp_path / "model.yaml")):
        with pytest.raises(LoraTrainError):
            reader()


@pytest.mark.parametrize("text", [
    "!!python/object/apply:pathlib.Path.touch [{target}]", "model: !!python/object/new:os.system ['touch {target}']",
    "model: {{params: !!python/name:os.system }}"])
def test_a_yaml_that_names_python_objects_makes_none(tmp_path: Path, quiet: Path, text: str):
    (tmp_path / "model.yaml").write_text(text.format(target=quiet), encoding="utf-8")
    with pytest.raises(LoraTrainError):
        hints_from_yaml(tmp_path / "model.yaml")


def test_a_tokenizer_folder_cannot_bring_code(tmp_path: Path, quiet: Path):
    (tmp_path / "vocab.json").write_bytes(payloads(quiet)["plain"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}', encoding="utf-8")
    (tmp_path / "evil.py").write_text(f"open({str(quiet)!r}, 'w')", encoding="utf-8")
    with pytest.raises(LoraTrainError):
        tokenizer_from_folder(tmp_path)


def test_the_command_line_refuses_a_pickle_in_one_sentence(tmp_path: Path, quiet: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "offered.pt"
    path.write_bytes(payloads(quiet)["modern"])
    assert main(["inspect", str(path)]) == 2
    assert main(["train", "--checkpoint", str(path), "--data", str(tmp_path), "--name", "x"]) == 2
    said = capsys.readouterr().err
    assert "pickled" in said and "Traceback" not in said
