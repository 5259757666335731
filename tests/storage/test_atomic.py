"""A file is the old one or the new one, whatever the disk and other programs do."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from lib_lora_train.errors import OutputError, translated
from lib_lora_train.storage import atomic
from lib_lora_train.storage.atomic import replacing, write_atomic


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half of the n")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("times", [1, 5])
def test_a_file_that_is_locked_for_a_moment_is_replaced(tmp_path, monkeypatch, times):
    replace, left = os.replace, [times]

    def locked(source, target):
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        replace(source, target)
    monkeypatch.setattr(atomic.os, "replace", locked)
    monkeypatch.setattr(atomic, "RETRY_SECONDS", (0.0,) * 5)
    write_atomic(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_a_file_that_stays_locked_stays_whole_and_is_told_in_a_sentence(tmp_path, monkeypatch):
    def locked(source, target):
        raise PermissionError(13, "being used by another process", str(source), None, str(target))
    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(atomic.os, "replace", locked)
    monkeypatch.setattr(atomic, "RETRY_SECONDS", (0.0,) * 5)
    with pytest.raises(OutputError, match="Access was denied while saving a.bin.*close programs that use the file"):
        with translated("saving a.bin"):
            write_atomic(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_what_a_killed_process_left_of_a_file_is_removed_and_of_others_is_not(tmp_path):
    for name in (".a.123.part", ".a.b.123.part", ".ab.123.part", "a.123.part"):
        (tmp_path / name).write_bytes(b"x")
    write_atomic(tmp_path / "a.bin", b"new")
    assert sorted(os.listdir(tmp_path)) == [".a.b.123.part", ".ab.123.part", "a.123.part", "a.bin"]


def test_a_folder_that_vanished_is_made_again(tmp_path):
    write_atomic(tmp_path / "gone" / "a.bin", b"new")
    assert (tmp_path / "gone" / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("number, kept", [(errno.ENOTSUP, True), (errno.EINVAL, True), (errno.ENOSYS, True), (errno.EIO, False),
                                          (errno.ENOSPC, False)])
def test_a_drive_without_fsync_loses_no_file_and_one_that_fails_leaves_the_old_one(tmp_path, monkeypatch, number, kept):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))
    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(atomic.os, "fsync", refuse)
    with contextlib.nullcontext() if kept else pytest.raises(OSError):
        write_atomic(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == (b"new" if kept else b"old") and os.listdir(tmp_path) == ["a.bin"]
