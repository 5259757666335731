"""Several processes that train one LoRA together: what they ask of each other, where they stand, how they find each other.

    protocol.py    `ProcessGroup`, `SINGLE_PROCESS` for a single process, which rows of a batch are whose
    place.py       rank, world and address, as torchrun, accelerate or a user's own script set them
    joined.py      the processes joined by torch.distributed, and what happens when one of them is lost
    agreement.py   whether all of them are about to train the same thing
"""

from lib_lora_train.distributed.consistency import Disagreement, agree
from lib_lora_train.distributed.protocol import SINGLE_PROCESS, Lost, ProcessGroup, share

__all__ = ["SINGLE_PROCESS", "Disagreement", "Lost", "ProcessGroup", "agree", "share"]
