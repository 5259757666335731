"""The studio's benchmark measures what it says, and tidies up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_lora_train.errors import SettingError
from lib_lora_train.studio.captions.store import CaptionStore
from tools.bench.command import main
from tools.bench.studio import Row, make_dataset, run_studio, table


def test_the_command_writes_a_table_and_figures_and_leaves_no_images(tmp_path: Path, capsys) -> None:
    assert main(["studio", "--pictures", "3,6", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["studio.json", "studio.md"]
    text, figures = (tmp_path / "studio.md").read_text(encoding="utf-8"), json.loads((tmp_path / "studio.json").read_text())
    assert text in capsys.readouterr().out
    assert figures["pictures"] == [3, 6]
    names = [row["name"] for row in figures["rows"]]
    assert {"load the index", "filter by tags", "replace a tag", "save all captions"} <= set(names)
    assert all(seconds > 0 for row in figures["rows"] for seconds in row["seconds"])
    assert all(f"| {name} " in text for name in names)


def test_the_dataset_has_so_many_images_and_twenty_different_tags_each(tmp_path: Path) -> None:
    store = CaptionStore.open(make_dataset(tmp_path / "d", images=30))
    assert len(store) == 30 and sum(count for _, count in store.tags()) <= 30 * 20
    assert all(15 <= len(set(store.caption(index).split(", "))) <= 20 for index in range(30))


def test_growth_is_one_where_time_grows_with_the_images_and_slow_rows_are_named() -> None:
    rows = [Row("linear", (0.1, 1.0)), Row("square", (0.1, 10.0)), Row("save all captions", (1.0, 9.0))]
    assert [row.growth((1000, 10_000)) for row in rows] == pytest.approx([1.0, 10.0, 0.9])
    text = table(rows, (1000, 10_000))
    assert "**Slower than 2 s: square.**" in text and "| linear " in text and "10,000" in text
    assert len({len(line) for line in text.splitlines()[:5]}) == 1


@pytest.mark.parametrize("sizes", [(), (0, 10), (10, 5), (5, 5)])
def test_sizes_that_make_no_table_are_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    with pytest.raises(SettingError):
        run_studio(sizes, output=tmp_path, say=lambda _: None)
