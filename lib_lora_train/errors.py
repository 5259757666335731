"""Every error this package raises on purpose.

Foreign exceptions become one of these in `translated` and nowhere else, so every text a user can
meet is written once. What is not listed there is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence


class LoraTrainError(Exception):
    """Something the user should read. `str(error)` is one sentence: what, why, what to do."""

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what.rstrip("."), why.rstrip("."), remedy.rstrip(".")
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.remedy:
            text += f"; {self.remedy}"
        super().__init__(printable(text if text.endswith("?") else text + "."))

    @property
    def reason(self) -> str:
        """Why, and what to do, where what it is about is said already."""
        return printable(f"{self.why or self.what}{f'; {self.remedy}' if self.remedy else ''}")


class UserError(LoraTrainError, ValueError):
    """Something the user gave is wrong; exit code 2."""


class SettingError(UserError):
    """A setting is unknown, out of range or contradicts another."""


class DatasetError(UserError):
    """The dataset folder, an image or a caption cannot be used."""


class ModelError(UserError):
    """The checkpoint is of a kind that cannot be trained on, or is incomplete."""


class LoraFileError(UserError):
    """A LoRA file cannot be read, or does not fit the model."""


class OutputError(UserError):
    """The name or the folder of the result cannot be used."""


class HostError(LoraTrainError):
    """The host is not in a state to train: no model is loaded, it is busy, or the model changed under the run."""


class TrainingError(LoraTrainError):
    """The run failed: the loss is not a number, or the memory is exhausted."""


class Interrupted(LoraTrainError):
    """The user stopped the run before there was anything to keep."""


def printable(text: str) -> str:
    """`text` as UTF-8 can hold it. On Linux a file's name may be any bytes; Python reads those that are no text as lone
    surrogates, which no page, log or reply can be written with."""
    return text.encode("utf-8", "replace").decode("utf-8")


def plain_line(text: str) -> str:
    """`text` on one line, without what is not seen: as a caption may hold it, and as it can be drawn."""
    return " ".join("".join(c if c.isprintable() else " " for c in printable(text)).split())


def counted(number: int, one: str, many: str = "") -> str:
    """"1 picture", "1,000 pictures"; `many` where that is not `one` and an s: "entries", "pictures are"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def some_of(names: Sequence[str], limit: int = 5) -> str:
    """The first few of `names` for a sentence: "a.png, b.png and 3 more"."""
    rest = len(names) - limit
    shown = [re.sub("[\0-\x1f\x7f\x85\u2028\u2029]", "\ufffd", name) for name in names[:limit]]  # Linux has such names
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn the foreign errors a user can cause into ours; `doing` completes "while …".

    Out of memory is told by its message as well as by its class: torch raises a plain
    RuntimeError for the CPU allocator and for some CUDA libraries.
    """
    try:
        yield
    except (LoraTrainError, BrokenPipeError):  # who read the output has seen enough: no fault of a disk
        raise
    except MemoryError as error:
        raise _out_of_memory(doing) from error
    except PermissionError as error:
        raise OutputError(
            f"Access was denied while {doing}", why=str(error),
            remedy="close programs that use the file, or choose a folder you may write to") from error
    except OSError as error:
        raise OutputError(
            f"The disk refused while {doing}", why=str(error),
            remedy="check that the folder exists and that the disk is not full") from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise _out_of_memory(doing) from error
        raise


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that the device's or the machine's memory is full."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(words in text for words in _FULL)


# Of CUDA and torch, of torch's allocator on Linux and on Windows, of cuBLAS and cuDNN. The last three are how a full memory
# shows itself where a library finds no room for its own workspace: cuBLAS's handle, cuDNN's engines and execution plans.
_FULL = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "allocation_failed",
         "cublas_status_not_initialized", "unable to find an engine to execute this computation", "no valid execution plans")


def _out_of_memory(doing: str) -> TrainingError:
    return TrainingError(
        f"The memory ran out while {doing}",
        why="the settings need more than the device has free",
        remedy="take the preset 'Low VRAM', or lower Batch size (train_batch_size) or Resolution (resolution), "
               "or switch Gradient checkpointing (gradient_checkpointing) on")
