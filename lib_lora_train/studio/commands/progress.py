"""Progress of a command on the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm

from lib_lora_train.dataset.progress import Progress


@contextlib.contextmanager
def progress_bar(doing: str, *, shown: bool = True) -> Iterator[Progress]:
    """A bar on stderr while a person watches, which leaves no line behind; otherwise nothing. What is printed meanwhile goes
    through `tqdm.write`, on a line of its own."""
    with tqdm(desc=doing, unit="", dynamic_ncols=True, leave=False, disable=not (shown and sys.stderr.isatty())) as bar:
        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
        yield advance
