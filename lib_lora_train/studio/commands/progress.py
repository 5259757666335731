"""Progress of a command on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

from tqdm import tqdm

from lib_lora_train import events
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


def show_json(event: events.Event) -> None:
    """The event as a line of JSON."""
    print(json.dumps(events.to_dict(event)), flush=True)


class RunBar:
    """Events as a progress bar and a few lines."""

    def __init__(self) -> None:
        self._bar, self._name = tqdm(disable=True), ""

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Planned):
            tqdm.write(f"{event.checkpoint}: {event.summary}" + (f"; {event.memory}" if event.memory else ""))
        elif isinstance(event, events.Stage):
            self._advance(event.name, event.done, event.total)
        elif isinstance(event, events.Step):
            self._advance("Training", event.step, event.total, f"epoch {event.epoch}/{event.epochs} "
                          f"loss {event.average_loss:.4f} lr {event.learning_rate:.2e}")
        elif isinstance(event, events.Saved):
            tqdm.write(f"saved {event.path}")
        elif isinstance(event, events.Warned):
            tqdm.write(f"note: {event.message}")
        elif isinstance(event, events.Diagnosed):
            tqdm.write(f"{event.finding}: {event.message}")
        elif isinstance(event, events.Finished):
            self._bar.close()
            if event.outcome != "failed":
                print(event.message)

    def _advance(self, name: str, done: int, total: int, postfix: str = "") -> None:
        if name != self._name:
            self._bar.close()
            self._name, self._bar = name, tqdm(total=total, desc=name, dynamic_ncols=True)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if postfix:
            self._bar.set_postfix_str(postfix, refresh=False)
