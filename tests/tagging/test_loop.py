"""The loop: a row for every image whatever happens to it, in batches that fit, stopped between two of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib_lora_train.errors import DatasetError, HostError, Interrupted
from lib_lora_train.tagging.captioner import Description, Tag
from lib_lora_train.tagging.loop import Row, tag_images
from lib_lora_train.tagging.options import TagOptions
from lib_lora_train.tagging.plain import PLAIN_SOURCES

CPU = torch.device("cpu")


class Colours:
    """Says how red each image is, so that a mix-up of images shows. `fails` may raise for a batch of red values."""

    name, label, reads = "colours", "Colours", "pixels"

    def __init__(self, fails: Callable[[list[int]], None] = lambda reds: None) -> None:
        self.batches: list[list[int]] = []
        self.fails, self.session, self.closed = fails, 0, 0

    def missing(self) -> str:
        return ""

    @contextlib.contextmanager
    def open(self, options: TagOptions, device: torch.device, *, should_stop=None) -> Iterator[Colours]:
        self.session += 1
        try:
            yield self
        finally:
            self.closed += 1

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        reds = [int(np.asarray(image)[0, 0, 0]) for image in images]
        self.batches.append(reds)
        self.fails(reds)
        return [Description((Tag(f"red_{red}", 0.9),)) for red in reds]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Ten images: the n-th has n of red."""
    found = [tmp_path / f"{number}.png" for number in range(10)]
    for number, path in enumerate(found):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return found


def rows(paths: Sequence[Path], source, *, existing=lambda path: "", progress=None, stop=None, **options: object) -> list[Row]:
    return list(tag_images(paths, source, options=TagOptions(**options), existing=existing, device=CPU, on_progress=progress,
                             should_stop=stop))


def right(paths: Sequence[Path]) -> list[Row]:
    return [(path, f"red {path.stem}", "") for path in paths]


def test_every_image_is_a_row_in_batches_of_the_size_asked_for(paths: list[Path]):
    source, seen = Colours(), []
    assert rows(paths, source, batch_size=4, progress=lambda *done: seen.append(done)) == right(paths)
    assert source.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert seen == [(number, 10) for number in range(1, 11)] and (source.session, source.closed) == (1, 1)


def test_an_image_that_cannot_be_read_is_its_own_row(paths: list[Path]):
    paths[2].write_bytes(b"no picture")
    paths[5].unlink()
    found = rows(paths, Colours(), batch_size=4)
    assert [row for row in found if not row[2]] == right([p for p in paths if p.stem not in "25"])
    for place in (2, 5):
        path, caption, problem = found[place]
        assert path == paths[place] and caption is None and path.name in problem


@pytest.mark.parametrize("error", [RuntimeError("shape\nmismatch"), ValueError(), HostError("It is gone"), IndexError()])
def test_an_image_that_the_model_chokes_on_spoils_no_other(paths: list[Path], error: Exception):
    def fails(reds: list[int]) -> None:
        if 6 in reds:
            raise error
    found = rows(paths, Colours(fails), batch_size=4)
    assert [row for row in found if not row[2]] == right([p for p in paths if p.stem != "6"])
    path, caption, problem = found[6]
    assert path == paths[6] and caption is None and problem.endswith(".") and "\n" not in problem


@pytest.mark.parametrize("full", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                  RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_full_memory_halves_the_batch_and_it_stays_so(paths: list[Path], full: BaseException):
    def fails(reds: list[int]) -> None:
        if len(reds) > 2:
            raise full
    source = Colours(fails)
    assert rows(paths, source, batch_size=8) == right(paths)
    assert [len(batch) for batch in source.batches] == [8, 4, 2, 2, 2, 2, 2]


def test_an_image_that_does_not_even_fit_alone_is_named(paths: list[Path]):
    def fails(reds: list[int]) -> None:
        if 3 in reds:
            raise MemoryError
    found = rows(paths, Colours(fails), batch_size=4)
    assert [row for row in found if not row[2]] == right([p for p in paths if p.stem != "3"])
    assert "memory" in found[3][2] and "3.png" in found[3][2]


def test_only_empty_leaves_the_others_alone_and_loads_nothing_for_nothing(paths: list[Path]):
    source = Colours()
    captioned = {paths[1]: "a cat", paths[8]: "a dog"}
    found = rows(paths, source, mode="only_empty", existing=lambda path: captioned.get(path, ""))
    assert found[:2] == [(paths[1], None, ""), (paths[8], None, "")]
    assert found[2:] == right([p for p in paths if p not in captioned]) and source.session == 1
    assert [caption for _, caption, _ in rows(paths, source, mode="only_empty", existing=lambda path: "x")] == [None] * 10
    assert source.session == 1


def test_a_caption_that_stays_as_it_is_is_no_new_one(paths: list[Path]):
    found = rows(paths[:2], Colours(), mode="append", existing=lambda path: "red 0, zzk")
    assert found == [(paths[0], None, ""), (paths[1], "red 0, zzk, red 1", "")]


def test_a_caption_that_cannot_be_read_is_added_to_by_nobody_but_may_be_replaced(paths: list[Path]):
    def existing(path: Path) -> str:
        if path == paths[0]:
            raise DatasetError("The caption file 0.txt is not UTF-8 text")
        return ""
    assert rows(paths[:2], Colours(), existing=existing) == right(paths[:2])
    for mode in ("append", "prepend", "only_empty"):
        found = rows(paths[:2], Colours(), existing=existing, mode=mode)
        assert found == [(paths[0], None, "The caption file 0.txt is not UTF-8 text."), *right(paths[1:2])]


def test_stopping_keeps_the_rows_that_were_done_and_unloads(paths: list[Path]):
    source, found = Colours(), []
    work = tag_images(paths, source, options=TagOptions(batch_size=4), existing=lambda path: "", device=CPU,
                        should_stop=lambda: len(found) >= 4)
    with pytest.raises(Interrupted):
        for row in work:
            found.append(row)
    assert found == right(paths[:4]) and source.closed == 1


def test_an_interruption_inside_the_captioner_is_no_problem_of_an_image(paths: list[Path]):
    def fails(reds: list[int]) -> None:
        raise Interrupted("The run was stopped while it waited")
    with pytest.raises(Interrupted):
        rows(paths, Colours(fails))


def test_who_looks_no_further_has_it_unloaded(paths: list[Path]):
    source = Colours()
    work = tag_images(paths, source, options=TagOptions(), existing=lambda path: "", device=CPU)
    next(work)
    work.close()
    assert source.closed == 1


def test_sources_without_a_model_go_through_the_same_loop(tmp_path: Path):
    (by_name,) = [source for source in PLAIN_SOURCES if source.name == "filename"]
    paths = [tmp_path / "red_cat.png", tmp_path / "001.png", tmp_path / "dog.png"]  # looked at by name: nothing is opened
    found = rows(paths, by_name, trigger_word="zzk", batch_size=2)
    assert [caption for _, caption, _ in found] == ["zzk, red cat", None, "zzk, dog"]
    assert "001.png" in found[1][2]
