"""A batch in pieces: rows of its inputs, each with its share of the loss, so that the gradients of the pieces add up to those
of the whole.

Random numbers, captions and shares belong to the whole batch, which is cut only when they are there: how it is cut changes
nothing but the order in which numbers are added.

Where the memory runs out, recordings are dropped first, then pieces become smaller, then activations are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.events import Report, Warned
from lib_lora_train.training.cuda_graph import TOO_SMALL, Execution
from lib_lora_train.training.step import StepInputs


def piece(inputs: StepInputs, rows: slice) -> StepInputs:
    """These rows of `inputs`, without a copy."""
    return StepInputs.of([tensor[rows] for tensor in inputs.tensors()])


def pieces(inputs: StepInputs, most: int | None) -> Iterator[StepInputs]:
    """`inputs` in as few pieces of at most `most` rows as it takes, as equal as can be; None is no limit. No rows, no piece."""
    count = len(inputs)
    parts = min(count, 1) if most is None else -(-count // most)
    for part in range(parts):
        yield piece(inputs, slice(count * part // parts, count * (part + 1) // parts)) if parts > 1 else inputs


class InPieces:
    """Gradients of a step's micro-batches; where the memory runs out, in ever smaller pieces, down to one row."""

    def __init__(self, execution: Execution, *, report: Report, most: int | None = None) -> None:
        """`most`: rows in a piece from the beginning, where it is known that more do not fit."""
        self._execution, self._report, self._told = execution, report, False
        self.most = most

    def gradients(self, micro_batches: Sequence[StepInputs]) -> None:
        """Add up the gradients of all of them, from none. Raises the error of a full memory where one row is too much."""
        while (make_room := self._fit(micro_batches)) is not None:
            # Outside of the except clause: the error held the frames, and these the tensors that filled the memory.
            make_room()
            self._execution.clear()
        if self._execution.suspended:  # without recordings it fitted
            self._execution.record_no_more(TOO_SMALL)

    def _fit(self, micro_batches: Sequence[StepInputs]) -> Callable[[], None] | None:
        """None where all of it is done, else what may help."""
        try:
            for inputs in micro_batches:
                for part in pieces(inputs, self.most):
                    self._execution.gradients(part)
            return None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._execution.crowded:
                return self._execution.suspend
            largest = max((len(inputs) for inputs in micro_batches), default=0)
            now = min(self.most or largest, largest)
            if now > 1:
                self._tell_once(
                    f"The memory was too small for {now} pictures at once. The run goes on with fewer at a time and learns "
                    "the same, but each step takes longer; a smaller batch or gradient checkpointing would avoid that.")
                self.most = -(-now // 2)
            elif self._execution.recompute():
                self._report(Warned("The memory was too small for one picture. The run goes on with gradient checkpointing and "
                                    "learns the same, but each step takes longer; a lower resolution would avoid that."))
            else:
                raise
        return self._execution.resume

    def _tell_once(self, message: str) -> None:
        if not self._told:
            self._told = True
            self._report(Warned(message))
