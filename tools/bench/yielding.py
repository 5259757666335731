"""A host whose model somebody else uses now and then, which leaves it in another place of the memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch

from lib_lora_train import events
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.host.port import LeasedModel, never
from tools.bench.host import RandomHost


@dataclasses.dataclass
class YieldingModel(LeasedModel):
    """Somebody else wants it after `every` questions, and leaves it elsewhere in the memory."""

    every: int = 20
    questions: int = 0
    yielded: int = 0

    def others_waiting(self) -> bool:
        """See `LeasedModel`."""
        self.questions += 1
        return self.questions % self.every == 0

    def yield_model(self, report: events.Report) -> Mapping[str, torch.Tensor]:
        """See `LeasedModel`."""
        self.yielded += 1
        for tensor in self.tensors.values():
            tensor.data = tensor.data.clone()
        return self.tensors


class YieldingHost(RandomHost):
    """Lends the model of another host, which is handed over now and then."""

    leased: YieldingModel

    def __init__(self, host: RandomHost, *, every: int) -> None:
        self.__dict__.update(vars(host))
        self._every = every

    @contextlib.contextmanager
    def lease(self, *, stop: ShouldStop = never) -> Iterator[LeasedModel]:
        """See `Host`."""
        with super().lease(stop=stop) as leased:
            self.leased = YieldingModel(leased.tensors, leased.hints, leased.checkpoint, leased.device, every=self._every)
            yield self.leased
