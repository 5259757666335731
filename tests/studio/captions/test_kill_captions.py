"""Processes that are killed in the middle of saving captions: no caption is lost, and all are old or all new.

A small program saves captions and is killed (SIGKILL, on Windows TerminateProcess) at its n-th operation on files, for
every n until it comes to its end unharmed. Where the system can fork, one program makes them all, to save the imports.
`tools/kill_captions.py` does the same at random moments.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib_lora_train.studio.captions.store import CaptionStore

ROOT = Path(__file__).resolve().parents[3]

# For n = FIRST, FIRST + STRIDE, …: copies PRISTINE to OUT/n and has a process work on it that is killed at its n-th file
# operation; with "torn", what is about to take a file's place loses its second half first, as if killed while writing.
# Ends with the first n at which the process was through; prints that n.
DRIVER = """
import itertools, os, shutil, signal, subprocess, sys
from pathlib import Path
from lib_lora_train.studio.captions.store import CaptionStore
from lib_lora_train.studio.captions.edits import AddTags

def work(action, folder, n, torn):
    counter = itertools.count(1)
    def watch(event, arguments):
        if event != "open" and not event.startswith("os."):
            return
        if next(counter) == n:
            if torn and event == "os.rename":
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    if action == "open":
        sys.addaudithook(watch)
        CaptionStore.open(folder)
    else:
        store = CaptionStore.open(folder)
        store.apply(AddTags(("new",)), range(len(store)))
        sys.addaudithook(watch)
        store.save()

def killed(action, folder, n, torn):
    if not hasattr(os, "fork"):
        return subprocess.run([sys.executable, __file__, "one", action, folder, str(n), torn]).returncode != 0
    process = os.fork()
    if not process:
        work(action, folder, n, torn)
        os._exit(0)
    return os.waitpid(process, 0)[1] != 0

if sys.argv[1] == "one":
    work(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
else:
    action, pristine, out, first, stride, torn = sys.argv[1:]
    for n in itertools.count(int(first), int(stride)):
        folder = Path(out, str(n))
        shutil.copytree(pristine, folder)
        if not killed(action, str(folder), n, torn):
            print(n)
            break
"""


def dataset(folder: Path, *, images: int) -> Path:
    """Captions in two folders; the last image of each has none."""
    for name in ("10_x", "2_y"):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            (folder / name / f"{number}.png").write_bytes(b"")
            if number < images - 1:
                (folder / name / f"{number}.txt").write_text(f"old {number}", encoding="utf-8")
    return folder


def texts(folder: Path) -> dict[str, str | None]:
    """What each image's caption file holds, None where there is none."""
    files = {path.relative_to(folder).as_posix(): path.with_suffix(".txt") for path in sorted(folder.glob("*/*.png"))}
    return {name: path.read_text(encoding="utf-8") if path.exists() else None for name, path in files.items()}


def drive(action: str, pristine: Path, out: Path, *, first: int = 1, stride: int = 1, torn: bool = False) -> list[Path]:
    """The folders that killed processes left; the last is that of the process that came to its end."""
    out.mkdir()
    driver = out.with_suffix(".py")
    driver.write_text(DRIVER, encoding="utf-8")
    arguments = [action, str(pristine), str(out), str(first), str(stride), "torn" if torn else ""]
    done = subprocess.run([sys.executable, str(driver), *arguments], cwd=ROOT, text=True, capture_output=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    return [out / str(n) for n in range(first, last + 1, stride)]


def added(before: dict[str, str | None]) -> dict[str, str]:
    return {name: f"{text}, new" if text else "new" for name, text in before.items()}


@pytest.mark.parametrize("images, stride, torn", [(2, 1, False), (2, 1, True), (20, 17, False)])
def test_killed_at_any_moment_of_a_save_all_captions_are_old_or_all_new(
        tmp_path: Path, images: int, stride: int, torn: bool) -> None:
    pristine = dataset(tmp_path / "pristine", images=images)
    old = texts(pristine)
    new = added(old)
    left = drive("save", pristine, tmp_path / "out", stride=stride, torn=torn)
    unfinished = 0
    for folder in left:
        found = texts(folder)
        assert all(found[name] in (old[name], new[name]) for name in old), "before anybody tidies up"
        mixed = found not in (old, new)
        unfinished += mixed
        store = CaptionStore.open(folder)
        assert texts(folder) in ((new,) if mixed else (old, new))
        assert {path.relative_to(folder).as_posix(): store.caption(i) or None for i, path in enumerate(store.images)} \
            == texts(folder)
        store.set_captions(dict.fromkeys(range(len(store)), "after"), "Tag")
        assert store.save().written == len(store)
        leftovers = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".journal"))]
        assert leftovers == [] and set(texts(folder).values()) == {"after"}
    assert texts(pristine) == old and len(left) > 5
    assert unfinished, "none was caught between two captions: the test looks at the wrong moments"


def test_killed_again_while_it_recovers_the_next_recovery_makes_all_captions_new(tmp_path: Path) -> None:
    pristine = dataset(tmp_path / "pristine", images=2)
    old = texts(pristine)
    new = added(old)
    # Of those that were caught between two captions, the first: most is left to do.
    interrupted = next(folder for folder in drive("save", pristine, tmp_path / "first") if texts(folder) not in (old, new))
    left = drive("open", interrupted, tmp_path / "out")
    assert len(left) > 10
    for folder in left:
        CaptionStore.open(folder)
        assert texts(folder) == new
        assert not [path for path in folder.rglob("*") if path.name.endswith((".part", ".journal"))]
